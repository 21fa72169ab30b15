"""Reading a cache: `CacheReader`, called by stages 2 and 3 and by `show`.

    reader = CacheReader.open(folder, expect=identity)
    rows = reader.read([5, 0, 977])                    # decoded, in this order
    for text in reader.rows(TEXT): ...                 # the text columns alone; see `Columns`

Opening a sealed cache reads its manifest and `sealed.json`, whatever its size. Nothing is believed unchecked: footers
by SHA-256, pages by checksum, documents by theirs; damage is a CorruptShard, never a wrong number.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, overload

from cache_schema.errors import IncompleteCache
from cache_schema.manifest import Manifest, load_vocabulary
from cache_schema.record import CommitRecord, Seal, Totals, recorded_shards
from cache_schema.schema import ALL, AlignmentRow, CacheRow, Columns, TextRow
from cache_schema.shard import ShardFile
from cache_schema.store import Store, open_store
from cache_schema.table import RowGroup

if TYPE_CHECKING:
    from cache_schema.copies import Copies

MEMORY_BYTES = 512 << 20
MAX_FILES = 2048  # whose footers are kept, about 50 kB each; reading one again takes about a millisecond


class CacheReader:
    """An open cache. Rows are numbered through the shards in order, quarantined examples left out.

    Attributes: `location`, `manifest`, `records` (of the committed shards, in order), `sealed`.
    """

    def __init__(
        self, store: Store, manifest: Manifest, records: Sequence[CommitRecord], sealed: bool, memory_bytes: int
    ) -> None:
        self.location, self.manifest, self.records, self.sealed = store.location, manifest, tuple(records), sealed
        self._store = store
        self._ends = list(accumulate(record.rows for record in records))  # of each record, in row numbers
        self._files: OrderedDict[int, tuple[ShardFile, list[int]]] = OrderedDict()  # with the ends of its row groups
        self._groups: OrderedDict[tuple[int, int, Columns], RowGroup] = OrderedDict()  # least recently used first
        self._held_bytes = 0  # of all `_groups`, counted on: to add them up anew at every read is quadratic
        self._memory_bytes = memory_bytes

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        expect: dict[str, Any] | None = None,
        require_sealed: bool = True,
        *,
        memory_bytes: int = MEMORY_BYTES,
        copies: Copies | None = None,
    ) -> CacheReader:
        """Open a cache for reading.

        location: a folder, or a URL that fsspec knows.
        expect: the identity that the numbers must have; FingerprintMismatch lists the fields that differ.
        require_sealed: raise IncompleteCache unless every shard is there; else read those that are committed.
        copies: where data files of an object store are kept while they are read; the default place unless given.
        memory_bytes: how much decoded Parquet to keep, least recently used out first; the last group always stays.
        Raises NotACache, DamagedDocument, UnknownVersion, InvalidManifest as well.
        """
        store = open_store(location, copies)
        manifest = Manifest.load(store)
        if expect is not None:
            manifest.expect_identity(store, expect)
        try:
            return cls(store, manifest, Seal.load(store, manifest).records, True, memory_bytes)
        except FileNotFoundError:
            with store.errors("listing the cache"):
                recorded = recorded_shards(store)
        if require_sealed:
            missing = sorted(set(range(manifest.shards)) - set(recorded))
            raise IncompleteCache(store.location, manifest.shards, missing, manifest.stage1_command(store.location))
        records = store.map(lambda shard: CommitRecord.load_listed(store, shard, manifest), recorded)
        return cls(store, manifest, records, False, memory_bytes)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def totals(self) -> Totals:
        """The ledgers of examples and positions, from the commit records."""
        return Totals.of(self.records, self.manifest)

    def vocabulary(self) -> list[str | None]:
        """Token id to token text, for people; nothing needs it to decode. Raises DamagedDocument."""
        return load_vocabulary(self._store, self.manifest)

    @overload
    def read(self, indices: Sequence[int], columns: Literal[Columns.ALL, Columns.RANKED] = ...) -> list[CacheRow]: ...
    @overload
    def read(self, indices: Sequence[int], columns: Literal[Columns.ALIGNMENT]) -> list[AlignmentRow]: ...
    @overload
    def read(self, indices: Sequence[int], columns: Columns) -> list[TextRow]: ...
    def read(self, indices: Sequence[int], columns: Columns = ALL) -> list[Any]:
        """The rows with these numbers, in the order asked; row t of each predicts answer token t.

        `columns` decides what a row holds; nothing else is read. Each row has arrays of its own. Rows that lie together
        are read together, whatever the order. Raises IndexError for a number outside 0 to len - 1, CorruptShard.
        """
        found: dict[int, TextRow] = {}
        for index in sorted(set(indices)):
            which, group, row = self._locate(index)
            rows = self._group(which, group, columns)
            with self._file(which)[0].reading():
                found[index] = rows.row(row)
        return [found[index] for index in indices]

    @overload
    def rows(self, columns: Literal[Columns.ALL, Columns.RANKED] = ...) -> Iterator[CacheRow]: ...
    @overload
    def rows(self, columns: Literal[Columns.ALIGNMENT]) -> Iterator[AlignmentRow]: ...
    @overload
    def rows(self, columns: Columns) -> Iterator[TextRow]: ...
    def rows(self, columns: Columns = ALL) -> Iterator[Any]:
        """Every row in order, one at a time."""
        return (row for i in range(len(self)) for row in self.read([i], columns))

    def _locate(self, index: int) -> tuple[int, int, int]:
        """Record, row group and row within the group of a row number."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index}; the cache at {self.location} has rows 0 to {len(self) - 1}")
        which = bisect_right(self._ends, index)
        row = index - (self._ends[which] - self.records[which].rows)
        ends = self._file(which)[1]
        group = bisect_right(ends, row)
        return which, group, row - (ends[group - 1] if group else 0)

    def _file(self, which: int) -> tuple[ShardFile, list[int]]:
        if which in self._files:
            self._files.move_to_end(which)
            return self._files[which]
        record = self.records[which]
        file = ShardFile(self._store, record, self.manifest)
        self._files[which] = file, list(accumulate(file.group_rows))
        if len(self._files) > MAX_FILES:
            self._files.popitem(last=False)
        return self._files[which]

    def _group(self, which: int, group: int, columns: Columns) -> RowGroup:
        key = (which, group, columns)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        rows = self._groups[key] = self._file(which)[0].group(group, columns)
        self._held_bytes += rows.nbytes
        while len(self._groups) > 1 and self._held_bytes > self._memory_bytes:
            self._held_bytes -= self._groups.popitem(last=False)[1].nbytes
        return rows
