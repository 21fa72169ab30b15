"""What a cache has, what is wrong with it, and what that means for whoever needs it. Called by `... doctor`.

`verify` finds, `repair` plans and acts; here it is said in words: which examples are lost and which are not, what a
repair would do, what is missing and how it is made, and what lies about from earlier work.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cache_schema import layout
from cache_schema.atomic import is_temporary
from cache_schema.claims import STALE_AFTER_S
from cache_schema.errors import CacheError, DamagedDocument
from cache_schema.folder import Folder
from cache_schema.manifest import Manifest
from cache_schema.repair import RepairReport, planned
from cache_schema.store import Store
from cache_schema.verify import VerifyReport, verify

_MOST_NAMED = 10  # ranges of examples, or files, in one line


@dataclass
class Leftovers:
    """Files that mean nothing to a reader: name inside the cache -> bytes; of claims, seconds since they were renewed.

    temporary: only what a folder shows; an object store has none.
    """

    orphans: dict[str, int] = field(default_factory=dict)
    temporary: dict[str, int] = field(default_factory=dict)
    aside: dict[str, int] = field(default_factory=dict)
    claims: dict[str, float] = field(default_factory=dict)

    @property
    def at_work(self) -> bool:
        """Whether somebody may be writing shards just now."""
        return any(age_s <= STALE_AFTER_S for age_s in self.claims.values())


@dataclass(frozen=True)
class Diagnosis:
    """What `verify` found, what a repair would do about it, and what lies about."""

    plan: RepairReport
    leftovers: Leftovers

    @property
    def found(self) -> VerifyReport:
        return self.plan.found

    @property
    def repairable(self) -> bool:
        """Whether a repair would do anything."""
        return bool(self.plan.set_aside or self.plan.rewritten)


def diagnose(
    location: str | os.PathLike[str], on_shard: Callable[[int, int], None] = lambda done, of: None
) -> Diagnosis:
    """Look at everything; change nothing. Raises CacheError as `verify` does, with what it means."""
    try:
        found = verify(location, on_shard)
    except DamagedDocument as error:
        raise CacheError(
            f"{error}\n  meaning: the manifest says what every stored number means, so without it nothing here can be "
            "read\n  not lost: the shards beside it are untouched, and count again with the manifest they were made "
            "with"
        ) from None
    return Diagnosis(planned(found), _leftovers(found))


def describe(diagnosis: Diagnosis) -> str:
    """All of it as text, section by section."""
    found, plan = diagnosis.found, diagnosis.plan
    sections = [("what is there", _there(found))]
    if found.problems:
        sections.append(("what is wrong", [str(problem) for problem in found.problems]))
        sections.append(("what it means", _meaning(plan)))
        sections.append(("what a repair does", _treatment(plan)))
    if found.missing or not (found.sealed or found.problems):
        sections.append(("what is missing", _missing(found)))
    if left := _left_about(found.store, found.sealed, diagnosis.leftovers):
        sections.append(("what lies about, and means nothing", left))
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def _there(found: VerifyReport) -> list[str]:
    manifest, totals = found.manifest, found.totals
    sealed = "sealed, so complete" if found.sealed else "not sealed"
    return [
        f"the cache {found.store.location}, identity {manifest.fingerprint[:12]}",
        f"shards     {len(found.records)} of {manifest.shards}, {sealed}",
        f"examples   {totals.examples}",
        f"positions  {totals.positions}",
        f"bytes      {totals.bytes}",
    ]


def _meaning(plan: RepairReport) -> list[str]:
    """What is lost, and what is not."""
    found, manifest = plan.found, plan.found.manifest
    records = {record.shard: record for record in found.records}
    lost, lines = set(plan.shards), []
    if lost:
        known = [records[shard] for shard in plan.shards if shard in records]
        rows, positions = sum(record.rows for record in known), sum(record.positions for record in known)
        unknown = len(lost) - len(known)
        lines.append(f"lost: examples {_examples(manifest, lost)} of the input, with all positions of their answers,")
        lines.append(
            f"      {rows} rows and {positions} positions by the commit records"
            + (f"; of {unknown} of these shards the record is lost too" if unknown else "")
        )
    kept = [record for record in found.records if record.shard not in lost]
    rows, positions = sum(record.rows for record in kept), sum(record.positions for record in kept)
    lines.append(f"not lost: {len(kept)} shards with {rows} rows and {positions} positions: every byte was checked")
    files = {problem.file for problem in found.problems}
    if plan.rewritten:
        what = "a commit record is" if len(plan.rewritten) == 1 else f"{len(plan.rewritten)} commit records are"
        lines.append(f"not lost: {what} gone or altered, but the data is sound and the seal has a copy")
    if layout.SEALED in files:
        lines.append("not lost: the seal only lists what the commit records say; stage 1 writes it again from them")
    if layout.VOCABULARY in files:
        lines.append(
            "lost: the texts of the token ids, for people only; no logit depends on them, and stage 1 has them"
        )
    if lost:
        lines.append("a reader stops at what is damaged and names it: no student is trained on altered numbers")
    return lines


def _treatment(plan: RepairReport) -> list[str]:
    lines = [f"writes {name} again, from the seal" for name in plan.rewritten]
    lines += [f"moves {name} to {layout.ASIDE}/" for name in plan.set_aside]
    lines += [f"nothing about this, which is beyond repair: {problem}" for problem in plan.left]
    if plan.for_stage1:
        again = f"examples {_examples(plan.found.manifest, plan.shards)}" if plan.shards else "what is not there then"
        first = "then" if lines else "nothing is to be moved;"
        command = plan.found.next_command
        lines.append(f"{first} this makes {again} again, and nothing else: {command}")
    if plan.left:
        lines.append("what is beyond repair: copy the cache again, or make it again in another folder")
    return lines


def _missing(found: VerifyReport) -> list[str]:
    manifest, missing = found.manifest, found.missing
    if not missing:
        what = ["the seal alone: every shard is committed, and none is computed again"]
    else:
        what = [
            f"{len(missing)} of {manifest.shards} shards, examples {_examples(manifest, missing)} of the input: not "
            "computed yet, or taken out by a repair",
            "students are not trained on a part of a cache: they stop, and say so",
        ]
    return [*what, f"to go on where it stopped: {found.next_command}"]


def _left_about(store: Store, sealed: bool, left: Leftovers) -> list[str]:
    when = "it is in nobody's way, and may be removed" if sealed else "stage 1 removes it when it seals the cache"
    lines = []
    if left.orphans:
        lines.append(f"{_files(left.orphans)}: data of a writer that lost a race or died before its record; {when}")
    if left.temporary:
        lines.append(f"{_files(left.temporary)}: half-written, by a writer that died or one that writes now; {when}")
    for name, age_s in list(left.claims.items())[:_MOST_NAMED]:
        whose = "somebody may be at work on this shard" if age_s <= STALE_AFTER_S else "of a writer that is long silent"
        lines.append(f"{_printable(name)}, renewed {age_s / 60:.0f} min ago: {whose}; a claim decides nothing")
    if len(left.claims) > _MOST_NAMED:
        lines.append(f"{len(left.claims) - _MOST_NAMED} more claims")
    if left.aside:
        lines.append(f"{_files(left.aside)}: what earlier repairs took out, kept for you to look at")
        if isinstance(store, Folder):
            lines.append(f"  to free the space: rm -r {shlex.quote(store.path(layout.ASIDE))}")
    return lines


def _leftovers(found: VerifyReport) -> Leftovers:
    store = found.store
    with store.errors("looking for leftovers"):
        data, aside = store.listing(layout.SHARDS), store.listing(layout.ASIDE)
        left = Leftovers(
            orphans={layout.data(plain): data.get(plain, 0) for plain in found.orphans},
            aside={f"{layout.ASIDE}/{plain}": size for plain, size in sorted(aside.items())},
        )
        for plain in sorted(store.listing(layout.CLAIMS)):
            try:
                left.claims[f"{layout.CLAIMS}/{plain}"] = max(0.0, store.age_s(f"{layout.CLAIMS}/{plain}"))
            except FileNotFoundError:  # given up since
                continue
        if isinstance(store, Folder):
            left.temporary = dict(_temporary(store.root))
    return left


def _temporary(root: Path) -> Iterable[tuple[str, int]]:
    """Name and bytes of what a folder hides from its listing."""
    for folder in ("", layout.SHARDS, layout.CLAIMS):
        for path in sorted((root / folder).glob("*")):
            if is_temporary(path.name):
                yield str(Path(folder) / path.name), path.lstat().st_size


def _examples(manifest: Manifest, shards: Iterable[int]) -> str:
    """The input examples of some shards, counted from 0: `0 to 5, 12 to 17`."""
    ranges: list[list[int]] = []
    for planned_ in (manifest.examples_of(shard) for shard in sorted(shards)):
        if ranges and ranges[-1][1] + 1 == planned_[0]:
            ranges[-1][1] = planned_[-1]
        else:
            ranges.append([planned_[0], planned_[-1]])
    told = [str(first) if first == last else f"{first} to {last}" for first, last in ranges[:_MOST_NAMED]]
    return ", ".join(told) + (f" and {len(ranges) - _MOST_NAMED} more ranges" if len(ranges) > _MOST_NAMED else "")


def _files(sizes: dict[str, int]) -> str:
    """Some names, and how much they weigh together."""
    names = [_printable(name) for name in list(sizes)[:_MOST_NAMED]]
    more = f" and {len(sizes) - _MOST_NAMED} more" if len(sizes) > _MOST_NAMED else ""
    return f"{', '.join(names)}{more} ({sum(max(0, size) for size in sizes.values()):,} bytes)"


def _printable(name: str) -> str:
    """A file's name, which may be a stranger's."""
    return name if name.isprintable() else repr(name)[1:-1]
