"""A cache in a folder of this machine, or of a disk that machines share: the plain `Store`.

Called by `store.open_store`. What is written is flushed to the disk before anything relies on it (`atomic`).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from cache_schema import atomic, layout
from cache_schema.errors import NotACache
from cache_schema.store import Store


class Folder(Store):
    """The cache at `root`. What each method promises, `Store` says."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.location, self.exclusive = str(self.root), True

    def exists(self) -> bool:
        return self.root.is_dir()

    def prepare(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            blocker = next(path for path in (self.root, *self.root.parents) if os.path.lexists(path))
            raise NotACache(
                f"the cache cannot be made at {self.root}: {blocker} is a file (or a broken link); expected a folder\n"
                "  next: remove that file, or choose another folder: --set cache.dir=FOLDER"
            ) from None

    def listing(self, folder: str = "") -> dict[str, int]:
        found = {}
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if not atomic.is_temporary(entry.name):
                        found[entry.name] = _size(entry)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found.pop("lost+found", None)  # of a fresh file system
        return found

    def has(self, name: str) -> bool:
        return (self.root / name).exists()

    def read(self, name: str, most: int) -> bytes:
        """Never hangs: a pipe, a device or a folder in the way is an OSError."""
        fd = os.open(self.root / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is not a plain file")
            data = bytearray()  # in parts: to ask for `most` at once would take that much memory first
            while part := os.read(fd, min(1 << 20, most + 1 - len(data))):
                data += part
            return bytes(data)
        finally:
            os.close(fd)

    def publish(self, name: str, data: bytes | memoryview) -> None:
        atomic.publish(self._in_its_folder(name), data)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        return atomic.create(self._in_its_folder(name), data)

    def _in_its_folder(self, name: str) -> Path:
        """The path of a name whose folder is there, for good."""
        path = self.root / name
        if not path.parent.is_dir():
            path.parent.mkdir(exist_ok=True)
            atomic.flush(self.root)
        return path

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def set_aside(self, name: str, to: str) -> None:
        path = self._in_its_folder(to)
        (self.root / name).rename(path)
        atomic.flush(path.parent)
        atomic.flush((self.root / name).parent)

    def age_s(self, name: str) -> float:
        return time.time() - (self.root / name).stat().st_mtime

    def tidy(self) -> None:
        for folder in (self.root, self.root / layout.SHARDS):
            atomic.remove_temporaries(folder)
        shutil.rmtree(self.root / layout.CLAIMS, ignore_errors=True)

    def open_data(self, file: str, sha256: str, size: int) -> Any:
        import pyarrow as pa

        path = self.root / layout.data(file)
        if not path.is_file():
            raise ValueError("it is not a plain file" if path.exists() else "there is no such file")
        return pa.OSFile(str(path))

    def path(self, name: str) -> str:
        return str(self.root / name)

    def advice(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            there = next(path for path in (self.root, *self.root.parents) if path.exists())
            free = shutil.disk_usage(there).free
            return (
                f"free there: {free / 1e6:.1f} MB (a quota or a file size limit may be lower)\n"
                "  next: make room, or choose another folder (--set cache.dir=FOLDER), and run the same command\n"
                "        again; every committed shard is kept and is not computed again"
            )
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            return "next: use a file system with hard links (ext4, xfs, NFS, ...): --set cache.dir=FOLDER"
        return "next: check the folder's permissions and the disk, or choose another: --set cache.dir=FOLDER"


def _size(entry: os.DirEntry[str]) -> int:
    try:
        found = entry.stat()
    except OSError:  # a link to nothing, or in a circle
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1
