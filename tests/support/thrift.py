"""Thrift's compact protocol, both ways and without a schema: to take a footer or page header apart and lie in it.

    footer, end = loads(data)          # a struct is {field id: Field}; a list is a Field of kind LIST with an item kind
    footer[3].value = 2**60            # num_rows
    data = dumps(footer)

A struct that is loaded and dumped gives the same bytes.
"""

from dataclasses import dataclass
from typing import Any

TRUE, FALSE, I8, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)


@dataclass
class Field:
    """A value with its kind; `items`: the kind of what a list holds. Lists of booleans and maps are not known here."""

    kind: int
    value: Any
    items: int = 0


Struct = dict[int, Field]


def loads(data: bytes, at: int = 0) -> tuple[Struct, int]:
    """The struct that begins at this place, and the place behind it."""
    struct: Struct = {}
    last = 0
    while data[at]:
        delta, kind = data[at] >> 4, data[at] & 15
        at += 1
        if delta:
            last += delta
        else:
            last, at = _zigzag(data, at)
        struct[last], at = _load(data, at, kind)
    return struct, at + 1


def dumps(struct: Struct) -> bytes:
    """The bytes of a struct."""
    out, last = bytearray(), 0
    for number, field in struct.items():
        delta = number - last
        out += bytes([delta << 4 | field.kind]) if 0 < delta < 16 else bytes([field.kind]) + zigzag(number)
        out += _dump(field)
        last = number
    return bytes(out) + b"\0"


def varint(value: int) -> bytes:
    """An unsigned number, seven bits a byte, lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def zigzag(value: int) -> bytes:
    """A signed number."""
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 128:
            return value, at


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _load(data: bytes, at: int, kind: int) -> tuple[Field, int]:
    items = 0
    value: Any
    if kind in (TRUE, FALSE):
        value = kind == TRUE
    elif kind == I8:
        value, at = data[at], at + 1
    elif kind in (I16, I32, I64):
        value, at = _zigzag(data, at)
    elif kind == DOUBLE:
        value, at = data[at : at + 8], at + 8
    elif kind == BINARY:
        size, at = _varint(data, at)
        value, at = data[at : at + size], at + size
    elif kind in (LIST, SET):
        size, items = data[at] >> 4, data[at] & 15
        at += 1
        if size == 15:
            size, at = _varint(data, at)
        value = []
        for _ in range(size):
            item, at = _load(data, at, items)
            value.append(item.value)
    else:
        assert kind == STRUCT, kind
        value, at = loads(data, at)
    return Field(kind, value, items), at


def _dump(field: Field) -> bytes:
    kind, value = field.kind, field.value
    if kind in (TRUE, FALSE):
        return b""
    if kind == I8:
        return bytes([value])
    if kind in (I16, I32, I64):
        return zigzag(value)
    if kind == DOUBLE:
        return bytes(value)
    if kind == BINARY:
        return varint(len(value)) + value
    if kind in (LIST, SET):
        head = bytes([min(len(value), 15) << 4 | field.items]) + (varint(len(value)) if len(value) >= 15 else b"")
        return head + b"".join(_dump(Field(field.items, item)) for item in value)
    assert kind == STRUCT, kind
    return dumps(value)
