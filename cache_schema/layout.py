"""Every name inside a cache, named once. Called by all that reads or writes one; touches no file.

A name is relative to the cache and has slashes, on a disk and in an object store alike. That of a data file is a
function of its shard and its SHA-256, so a commit record cannot name anything else: no path outside the cache, no file
of another shard.
"""

from __future__ import annotations

import re

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"
SEALED = "sealed.json"
SHARDS = "shards"
CLAIMS = "claims"
ASIDE = "aside"  # what `repair` took out; no meaning

_RECORD = re.compile(r"([0-9]{5,})\.json")
_DATA = re.compile(r"([0-9]{5,})-[0-9a-f]{16}\.parquet")


def record(shard: int) -> str:
    """The commit record of a shard."""
    return f"{SHARDS}/{shard:05d}.json"


def data(file: str) -> str:
    """A data file, by its plain name."""
    return f"{SHARDS}/{file}"


def claim(shard: int) -> str:
    """The claim on a shard."""
    return f"{CLAIMS}/{shard:05d}"


def data_name(shard: int, sha256: str) -> str:
    """The plain name of a data file: `00003-0123456789abcdef.parquet`"""
    return f"{shard:05d}-{sha256[:16]}.parquet"


def shard_of_record(plain: str) -> int | None:
    """The shard whose commit record has this plain name; None where it is no such name."""
    return _number(_RECORD, plain)


def shard_of_data(plain: str) -> int | None:
    """The shard whose data file has this plain name; None where it is no such name."""
    return _number(_DATA, plain)


def _number(pattern: re.Pattern[str], plain: str) -> int | None:
    match = pattern.fullmatch(plain)
    if match is None:
        return None
    shard = int(match[1])
    return shard if match[1] == f"{shard:05d}" else None  # 000003 is nobody's name
