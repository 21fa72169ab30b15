"""Durable writes: a file appears whole, under its name, on the disk, or it does not appear at all.

Called by `folder`. `publish` is temporary name, flush, rename, flush the folder. `create` does the same with `link`
for the rename, which fails when the name exists: of two processes one wins, on local disks and on NFS alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = ".tmp-"


def publish(path: Path, data: bytes | memoryview) -> None:
    """Write a file under its final name, replacing what was there. Raises OSError; nothing is left behind."""
    with _temporary(path, data) as temporary:
        temporary.rename(path)
        flush(path.parent)


def create(path: Path, data: bytes | memoryview) -> bool:
    """Write a file only if nothing has its name; whether we did. Raises OSError; nothing is left behind."""
    with _temporary(path, data) as temporary:
        created = True
        try:
            os.link(temporary, path)
        except FileExistsError:
            created = False
            with suppress(FileNotFoundError):  # the winner sealed the cache and swept our temporary file
                # NFS may repeat a request that had succeeded: the name is then taken, by ourselves.
                created = temporary.samefile(path)
        except FileNotFoundError:  # our temporary file was swept, by a process that found all work done
            if not path.exists():
                raise
            created = False
        flush(path.parent)  # by the loser too: what it now relies on must last
        return created


@contextmanager
def _temporary(path: Path, data: bytes | memoryview) -> Iterator[Path]:
    temporary = path.parent / f"{_TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}-{path.name}"
    try:
        _write(temporary, data)
        yield temporary
    finally:
        with suppress(FileNotFoundError):  # renamed, or swept by whoever sealed the cache
            temporary.unlink()


def _write(path: Path, data: bytes | memoryview) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(fd, left) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder: a rename or a link lasts only after this."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_temporary(plain: str) -> bool:
    """Whether a plain name is that of a file being written."""
    return plain.startswith(_TEMPORARY)


def remove_temporaries(folder: Path) -> None:
    """Remove what crashed writers left in a folder. A slow writer that is still alive sees FileNotFoundError."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink(missing_ok=True)
