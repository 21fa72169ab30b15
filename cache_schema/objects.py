"""A cache in an object store, or on anything else that fsspec opens by URL: `s3://`, `gs://`, `az://`, ...

Called by `store.open_store`. An object appears whole or not at all, so a PUT is what flush and rename are on a disk. A
commit record is created by a conditional PUT (If-None-Match, or its like). Whether the answer to one was lost is found
out by reading: if our bytes are there, we won. What is read is never taken from a listing that was kept.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cache_schema import layout
from cache_schema.copies import Copies
from cache_schema.errors import StorageError
from cache_schema.store import Store

CONDITIONAL = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})  # fsspec's mode="create" is atomic there
ATTEMPTS = 3  # at a conditional PUT that neither succeeded nor was refused; fsspec's package has retried it before
_ADVICE = """next: check the URL, the credentials and the network, then run the same command again;
        every committed shard is kept and is not computed again"""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


class ObjectStore(Store):
    """The cache below a URL. What each method promises, `Store` says; what is refused is a StorageError at once.

    Credentials and endpoints are the environment's: AWS_*, GOOGLE_*, fsspec's own files.
    """

    at_once = 32

    def __init__(self, url: str, copies: Copies | None = None) -> None:
        self.location = url.rstrip("/")
        self.exclusive = url.partition("://")[0] in CONDITIONAL
        self._fs, self._root = _opened(self.location)
        self._copies = copies or Copies()
        self._sound: set[str] = set()  # copies that this process has hashed

    def exists(self) -> bool:
        return bool(self.listing())

    def prepare(self) -> None:
        """Nothing to make; but a store whose conditional PUT does not hold would let two writers commit one shard."""
        if not self.exclusive:
            return
        probe = f"{layout.CLAIMS}/probe-{os.urandom(8).hex()}"
        try:
            if not self._create(probe, b"1") or self._create(probe, b"2"):
                raise StorageError(
                    f"{self.location}: the store ignores If-None-Match, so two writers could commit the same shard\n"
                    "  next: use a store that has conditional writes (S3, GCS, Azure, a recent MinIO), or a folder"
                )
        finally:
            self.remove(probe)

    def listing(self, folder: str = "") -> dict[str, int]:
        with self._asking(f"listing {folder or 'the cache'}"):
            try:
                found = self._fs.ls(self._key(folder), detail=True, refresh=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        entries = ((item["name"].rstrip("/"), item) for item in found)
        return {
            name.rpartition("/")[2]: int(item["size"] or 0) if item["type"] == "file" else -1
            for name, item in entries
            if name.rpartition("/")[0] == self._key(folder).rstrip("/")  # not an object that stands for the folder
        }

    def has(self, name: str) -> bool:
        with self._asking(f"looking for {name}"):
            try:
                self._fs.info(self._key(name), refresh=True)
            except FileNotFoundError:
                return False
        return True

    def read(self, name: str, most: int) -> bytes:
        with self._asking(f"reading {name}"):
            size = self._fs.info(self._key(name), refresh=True)["size"] or 0
            return bytes(self._fs.cat_file(self._key(name), start=0, end=min(size, most + 1))) if size else b""

    def publish(self, name: str, data: bytes | memoryview) -> None:
        with self._asking(f"writing {name}", writing=True):
            self._make_folder_of(name)
            self._fs.pipe_file(self._key(name), bytes(data))

    def create(self, name: str, data: bytes | memoryview) -> bool:
        for attempts_left in range(ATTEMPTS)[::-1]:
            try:
                if self._create(name, bytes(data)):
                    return True
                break
            except StorageError:  # not done, or done and the answer lost, or another was at it (409)
                with suppress(FileNotFoundError):
                    return self._is(name, data)
                if not attempts_left:
                    raise
        return self._is(name, data)  # refused, perhaps because a lost first attempt of our own had succeeded

    def _is(self, name: str, data: bytes | memoryview) -> bool:
        """Whether an object holds these bytes. Raises FileNotFoundError where it is not there."""
        return self.read(name, len(data)) == data

    def _create(self, name: str, data: bytes) -> bool:
        try:
            with self._asking(f"creating {name}", writing=True):
                self._make_folder_of(name)
                self._fs.pipe_file(self._key(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError), self._asking(f"removing {name}"):
            self._fs.rm_file(self._key(name))

    def set_aside(self, name: str, to: str) -> None:
        with self._asking(f"setting {name} aside"):
            self._make_folder_of(to)
            self._fs.cp_file(self._key(name), self._key(to))
            self._fs.rm_file(self._key(name))

    def age_s(self, name: str) -> float:
        try:
            with self._asking(f"asking for the age of {name}"):
                written = self._fs.modified(self._key(name))
        except NotImplementedError:  # where one process writes at a time, a claim is one that was left behind
            return math.inf
        return float((datetime.now(UTC) - written).total_seconds())

    def tidy(self) -> None:
        for plain in self.listing(layout.CLAIMS):
            self.remove(f"{layout.CLAIMS}/{plain}")

    def open_data(self, file: str, sha256: str, size: int) -> Any:
        import pyarrow as pa

        def fetch(path: Path) -> None:
            key = self._key(layout.data(file))
            try:
                with self._asking(f"reading {file}"):
                    there = self._fs.info(key, refresh=True)["size"]
                if there != size:  # told before it fills the disk
                    raise ValueError(f"it has {there} bytes, its commit record says {size}")
                with self._asking(f"reading {file}"):
                    self._fs.get_file(key, str(path))
            except FileNotFoundError:
                raise ValueError("there is no such file") from None
            found = _sha256(path)
            if found != sha256:
                raise ValueError(f"its SHA-256 is {found}, its commit record says {sha256}")
            self._sound.add(file)

        try:
            for _ in range(100):
                with suppress(FileNotFoundError):  # removed, to make room, before we could open it
                    path = self._copies.get(file, fetch)
                    if file in self._sound or _sha256(path) == sha256:
                        self._sound.add(file)
                        return pa.OSFile(str(path))
                    path.unlink()  # an old copy that a disk has altered: fetch it again
            raise OSError(errno.ENOSPC, "copies are removed faster than they can be read")
        except OSError as error:
            elsewhere = "--set runtime.copies=FOLDER" if self._copies.most_bytes else "TMPDIR=FOLDER"
            raise StorageError(
                f"copying {file} to {self._copies.folder} failed: {error.strerror or error}\n"
                f"  next: make room there, or choose another folder: {elsewhere}"
            ) from error

    def path(self, name: str) -> str:
        return f"{self.location}/{name}"

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _make_folder_of(self, name: str) -> None:
        """Where there are such things: not in a store that has conditional writes."""
        if not self.exclusive:
            self._fs.makedirs(self._key(name).rpartition("/")[0], exist_ok=True)

    def advice(self, error: OSError) -> str:
        return _ADVICE

    @contextmanager
    def _asking(self, doing: str, writing: bool = False) -> Iterator[None]:
        """Whatever a file system's library raises, as a StorageError: what cannot be reached is not damaged.

        FileExistsError passes, and FileNotFoundError where something is read: callers know why.
        """
        try:
            yield
        except (FileExistsError, MemoryError, NotImplementedError, StorageError):
            raise
        except Exception as error:  # botocore's, aiohttp's and google's are no OSErrors
            if isinstance(error, FileNotFoundError) and not writing:
                raise
            reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise StorageError(f"{doing} failed: {reason} ({self.location})\n  {_ADVICE}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, without a memory of listings, and the path inside it."""
    protocol = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        found, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(protocol)
        install = f"pip install 'logitbank[{extra}]'" if extra else f"install fsspec's package for {protocol}://"
        raise StorageError(f"{url} cannot be opened: {error}\n  next: {install}") from None
    return found, str(root).rstrip("/")
