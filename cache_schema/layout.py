"""Every path inside a cache, named once. Called by writer, reader, claims and verify; touches no file.

The name of a data file is a function of its shard and its SHA-256, so a commit record cannot name anything else: no
path outside the folder, no file of another shard.
"""

from __future__ import annotations

import re
from pathlib import Path

_RECORD = re.compile(r"([0-9]{5,})\.json")
_DATA = re.compile(r"([0-9]{5,})-[0-9a-f]{16}\.parquet")


class Layout:
    """The paths of the cache at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = root / "manifest.json"
        self.vocabulary = root / "vocabulary.json"
        self.sealed = root / "sealed.json"
        self.shards = root / "shards"
        self.claims = root / "claims"

    def record(self, shard: int) -> Path:
        """The commit record of a shard."""
        return self.shards / f"{shard:05d}.json"

    def claim(self, shard: int) -> Path:
        """The claim on a shard."""
        return self.claims / f"{shard:05d}"

    def recorded(self) -> list[int]:
        """The shards that have a commit record, in order; one listing of the folder."""
        return sorted(shard for name in _names(self.shards) if (shard := _number(_RECORD, name)) is not None)

    def data_files(self) -> list[tuple[int, Path]]:
        """Every data file with its shard number, committed or not."""
        found = ((_number(_DATA, name), self.shards / name) for name in _names(self.shards))
        return sorted((shard, path) for shard, path in found if shard is not None)


def data_name(shard: int, sha256: str) -> str:
    """`00003-0123456789abcdef.parquet`"""
    return f"{shard:05d}-{sha256[:16]}.parquet"


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _number(pattern: re.Pattern[str], name: str) -> int | None:
    match = pattern.fullmatch(name)
    if match is None:
        return None
    shard = int(match[1])
    return shard if match[1] == f"{shard:05d}" else None  # 000003 is nobody's name
