"""What can go wrong with a cache. Called by every module here; caught by the command lines.

Every `CacheError` is something its reader can act on: it says what is wrong, where, what was found and what was
expected, and what to type next. Command lines print it without a traceback and exit with `exit_code`. A row that a
caller built wrongly is that caller's bug, not a user's mistake, and is an `InvalidRow`, a plain `ValueError`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache_schema.store import Store


class CacheError(Exception):
    """The root of the tree; `except CacheError` is all a command line needs."""

    exit_code = 2


class InvalidManifest(CacheError):
    """A field of the plan is out of range or of the wrong type."""


class NotACache(CacheError):
    """There is no cache at this path: nothing, a file, or a folder with other things in it."""


class DamagedDocument(CacheError):
    """A manifest, commit record, seal or vocabulary that cannot be read or is not what was written.

    Attributes: `file`, its name inside the cache, `what`.
    """

    def __init__(self, store: Store, file: str, what: str) -> None:
        self.file, self.what = file, what
        if file == "manifest.json":
            remedy = "restore it from a copy, or make the cache again in another folder"
        else:
            remedy = f"python -m cache_schema repair {shlex.quote(store.location)}   sets it aside; then run stage 1"
        super().__init__(f"{store.path(file)} is damaged: {what}\n  next: {remedy}")


class UnknownVersion(CacheError):
    """The cache was written by another version of the format."""


class UnknownExample(CacheError):
    """No example with this number or id."""


class StorageError(CacheError):
    """The file system refused: no space, no permission, no hard links, a dying disk."""


class CorruptShard(CacheError):
    """A data file is missing, damaged, or does not belong to this cache.

    Attributes: `shard` its number, `file` its name inside the cache, `what`.
    """

    def __init__(self, shard: int, store: Store, file: str, what: str) -> None:
        self.shard, self.file, self.what = shard, file, what
        super().__init__(
            f"shard {shard} of the cache is not usable: {what}\n"
            f"  file: {store.path(file)}\n"
            f"  next: python -m cache_schema repair {shlex.quote(store.location)}   sets aside every bad shard; then\n"
            "        run stage 1: it makes those again, and nothing else"
        )


class IncompleteCache(CacheError):
    """The cache has no seal. Attribute: `missing`, the shards without a commit record."""

    exit_code = 3

    def __init__(self, location: str, shards: int, missing: Sequence[int], command: str) -> None:
        self.missing = tuple(missing)
        if missing:
            named = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            state = f"{len(missing)} of {shards} shards are missing ({named})"
        else:
            state = f"all {shards} shards are committed, but the seal was never written"
        super().__init__(
            f"the cache at {location} is not complete: {state}\n  next: {command}   (it resumes where it stopped)"
        )


@dataclass(frozen=True)
class Difference:
    """One field, by its dotted name, that the cache and the caller disagree on. Values are shown as JSON."""

    field: str
    cached: str
    asked: str


class _Mismatch(CacheError):
    def __init__(self, headline: str, differences: Sequence[Difference], ways_out: str) -> None:
        self.differences = tuple(differences)
        width = max((len(d.field) for d in self.differences), default=0)
        lines = [f"  {d.field:<{width}}  cache: {d.cached}   asked for: {d.asked}" for d in self.differences]
        super().__init__("\n".join([headline, *lines, ways_out]))


class FingerprintMismatch(_Mismatch):
    """The cache holds numbers that mean something else. Attribute: `differences`."""

    def __init__(self, location: str, cached: str, asked: str, differences: Sequence[Difference]) -> None:
        super().__init__(
            f"the cache at {location} was made for another identity "
            f"(fingerprint {cached[:12]} in the cache, {asked[:12]} asked for). These fields differ:",
            differences,
            "Two ways out: set these fields back to what the cache has, and use it;\n"
            "or make another cache beside it: --set cache.dir=ANOTHER_FOLDER",
        )


class PlanMismatch(_Mismatch):
    """Same identity, but the shards were planned otherwise. Attribute: `differences`."""

    def __init__(self, location: str, differences: Sequence[Difference]) -> None:
        super().__init__(
            f"the cache at {location} has the same identity but was planned otherwise. These fields differ:",
            differences,
            "Two ways out: set these fields back to what the cache has, and go on with it;\n"
            "or make another cache beside it: --set cache.dir=ANOTHER_FOLDER",
        )


class InvalidRow(ValueError):
    """A row breaks an invariant of the format: a bug in whoever built it."""


def shown(value: Any, limit: int = 120) -> str:
    """A value for an error message: its repr, cut in the middle when it is long (chat templates are)."""
    text = repr(value)
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
