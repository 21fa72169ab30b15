"""What the pages of a Parquet column say of themselves, held against its footer before anything is unpacked.

The footer is covered by its SHA-256 and a page's bytes by its checksum; the header of a page, which says how the page
is encoded and how large it is unpacked, by neither. Parquet's own reader believes it, and takes that much memory.
Called by `shard`.

A header is a struct in Thrift's compact protocol: fields, each a byte (what to add to the number of the field before,
and a kind) and a value; then a zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cache_schema.table import ARROW_SCHEMA, COLUMN_PATHS

_DATA, _DICTIONARY = 0, 2
_RLE = 3
ENCODINGS = {"PLAIN": 0, "RLE": _RLE, "DELTA_BINARY_PACKED": 5, "RLE_DICTIONARY": 8, "BYTE_STREAM_SPLIT": 9}
_TYPES, _ZSTD = (1, 4, 6), 6  # int32, float, bytes
_MAX_HEADER_BYTES = 256  # ours are 20 to 40: without statistics there is no text in them
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _BINARY, _LIST, _STRUCT = 1, 2, 3, 4, 5, 6, 8, 9, 12
_MAX_DEPTH = 8
_MAX_FIELD = 2**15 - 1

# What each field of a struct is, by its number in parquet.thrift: a kind, the fields of a struct, or [what a list has].
# pyarrow skips a number of another kind, and reads the items of a list as its own kind whatever the list says: where a
# struct is of other kinds than these, it would not read what is read here. A field that is not here may be no list.
_Shape = Any
_PAGE: _Shape = {  # 1 type, 2 and 3 bytes unpacked and packed, 4 checksum, 5 a data page, 7 a dictionary
    **dict.fromkeys((1, 2, 3, 4), _I32),
    5: dict.fromkeys((1, 2, 3, 4), _I32),  # numbers, encoding, encodings of the two levels
    7: dict.fromkeys((1, 2), _I32),  # numbers, encoding
}
_CHUNK: _Shape = {  # 1 type, 2 encodings, 3 path, 4 compression, 5 numbers, 6 and 7 bytes, 9 and 11 offsets
    **{1: _I32, 2: [_I32], 3: [_BINARY], 4: _I32, 5: _I64, 6: _I64, 7: _I64, 9: _I64, 11: _I64},
    13: [{1: _I32, 2: _I32, 3: _I32}],  # of the encodings, how many pages of each kind have them
    16: {1: _I64, 2: [_I64], 3: [_I64]},  # of the levels
}
_GROUP: _Shape = {1: [{1: _BINARY, 2: _I64, 3: _CHUNK}], 2: _I64, 3: _I64, 5: _I64, 6: _I64, 7: _I16}
_COLUMN: _Shape = {**dict.fromkeys((1, 2, 3, 5, 6, 7, 8, 9), _I32), 4: _BINARY, 10: {}}
_FOOTER: _Shape = {1: _I32, 2: [_COLUMN], 3: _I64, 4: [_GROUP], 5: [{1: _BINARY, 2: _BINARY}], 6: _BINARY, 7: [{1: {}}]}

# The columns as a footer spells them: a name, 0 required or 1 optional or 2 repeated, how many are inside; and of each,
# how many repetition and definition levels there are, where they are counted at all.
_TREE: list[tuple[bytes, int, int]] = []
_LEVELS: list[tuple[int, int]] = []
for _field, _path in zip(ARROW_SCHEMA, COLUMN_PATHS, strict=True):
    _is_list = _path != _field.name
    _TREE += [(_field.name.encode(), int(_field.nullable), int(_is_list))]
    _TREE += [(b"list", 2, 1), (b"element", 0, 0)] if _is_list else []
    _LEVELS += [(2, 2 + _field.nullable) if _is_list else (0, 0)]

_Header = dict[int, Any]  # field -> a number, a truth, a text, a list, or the struct inside


def check_pages(read: Callable[[int, int], bytes], column: Any, rows: int, dictionary: bool) -> None:
    """Raise ValueError unless a column's page headers agree with its metadata in the footer.

    read: offset, size -> bytes of the file. column: pyarrow's ColumnChunkMetaData, of a group of so many rows.
    dictionary: whether it may have one.
    """
    name, at, has_dictionary = column.path_in_schema, column.data_page_offset, column.has_dictionary_page
    if has_dictionary:  # elsewhere pyarrow looks past it, and begins at the data
        if not dictionary or not 0 < column.dictionary_page_offset < at:
            raise ValueError(f"{name} has a dictionary at {column.dictionary_page_offset}, and its data at {at}")
        at = column.dictionary_page_offset
    end = at + column.total_compressed_size
    encodings = {ENCODINGS[e] for e in column.encodings if e in ENCODINGS and (e != "RLE_DICTIONARY" or dictionary)}
    unpacked = numbers = pages = 0
    while at < end:
        header, size = _header(name, read(at, min(_MAX_HEADER_BYTES, end - at)))
        if pages > rows:  # a page has a row at least
            raise ValueError(f"{name} has more pages than its {rows} rows can have")
        if header[1] == _DICTIONARY and has_dictionary and not pages:
            inner = header[7]
            if inner[1] > column.num_values:  # room is made for so many, before one is read
                raise ValueError(f"{name} has a dictionary of {inner[1]} for {column.num_values} numbers")
        elif header[1] == _DATA:
            inner = header[5]
            numbers += inner[1]
            if inner[3] != _RLE or inner[4] != _RLE:
                raise ValueError(f"the levels of {name} are encoded otherwise than by RLE")
        else:
            raise ValueError(f"{name} has a page of kind {header[1]}")
        if inner[1] < 0 or inner[2] not in encodings - {_RLE}:
            raise ValueError(f"{name} has a page of {inner[1]} numbers in encoding {inner[2]}, which its footer denies")
        if header[2] < 0 or header[3] < 0:
            raise ValueError(f"{name} has a page of {header[3]} bytes, {header[2]} unpacked")
        at += size + header[3]
        unpacked += size + header[2]
        pages += 1
    said = (end, column.total_uncompressed_size, column.num_values)
    if (at, unpacked, numbers) != said:
        raise ValueError(
            f"the pages of {name} end, unpack to and hold {(at, unpacked, numbers)}, its footer says {said}"
        )


def _header(name: str, data: bytes) -> tuple[_Header, int]:
    """A page's header and its size. ValueError where it is none, or lacks what every page here has."""
    try:
        header, size = _struct(data, 0, _PAGE)
        inner, needed = (header[7], (1, 2)) if header[1] == _DICTIONARY else (header[5], (1, 2, 3, 4))
        if not (header.keys() >= {1, 2, 3, 4} and inner.keys() >= set(needed)):
            raise KeyError(name)
    except (IndexError, KeyError) as error:
        raise ValueError(f"{name} has a page whose header cannot be read, or has no checksum") from error
    return header, size


