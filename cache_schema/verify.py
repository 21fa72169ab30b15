"""Checking a cache, every byte and every invariant. Called by `python -m cache_schema verify`, and after a copy.

A bad shard does not end the check: all bad ones are named.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

from cache_schema import layout
from cache_schema.check import problem_of
from cache_schema.copies import Copies
from cache_schema.errors import CacheError, CorruptShard, DamagedDocument, UnknownVersion, shown
from cache_schema.manifest import Manifest, load_vocabulary
from cache_schema.record import CommitRecord, Seal, Totals, recorded_shards
from cache_schema.schema import ALL, CacheRow, Status
from cache_schema.shard import ShardFile
from cache_schema.store import Store, open_store

_MOST_TOLD = 1000  # characters of a problem


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: with a shard, or with the cache as a whole when `shard` is None."""

    shard: int | None
    file: str  # relative to the cache
    what: str  # may repeat what a stranger wrote

    def __str__(self) -> str:
        shard = "" if self.shard is None else f"shard {self.shard}, "
        what = self.what if len(self.what) <= _MOST_TOLD else f"{self.what[:_MOST_TOLD]}..."
        return f"{shard}{self.file}: {what if what.isprintable() else repr(what)[1:-1]}"


@dataclass
class VerifyReport:
    """What `verify` found. `good` means that everything committed is sound; `complete` that nothing is missing."""

    store: Store
    manifest: Manifest
    sealed: bool = False
    records: list[CommitRecord] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)  # shards without a commit record
    orphans: list[str] = field(default_factory=list)  # data files that no record names: harmless, swept when sealed

    @property
    def next_command(self) -> str:
        """What makes again what is missing, and nothing else."""
        return self.manifest.stage1_command(self.store.location)

    @property
    def good(self) -> bool:
        """Nothing that was committed is damaged."""
        return not self.problems

    @property
    def complete(self) -> bool:
        """Sealed, so nothing is missing."""
        return self.sealed

    @property
    def totals(self) -> Totals:
        """The ledgers, from the commit records."""
        return Totals.of(self.records, self.manifest)


def verify(
    location: str | os.PathLike[str], on_shard: Callable[[int, int], None] = lambda done, of: None
) -> VerifyReport:
    """Check everything in a cache, complete or not.

    on_shard: called with the number of shards checked and to check. Raises CacheError when there is no cache, or when
    its manifest is damaged so that nothing else has a meaning.
    """
    with TemporaryDirectory(prefix="logitbank-") as folder:  # copies made before say nothing of what is there now
        return _verify(open_store(location, Copies(folder, most_bytes=0)), on_shard)


def _verify(store: Store, on_shard: Callable[[int, int], None]) -> VerifyReport:
    manifest = Manifest.load(store)
    report = VerifyReport(store, manifest)
    with store.errors("verifying the cache"):
        records = _records(report)
        seen: dict[bytes, int] = {}
        for done, (shard, record) in enumerate(sorted(records.items()), start=1):
            try:
                _check_shard(store, record, manifest, seen)
            except CorruptShard as error:
                report.problems.append(Problem(shard, error.file, error.what))
            on_shard(done, len(records))
        if report.sealed or store.has(layout.VOCABULARY):  # else its writer died early, and the next one writes it
            try:
                load_vocabulary(store, manifest)
            except DamagedDocument as error:
                report.problems.append(Problem(None, error.file, error.what))
    report.records = [records[shard] for shard in sorted(records)]
    ledgers = report.totals
    for name, ledger in (("examples", ledgers.examples), ("positions", ledgers.positions)):
        if not ledger.reconciles:
            report.problems.append(Problem(None, "shards", f"the ledger of {name} does not reconcile: {ledger}"))
    return report


def _records(report: VerifyReport) -> dict[int, CommitRecord]:
    """All readable records by shard; what is wrong with the others goes into the report."""
    store, manifest = report.store, report.manifest
    records: dict[int, CommitRecord] = {}
    recorded = dict.fromkeys(recorded_shards(store))  # in order, and looked up for every shard below
    for shard in recorded:
        try:
            records[shard] = CommitRecord.load(store, shard, manifest)
        except (DamagedDocument, UnknownVersion) as error:
            report.problems.append(Problem(shard, layout.record(shard), _first_line(error)))
        except FileNotFoundError:  # removed since the listing, or a link to nothing
            report.problems.append(Problem(shard, layout.record(shard), "it cannot be opened"))
    try:
        report.sealed = True
        for record in Seal.load(store, manifest).records:
            if record.shard not in recorded:
                report.problems.append(Problem(record.shard, layout.record(record.shard), "the commit record is gone"))
            elif record.shard in records and records[record.shard] != record:
                what = "the seal and the commit record do not agree"
                report.problems.append(Problem(record.shard, layout.record(record.shard), what))
            records[record.shard] = record
    except FileNotFoundError:
        report.sealed = False
    except (DamagedDocument, UnknownVersion) as error:
        report.problems.append(Problem(None, layout.SEALED, _first_line(error)))
    report.missing = sorted(set(range(manifest.shards)) - recorded.keys() - records.keys())
    committed = {record.file for record in records.values()}
    data = [plain for plain in store.listing(layout.SHARDS) if layout.shard_of_data(plain) is not None]
    report.orphans = sorted(plain for plain in data if plain not in committed)
    return records


def _first_line(error: CacheError) -> str:
    return error.what if isinstance(error, DamagedDocument) else str(error).splitlines()[0]


def _key(row: CacheRow) -> bytes:
    """What stands for an example here: its names may be long, and all shards' are held together."""
    task, example_id = row.task.encode(), row.example_id.encode()
    return hashlib.blake2b(len(task).to_bytes(8, "little") + task + example_id, digest_size=16).digest()


def _check_shard(store: Store, record: CommitRecord, manifest: Manifest, seen: dict[bytes, int]) -> None:
    """Raise CorruptShard unless the data file is exactly what its record says and every row is sound."""
    shard = ShardFile(store, record, manifest)
    found = shard.sha256()
    if found != record.sha256:
        raise shard.corrupt(f"its SHA-256 is {found}, its commit record says {record.sha256}")
    codes: Counter[int] = Counter()
    number = 0
    for index in range(len(shard.group_rows)):
        group = shard.group(index, ALL)
        for i in range(len(group)):
            with shard.reading():
                row = group.row(i)
            assert isinstance(row, CacheRow)
            problem = problem_of(row, manifest, decoded=True)
            if problem is None and (key := _key(row)) in seen:
                problem = "it is there twice" if seen[key] == record.shard else f"it is in shard {seen[key]} as well"
            if problem is not None:
                raise shard.corrupt(f"row {number} (example {shown(row.example_id)}): {problem}")
            seen[key] = record.shard
            codes.update(row.status.tolist())
            number += 1
    if codes.total() != record.positions:
        raise shard.corrupt(f"it has {codes.total()} positions, its commit record says {record.positions}")
    reasons = {Status(code).reason: n for code, n in codes.items() if code}
    if reasons != record.quarantined_positions:
        raise shard.corrupt(f"unusable positions {reasons}, its commit record says {record.quarantined_positions}")
