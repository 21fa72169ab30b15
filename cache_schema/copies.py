"""Copies of data files that lie elsewhere: a folder of this machine with a bound on its size.

Called by `objects`. A copy is named as its data file is, by hash, so caches and processes share the folder. What is
used least recently is removed first; a process that has a removed copy open goes on reading it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MOST_BYTES = 64 * 10**9
FOLDER = "~/.cache/logitbank"


class Copies:
    """The copies in `folder`, of `most_bytes` together; the newest one stays, however large it is."""

    def __init__(self, folder: str | os.PathLike[str] = FOLDER, most_bytes: int = MOST_BYTES) -> None:
        self.folder, self.most_bytes = Path(folder).expanduser(), most_bytes

    def get(self, name: str, fetch: Callable[[Path], None]) -> Path:
        """The copy with this name. `fetch` writes one that is not there into the path it is given, once for all the
        processes of this machine that wait for it; what it raises passes.
        """
        path = self.folder / name
        with suppress(FileNotFoundError):
            os.utime(path)  # used now
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(name) as part:
            if not path.exists():
                fetch(part)
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                part.rename(path)
        self._evict(path)
        return path

    @contextmanager
    def _locked(self, name: str) -> Iterator[Path]:
        """A temporary file of ours alone, beside the copy: others who want the same one wait here."""
        part = self.folder / f".{name}.part"
        fd = -1
        while fd < 0 or not _is_at(fd, part):  # renamed or removed by the one who had it before
            if fd >= 0:
                os.close(fd)
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            yield part
        finally:
            if _is_at(fd, part):
                part.unlink()
            os.close(fd)

    def _evict(self, newest: Path) -> None:
        found = []
        for path in self.folder.iterdir():
            if path.name.startswith("."):
                _drop_if_left(path)
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        left = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if left <= self.most_bytes:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                left -= size


def _drop_if_left(part: Path) -> None:
    """Remove what a killed process was fetching; one that is alive has it locked."""
    try:
        fd = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(fd, part):
            part.unlink()
    except BlockingIOError:
        pass
    finally:
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
