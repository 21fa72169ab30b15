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

# PageHeader of parquet.thrift: 1 type, 2 and 3 bytes unpacked and packed, 4 checksum, 5 a data page's header, 7 a
# dictionary's. Of a data page: 1 numbers, 2 encoding, 3 and 4 encodings of the levels. Of a dictionary: 1 and 2.
_DATA, _DICTIONARY = 0, 2
_RLE = 3
ENCODINGS = {"PLAIN": 0, "RLE": _RLE, "DELTA_BINARY_PACKED": 5, "RLE_DICTIONARY": 8, "BYTE_STREAM_SPLIT": 9}
_MAX_HEADER_BYTES = 256  # ours are 20 to 40: without statistics there is no text in them
_TRUE, _FALSE, _BYTE, _NUMBERS, _BINARY, _LIST, _STRUCT = 1, 2, 3, (4, 5, 6), 8, 9, 12
_MAX_DEPTH = 8
# Of a footer: 4 row groups, of these 1 columns, of these 3 metadata, of this 1 type, 2 encodings, 4 compression.
_TYPES, _ZSTD = (1, 4, 6), 6  # int32, float, bytes

_Header = dict[int, Any]  # field -> a number, a truth, or the header inside


def check_pages(read: Callable[[int, int], bytes], column: Any, rows: int, dictionary: bool) -> None:
    """Raise ValueError unless a column's page headers agree with its metadata in the footer.

    read: offset, size -> bytes of the file. column: pyarrow's ColumnChunkMetaData, of a group of so many rows.
    dictionary: whether it may have one.
    """
    name = column.path_in_schema
    at = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    end = at + column.total_compressed_size
    encodings = {ENCODINGS[e] for e in column.encodings if e in ENCODINGS and (e != "RLE_DICTIONARY" or dictionary)}
    unpacked = numbers = pages = 0
    while at < end:
        header, size = _header(name, read(at, min(_MAX_HEADER_BYTES, end - at)))
        if pages > rows:  # a page has a row at least
            raise ValueError(f"{name} has more pages than its {rows} rows can have")
        if header[1] == _DICTIONARY and dictionary and not pages:
            inner = header[7]
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
        header, size = _struct(data, 0)
        data_page = header[1] != _DICTIONARY
        inner = header[5 if data_page else 7]
        needed = [
            header[1],
            header[2],
            header[3],
            header[4],
            *(inner[i] for i in ((1, 2, 3, 4) if data_page else (1, 2))),
        ]
        if not all(type(number) is int for number in needed):
            raise TypeError(name)
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{name} has a page whose header cannot be read, or has no checksum") from error
    return header, size


def check_footer(footer: bytes) -> None:
    """Raise ValueError unless the enumerations of a footer's columns are those of a file of ours.

    pyarrow ends the process over a compression that it does not know, as soon as it is asked which it is.
    """
    try:
        groups = _struct(footer, 0)[0][4]
        columns = [column[3] for group in groups for column in group[1]]
        known = all(c[1] in _TYPES and c[4] == _ZSTD and set(c[2]) <= set(ENCODINGS.values()) for c in columns)
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError("its footer cannot be taken apart") from error
    if not known:
        raise ValueError("its footer has a type, an encoding or a compression which FORMAT.md does not have")


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[_Header, int]:
    """The struct that begins here, and where it ends. Raises IndexError where the data end first, KeyError."""
    fields: _Header = {}
    number = 0
    while data[at]:
        delta, kind = data[at] >> 4, data[at] & 15
        if not delta:
            raise KeyError(number)
        number += delta
        if kind in (_TRUE, _FALSE):
            fields[number], at = kind == _TRUE, at + 1
        else:
            fields[number], at = _value(data, at + 1, kind, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """A value of this kind and where it ends; see `_struct`."""
    if kind in _NUMBERS:
        value, at = _varint(data, at)
        return value >> 1 ^ -(value & 1), at
    if kind == _BYTE:
        return data[at], at + 1
    if kind == _BINARY:
        size, at = _varint(data, at)
        if size > len(data) - at:
            raise IndexError(size)
        return data[at : at + size], at + size
    if kind == _LIST:
        size, kind = data[at] >> 4, data[at] & 15
        at += 1
        if size == 15:
            size, at = _varint(data, at)
        items = []
        for _ in range(size):
            item, at = _value(data, at, kind, depth)
            items.append(item)
        return items, at
    if kind != _STRUCT or depth > _MAX_DEPTH:
        raise KeyError(kind)
    return _struct(data, at, depth + 1)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in seven bits a byte, lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise KeyError(at)
