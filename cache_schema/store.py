"""Where a cache lies: what its reader and writer ask of a place, and which place a location means.

    store = open_store("caches/gsm8k")                 # a folder: `Folder`
    store = open_store("s3://bucket/caches/gsm8k")     # any URL that fsspec knows: `ObjectStore`

Called by everything that touches a file of a cache. Names are those of `layout`. Where the place refuses, methods raise
OSError, or StorageError at once; FileNotFoundError means that nothing has the name.
"""

from __future__ import annotations

import errno
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cache_schema.errors import StorageError

if TYPE_CHECKING:
    from cache_schema.copies import Copies

# What a place says when it cannot be asked just now: no reason to think that anything in it is damaged.
UNREACHABLE = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN),
        *(errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
        *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENOTCONN, errno.EREMOTEIO),
    }
)
T = TypeVar("T")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")


class Store(ABC):
    """The place of one cache. `location` is what a user types to mean it."""

    location: str
    exclusive: bool  # whether `create` holds against others who create at the same moment
    at_once = 1  # requests in flight that pay; above one where each takes long

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is anything here at all."""

    @abstractmethod
    def prepare(self) -> None:
        """Make a place for the files of a cache. Raises NotACache when something else is in the way."""

    @abstractmethod
    def listing(self, folder: str = "") -> dict[str, int]:
        """Plain name -> bytes, of everything directly in a folder, in one request; -1 for what is no plain file.

        Empty where there is no such folder.
        """

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether something has this name."""

    @abstractmethod
    def read(self, name: str, most: int) -> bytes:
        """A small file, whole; of one that is larger, its first `most + 1` bytes."""

    @abstractmethod
    def publish(self, name: str, data: bytes | memoryview) -> None:
        """Write a file, replacing what was there: all of it or nothing, and for good once this returns."""

    @abstractmethod
    def create(self, name: str, data: bytes | memoryview) -> bool:
        """The same, only if nothing has its name; whether we did. Of two who try, one succeeds."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def set_aside(self, name: str, to: str) -> None:
        """Give a file another name."""

    @abstractmethod
    def age_s(self, name: str) -> float:
        """Seconds since a file was written, by this machine's clock."""

    @abstractmethod
    def tidy(self) -> None:
        """Remove what crashed writers left, claims included. A slow writer that is alive sees FileNotFoundError."""

    @abstractmethod
    def open_data(self, file: str, sha256: str, size: int) -> Any:
        """A data file, by its plain name, as an open `pyarrow.NativeFile` of this machine.

        sha256, size: what they should be; a store that keeps copies checks them. Raises ValueError where it is no
        plain file, or not the one meant.
        """

    @abstractmethod
    def path(self, name: str) -> str:
        """A name for messages: what the user would have to look at."""

    @abstractmethod
    def advice(self, error: OSError) -> str:
        """What to do about an error of this place: lines for a StorageError."""

    def map(self, call: Callable[[int], T], items: Iterable[int]) -> list[T]:
        """`call` of every item, in order, `at_once` of them at a time. What one raises is raised."""
        if self.at_once == 1:
            return [call(item) for item in items]
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(call, items))

    def failed(self, doing: str, error: OSError) -> StorageError:
        """What to raise when the place refuses."""
        reason = error.strerror or str(error) or type(error).__name__
        return StorageError(f"{doing} failed: {reason} ({self.location})\n  {self.advice(error)}")

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turn an OSError into a StorageError that says what to do. FileNotFoundError passes: callers know why."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self.failed(doing, error) from error


def open_store(location: str | os.PathLike[str], copies: Copies | None = None) -> Store:
    """The store that a location means. Touches nothing yet.

    copies: where data files of an object store are kept while they are read; the default place unless given.
    Raises StorageError for a URL that cannot be served, with what to install.
    """
    if isinstance(location, str) and location.startswith("file://"):
        location = location.removeprefix("file://")
    if isinstance(location, str) and _URL.match(location):
        from cache_schema.objects import ObjectStore

        return ObjectStore(location, copies)
    from cache_schema.folder import Folder

    return Folder(Path(location))
