"""What is known of committed shards: `CommitRecord`, the `Seal` over all of them, and the ledgers.

A shard counts only if its commit record does: `shards/00003.json`, created exclusively after the data file is safe.
`sealed.json` is written last and holds all records, so that opening a finished cache reads two small files.
"""

from __future__ import annotations

import builtins
import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from cache_schema import jsondoc, layout
from cache_schema.errors import DamagedDocument
from cache_schema.manifest import Manifest
from cache_schema.schema import QuarantinedExample, Status
from cache_schema.store import Store

RECORD_MOST_BYTES = 64 << 20
SEAL_MOST_BYTES = 1 << 28  # a record takes about 700 bytes of it
_REASONS = [status.reason for status in Status if status is not Status.USABLE]


@dataclass(frozen=True)
class CommitRecord:
    """One committed shard."""

    shard: int
    rows: int  # examples written
    positions: int  # positions of those rows, usable or not
    bytes: int  # size of the data file
    sha256: str  # of the whole data file
    footer_sha256: str  # of the Parquet footer alone, checked whenever the file is opened: page checksums omit it
    codec_error_max: float  # largest |decoded - raw| logit over usable positions, of the far tail too, when written
    quarantined: tuple[QuarantinedExample, ...]
    quarantined_positions: dict[str, int]  # status reason -> how many positions of the rows
    provenance: dict[str, Any]

    @property
    def file(self) -> str:
        """The plain name of the data file inside `shards/`, derived from shard and hash."""
        return layout.data_name(self.shard, self.sha256)

    def to_json(self) -> dict[str, Any]:
        """The fields, as in `shards/00003.json` and in the list of `sealed.json`."""
        return {**asdict(self), "file": self.file, "quarantined": [asdict(example) for example in self.quarantined]}

    def dump(self, fingerprint: str) -> builtins.bytes:
        """The bytes of the commit record of a cache with this fingerprint."""
        return jsondoc.dump("record", {"fingerprint": fingerprint, **self.to_json()})

    @classmethod
    def load(cls, store: Store, shard: int, manifest: Manifest) -> CommitRecord:
        """Read the record of a shard. Raises FileNotFoundError when there is none, DamagedDocument when bad."""
        doc = jsondoc.load(store, layout.record(shard), "record", RECORD_MOST_BYTES)
        doc.expect("fingerprint", manifest.fingerprint)
        return cls.from_fields(doc, shard, manifest)

    @classmethod
    def load_listed(cls, store: Store, shard: int, manifest: Manifest) -> CommitRecord:
        """The same of a record that was listed: where it cannot be opened, it is a link to nothing. DamagedDocument."""
        try:
            return cls.load(store, shard, manifest)
        except FileNotFoundError:
            raise DamagedDocument(store, layout.record(shard), "it cannot be opened") from None

    @classmethod
    def from_fields(cls, doc: jsondoc.Fields, shard: int, manifest: Manifest) -> CommitRecord:
        """A record from its fields, held against the plan. Raises DamagedDocument."""
        if not 0 <= shard < manifest.shards:
            raise doc.damaged(f"the plan has {manifest.shards} shards, there is no shard {shard}")
        doc.expect("shard", shard)
        record = cls(
            shard=shard,
            rows=doc.take_count("rows"),
            positions=doc.take_count("positions"),
            bytes=doc.take_count("bytes"),
            sha256=doc.take_sha256("sha256"),
            footer_sha256=doc.take_sha256("footer_sha256"),
            codec_error_max=doc.take("codec_error_max", float),
            quarantined=tuple(
                _quarantined(doc.inner(item, f"quarantined[{i}]"))
                for i, item in enumerate(doc.take("quarantined", list))
            ),
            quarantined_positions=_counts(doc, doc.take("quarantined_positions", dict)),
            provenance=doc.take("provenance", dict),
        )
        doc.expect("file", record.file)
        doc.done()
        planned = len(manifest.examples_of(shard))
        if record.rows + len(record.quarantined) != planned:
            raise doc.damaged(
                f"{record.rows} rows and {len(record.quarantined)} quarantined, expected {planned} examples"
            )
        if sum(record.quarantined_positions.values()) > record.positions:
            raise doc.damaged("more positions quarantined than there are")
        return record


