"""The JSON documents of a cache: canonical bytes, a checksum in each document, strict reading.

Called by `manifest` and `record`. Every document is an object with `format`, `schema_version`, its own fields and
`checksum`: the SHA-256 of the canonical JSON of everything else in it. A flipped byte therefore either changes no
value (white space) or is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any, TypeVar

from cache_schema.errors import DamagedDocument, StorageError, UnknownVersion, shown
from cache_schema.schema import SCHEMA_VERSION
from cache_schema.store import UNREACHABLE, Store

MAX_DEPTH = 64  # of lists and objects in each other; a stranger's 900 would end in a RecursionError somewhere
MAX_PARSED_BYTES = 1 << 30  # that a document's values may take in memory, by the estimate of `_parsed_bytes`
MAX_COUNT = 2**53  # of anything that is counted

T = TypeVar("T")
_MISSING: Any = object()
_SHA256 = re.compile("[0-9a-f]{64}").fullmatch


def canonical(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no white space, UTF-8, floats as their shortest repr.

    Raises ValueError, naming the place, for anything that has no stable identity: NaN and infinities, tuples, sets,
    numpy scalars, paths, enums, keys that are not strings, text that is not Unicode.
    """
    _check_stable(value, "")
    return _compact(value)


def _compact(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _canonical_of_parsed(value: Any) -> bytes:
    """`canonical` of what `json.loads` gave, at half the cost: of what has no identity, it can hold only the things
    that encoding refuses by itself (NaN, infinities, lone surrogates). Their place is looked for once one is there.
    """
    try:
        return _compact(value)
    except ValueError:
        return canonical(value)


def _check_stable(value: Any, place: str) -> None:
    kind = type(value)  # exact: a bool or an enum is an int to isinstance, a numpy float64 is a float
    here = place or "the value"
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise ValueError(f"{here}: key {key!r} is a {type(key).__name__}; expected a string")
            _check_stable(key, f"{place} (key)")
            _check_stable(item, f"{place}.{key}" if place else key)
    elif kind is list:
        for i, item in enumerate(value):
            _check_stable(item, f"{place}[{i}]")
    elif kind is float:
        if not math.isfinite(value):
            raise ValueError(f"{here}: {value} has no stable identity; expected a finite number")
    elif kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{here}: {shown(value)} is not valid Unicode (a lone surrogate)") from None
    elif kind not in (int, bool, type(None)):
        raise ValueError(
            f"{here}: {shown(value)} is a {kind.__name__}, which has no stable identity; expected plain JSON "
            "(dict, list, str, int, float, bool, None)"
        )


def dump(kind: str, fields: dict[str, Any]) -> bytes:
    """The bytes of a document: indented for people, its checksum over the canonical form of the rest."""
    body = {"format": f"logitbank.{kind}", "schema_version": SCHEMA_VERSION, **fields}
    body["checksum"] = hashlib.sha256(canonical(body)).hexdigest()
    return (json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def load(store: Store, name: str, kind: str, most: int) -> Fields:
    """Read a document written by `dump`, of `most` bytes at most.

    Raises FileNotFoundError when there is none, DamagedDocument when it is not what was written, UnknownVersion when
    another version of the format wrote it.
    """
    body = parse(store, name, read(store, name, most))
    if not isinstance(body, dict):
        raise DamagedDocument(store, name, f"found a JSON {type(body).__name__}, expected an object")
    if body.get("format") != f"logitbank.{kind}":
        found = str(body.get("format"))  # only ours is told: a link may lead to a file that is nobody's business
        told = shown(found) if found.startswith("logitbank.") else "not one of ours"
        raise DamagedDocument(store, name, f"its format is {told}, expected 'logitbank.{kind}'")
    version = body.get("schema_version")
    if type(version) is int and version != SCHEMA_VERSION:
        raise UnknownVersion(
            f"{store.path(name)} was written in schema version {version}; this reader knows version {SCHEMA_VERSION}\n"
            "  next: use the release of logitbank that wrote the cache, or make the cache again"
        )
    checksum = body.pop("checksum", None)
    try:
        actual = hashlib.sha256(_canonical_of_parsed(body)).hexdigest()
    except MemoryError:
        raise _too_large(store, name) from None
    except ValueError as error:  # NaN and the like: Python's parser takes them, JSON does not
        raise DamagedDocument(store, name, str(error)) from None
    if checksum != actual:
        raise DamagedDocument(store, name, f"its content has checksum {actual}, but it says {shown(checksum)}")
    del body["format"], body["schema_version"]
    return Fields(body, store, name)


def parse(store: Store, name: str, data: bytes) -> Any:
    """JSON of a file, whatever is wrong with it a DamagedDocument naming the file."""
    if _parsed_bytes(data) > MAX_PARSED_BYTES:
        raise _too_large(store, name)
    try:
        value = json.loads(data.decode("utf-8"))
    except MemoryError:
        raise _no_memory(store, name) from None
    except (ValueError, RecursionError) as error:
        raise DamagedDocument(store, name, f"it is not JSON ({error})") from None
    level = [value] if type(value) in (dict, list) else []
    for _ in range(MAX_DEPTH):
        parts = (part.values() if type(part) is dict else part for part in level)
        level = [item for part in parts for item in part if type(item) in (dict, list)]
    if level:
        raise DamagedDocument(store, name, f"it has lists or objects more than {MAX_DEPTH} deep in each other")
    return value


def _parsed_bytes(data: bytes) -> int:
    """No less than what the values of this JSON text take in memory: 3 bytes of it, `[],`, can be 64."""
    text = len(data) * (2 if data.isascii() else 8)
    return text + 304 * data.count(b"{") + 128 * data.count(b"[") + 72 * data.count(b",") + 16 * data.count(b":")


def _too_large(store: Store, name: str) -> DamagedDocument:
    return DamagedDocument(store, name, f"its values take more than the {MAX_PARSED_BYTES >> 20} MiB that they may")


def _no_memory(store: Store, name: str) -> StorageError:  # no damage: `repair` must not set it aside
    what = f"reading {store.path(name)} takes more memory than there is"
    return StorageError(f"{what}\n  next: make memory free, or use a larger machine")


def fits(data: bytes, most: int) -> bool:
    """Whether a document of these bytes would be read again."""
    return len(data) <= most and _parsed_bytes(data) <= MAX_PARSED_BYTES


def read(store: Store, name: str, most: int) -> bytes:
    """The bytes of a small file. Raises FileNotFoundError or NotADirectoryError when there is nothing.

    Anything else in the way (a folder, a pipe, a loop of links, more than `most` bytes) is a DamagedDocument, never a
    hang; what cannot be read just now is a StorageError.
    """
    try:
        data = store.read(name, most)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except MemoryError:
        raise _no_memory(store, name) from None
    except OSError as error:
        if error.errno in UNREACHABLE:
            raise store.failed(f"reading {name}", error) from error
        raise DamagedDocument(store, name, f"it cannot be read: {error.strerror or error}") from None
    if len(data) > most:
        raise DamagedDocument(store, name, f"it has more than the {most} bytes that it can have")
    return data


class Fields:
    """The fields of an object in a document, taken one by one; what is missing, mistyped or left over is an error.

    `take(name, int)` accepts exactly that type: JSON's 1 is not a float here and true is not an int.
    """

    def __init__(self, values: Any, store: Store, file: str, place: str = "") -> None:
        self._store, self._file = store, file
        self._place = place
        if type(values) is not dict:
            raise self.damaged(f"found {shown(values)}, expected an object")
        self._left: dict[str, Any] = dict(values)

    def damaged(self, what: str) -> DamagedDocument:
        """The error to raise about this object."""
        return DamagedDocument(self._store, self._file, f"{self._place}: {what}" if self._place else what)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def inner(self, values: Any, place: str) -> Fields:
        """An object inside this one."""
        return Fields(values, self._store, self._file, f"{self._place}: {place}" if self._place else place)

    def take(self, name: str, kind: type[T]) -> T:
        """The value of a field, of exactly this type."""
        value = self._left.pop(name, _MISSING)
        if value is _MISSING:
            raise self.damaged(f"the field {name!r} is missing")
        if type(value) is not kind:
            raise self.damaged(f"{name} is {shown(value)}, expected a {kind.__name__}")
        return value

    def take_count(self, name: str) -> int:
        """An integer that is not negative, and no larger than anything there is."""
        value = self.take(name, int)
        if not 0 <= value <= MAX_COUNT:
            raise self.damaged(f"{name} is {shown(value)}, expected 0 to 2**53")
        return value

    def take_sha256(self, name: str) -> str:
        """A SHA-256 in hexadecimal."""
        value = self.take(name, str)
        if not _SHA256(value):
            raise self.damaged(f"{name} is {shown(value)}, expected 64 hexadecimal digits")
        return value

    def expect(self, name: str, expected: str | int) -> None:
        """Take a field that can have one value only."""
        value = self.take(name, type(expected))
        if value != expected:
            raise self.damaged(f"{name} is {shown(value)}, expected {expected!r}")

    def done(self) -> None:
        """Raise when a field was not taken: nothing in a document is ignored."""
        if self._left:
            raise self.damaged(f"unknown field {next(iter(self._left))!r}")


def is_sha256(value: object) -> bool:
    """Whether this is a SHA-256 in lower-case hexadecimal."""
    return type(value) is str and _SHA256(value) is not None