def check_footer(footer: bytes) -> None:
    """Raise ValueError unless the columns that a footer lists are in names and enumerations those of a file of ours,
    and no two share a byte.

    pyarrow ends the process over a compression that it does not know, as soon as it is asked which it is, and over
    histograms of levels that are not of the length of the column's levels.
    """
    places = []
    try:
        found = _struct(footer, 0, _FOOTER)[0]
        tree = [(part[4], part.get(3), part.get(5, 0)) for part in found[2][1:]]
        if tree != _TREE or found[2][0][5] != len(COLUMN_PATHS):
            raise ValueError("its columns are not those of FORMAT.md, or not in this order")
        for group in found[4]:
            chunks = [column[3] for column in group[1]]
            if [b".".join(c[3]).decode() for c in chunks] != COLUMN_PATHS:
                raise ValueError("its columns are not those of FORMAT.md, or not in this order")
            if not all(c[1] in _TYPES and c[4] == _ZSTD and set(c[2]) <= set(ENCODINGS.values()) for c in chunks):
                raise ValueError("its footer has a type, an encoding or a compression which FORMAT.md does not have")
            if not all(_counts_its_levels(*of) for of in zip(chunks, _LEVELS, strict=True)):
                raise ValueError("its footer counts levels that its columns do not have")
            places += [(c.get(11, c[9]), c[7]) for c in chunks]
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError("its footer cannot be taken apart") from error
    end = 0
    for start, size in sorted(places):
        if start < end or size < 0:  # a kilobyte on the disk would be all that there is of gigabytes
            raise ValueError(f"its footer has a column of {size} bytes from {start}, where another ends at {end}")
        end = start + size


def _counts_its_levels(chunk: _Header, levels: tuple[int, int]) -> bool:
    """Whether the histograms of repetition and definition levels, where there are any, are as long as they must be."""
    counted = chunk.get(16, {})
    return all(len(counted.get(field, ())) in (0, size) for field, size in zip((2, 3), levels, strict=True))


def _struct(data: bytes, at: int, shape: _Shape, depth: int = 0) -> tuple[_Header, int]:
    """The struct that begins here, and where it ends. shape: of its fields, see above.

    Raises IndexError where the data end first, KeyError where it is not of this shape.
    """
    fields: _Header = {}
    number = 0
    while data[at]:
        delta, kind = data[at] >> 4, data[at] & 15
        number += delta
        if not delta or number > _MAX_FIELD:  # in 16 bits it would begin again
            raise KeyError(number)
        fields[number], at = _value(data, at + 1, kind, shape.get(number), depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, shape: _Shape, depth: int) -> tuple[Any, int]:
    """A value of this kind and where it ends; see `_struct`. shape: None where any will do but a list."""
    expected = _STRUCT if isinstance(shape, dict) else _LIST if isinstance(shape, list) else shape
    if expected not in (None, kind):
        raise KeyError(kind)
    if kind in (_TRUE, _FALSE):  # it has no byte of its own
        return kind == _TRUE, at
    if kind in (_I16, _I32, _I64):
        value, at = _varint(data, at)
        value = value >> 1 ^ -(value & 1)
        if kind != _I64 and not -(2**31) <= value < 2**31:
            raise KeyError(value)
        return value, at
    if kind == _BYTE:
        return data[at], at + 1
    if kind == _BINARY:
        size, at = _varint(data, at)
        if size > len(data) - at:
            raise IndexError(size)
        return data[at : at + size], at + size
    if depth > _MAX_DEPTH:
        raise KeyError(kind)
    if kind == _LIST and shape is not None:
        size, kind = data[at] >> 4, data[at] & 15
        at += 1
        if size == 15:
            size, at = _varint(data, at)
        items = []
        for _ in range(size):
            item, at = _value(data, at, kind, shape[0], depth + 1)
            items.append(item)
        return items, at
    if kind != _STRUCT:
        raise KeyError(kind)
    return _struct(data, at, shape or {}, depth + 1)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in seven bits a byte, lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise KeyError(at)