def _quarantined(doc: jsondoc.Fields) -> QuarantinedExample:
    example = QuarantinedExample(
        doc.take("example_id", str), doc.take("task", str), doc.take("reason", str), doc.take_count("positions")
    )
    doc.done()
    return example


def _counts(record: jsondoc.Fields, values: dict[str, Any]) -> dict[str, int]:
    if not values:  # of most shards
        return {}
    doc = record.inner(values, "quarantined_positions")
    counts = {reason: doc.take_count(reason) for reason in _REASONS if reason in doc}
    doc.done()
    return counts


@dataclass(frozen=True)
class Seal:
    """All commit records of a complete cache, in shard order."""

    records: tuple[CommitRecord, ...]

    def dump(self, manifest: Manifest) -> bytes:
        """The bytes of `sealed.json`."""
        records = [record.to_json() for record in self.records]
        return jsondoc.dump("seal", {"fingerprint": manifest.fingerprint, "records": records})

    @classmethod
    def load(cls, store: Store, manifest: Manifest) -> Seal:
        """Read `sealed.json`. Raises FileNotFoundError when the cache is not sealed, DamagedDocument when bad."""
        with _no_garbage_collection():
            return cls(tuple(cls._records(store, manifest)))

    @staticmethod
    def _records(store: Store, manifest: Manifest) -> Iterator[CommitRecord]:
        doc = jsondoc.load(store, layout.SEALED, "seal", SEAL_MOST_BYTES)
        doc.expect("fingerprint", manifest.fingerprint)
        items = doc.take("records", list)
        doc.done()
        if len(items) != manifest.shards:
            raise doc.damaged(f"{len(items)} records, expected {manifest.shards}")
        for shard, item in enumerate(items):
            yield CommitRecord.from_fields(doc.inner(item, f"records[{shard}]"), shard, manifest)


def recorded_shards(store: Store) -> list[int]:
    """The shards that have a commit record, in order; one listing of the folder."""
    found = map(layout.shard_of_record, store.listing(layout.SHARDS))
    return sorted(shard for shard in found if shard is not None)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """While only things that stay are made: looking through them again and again takes a quarter of an opening."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Ledger:
    """What came in, and where it went. It reconciles when written + quarantined = input."""

    input: int
    written: int
    quarantined: dict[str, int]  # reason -> how many

    @property
    def reconciles(self) -> bool:
        """Whether every input is accounted for."""
        return self.written + sum(self.quarantined.values()) == self.input

    def __str__(self) -> str:
        told = ((n, reason if reason.isprintable() else repr(reason)) for reason, n in sorted(self.quarantined.items()))
        reasons = ", ".join(f"{n} {reason}" for n, reason in told) or "none"
        return f"{self.input} in = {self.written} written + {sum(self.quarantined.values())} quarantined ({reasons})"


@dataclass(frozen=True)
class Totals:
    """The two ledgers of a cache, or of its committed part, and what it weighs."""

    examples: Ledger
    positions: Ledger
    bytes: int  # of the data files
    codec_error_max: float  # logit units

    @classmethod
    def of(cls, records: Sequence[CommitRecord], manifest: Manifest) -> Totals:
        """Sum over records. Inputs come from the plan, so an example that is lost does not reconcile.

        The positions of quarantined examples, where they could be counted, are in the ledger under their reason.
        """
        example_reasons: Counter[str] = Counter()
        position_reasons: Counter[str] = Counter()
        for record in records:
            position_reasons.update(record.quarantined_positions)
            for example in record.quarantined:
                example_reasons[example.reason] += 1
                position_reasons[example.reason] += example.positions
        in_rows = sum(record.positions for record in records)
        unusable = sum(sum(record.quarantined_positions.values()) for record in records)
        without_row = sum(example.positions for record in records for example in record.quarantined)
        return cls(
            examples=Ledger(
                sum(len(manifest.examples_of(record.shard)) for record in records),
                sum(record.rows for record in records),
                dict(example_reasons),
            ),
            positions=Ledger(
                in_rows + without_row, in_rows - unusable, {r: n for r, n in position_reasons.items() if n}
            ),
            bytes=sum(record.bytes for record in records),
            codec_error_max=max((record.codec_error_max for record in records), default=0.0),
        )

    @property
    def bytes_per_position(self) -> float:
        """Bytes of the data files for each position written."""
        return self.bytes / max(1, self.positions.written)
