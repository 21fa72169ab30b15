"""Setting aside what is damaged, and nothing else. Called by `python -m cache_schema repair` and `doctor`.

A bad shard's data file and record go to `aside/`, and the seal with them; stage 1 then makes that shard again.
Before that, a record that was lost or altered is written again from the seal where the data file is sound. Of what is
set aside the seal goes first: a repair that is stopped half way leaves a cache that says it is not complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from cache_schema import layout
from cache_schema.store import Store
from cache_schema.verify import Problem, VerifyReport, verify


@dataclass
class RepairReport:
    """What is wrong and what is done about it, or would be. `found` is what `verify` said before."""

    found: VerifyReport
    set_aside: list[str] = field(default_factory=list)  # names inside the cache, in their order
    rewritten: list[str] = field(default_factory=list)  # commit records, from the seal
    shards: list[int] = field(default_factory=list)  # that stage 1 has to make again
    left: list[Problem] = field(default_factory=list)  # beyond repair

    @property
    def for_stage1(self) -> bool:
        """Whether stage 1 has something to make again: what is set aside, or a vocabulary that is gone."""
        return bool(self.set_aside) or any(problem.file == layout.VOCABULARY for problem in self.found.problems)


def repair(
    location: str | os.PathLike[str], on_shard: Callable[[int, int], None] = lambda done, of: None
) -> RepairReport:
    """Verify, and set aside what is bad. Raises CacheError as `verify` does, and StorageError."""
    report = planned(verify(location, on_shard))
    carry_out(report)
    return report


def planned(found: VerifyReport) -> RepairReport:
    """What is to be done about what `verify` found. Changes nothing. Raises StorageError."""
    report, store = RepairReport(found), found.store
    records = {record.shard: record for record in found.records}
    files = {problem.file for problem in found.problems}
    bad: set[int] = set()
    for problem in found.problems:
        shard = problem.shard
        if shard is None:
            if problem.file not in (layout.SEALED, layout.VOCABULARY):
                report.left.append(problem)
        elif not (found.sealed and shard in records and layout.data(records[shard].file) not in files):
            bad.add(shard)
    named = {problem.shard for problem in found.problems if problem.shard is not None}
    report.rewritten = [layout.record(shard) for shard in sorted(named - bad)]
    with store.errors("looking for what to repair"):
        if (bad or layout.SEALED in files) and store.has(layout.SEALED):
            report.set_aside.append(layout.SEALED)
        for shard in sorted(bad):
            report.set_aside += _names_of(store, shard)
        if layout.VOCABULARY in files and store.has(layout.VOCABULARY):
            report.set_aside.append(layout.VOCABULARY)
    report.shards = sorted(shard for shard in bad if shard < found.manifest.shards)
    return report


def carry_out(report: RepairReport) -> None:
    """Do what is planned, at once after it was: a cache that others write into is another a while later.

    Raises StorageError.
    """
    store, fingerprint = report.found.store, report.found.manifest.fingerprint
    records = {layout.record(record.shard): record for record in report.found.records}
    with store.errors("repairing the cache"):
        for name in report.rewritten:
            store.publish(name, records[name].dump(fingerprint))
        for name in report.set_aside:
            _set_aside(store, name)


def _names_of(store: Store, shard: int) -> list[str]:
    """The record of a shard, then whatever claims to be its data: a damaged record does not say which is."""
    plain = store.listing(layout.SHARDS)
    data = [layout.data(name) for name in sorted(plain) if layout.shard_of_data(name) == shard]
    return [*([layout.record(shard)] if f"{shard:05d}.json" in plain else []), *data]


def _set_aside(store: Store, name: str) -> None:
    """Under a name that is free: an earlier repair may have set aside another file of this name."""
    plain = name.rpartition("/")[2]
    taken, number = store.listing(layout.ASIDE), 1
    while f"{plain}.{number}" in taken:
        number += 1
    store.set_aside(name, f"{layout.ASIDE}/{plain}.{number}")
