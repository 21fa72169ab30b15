"""Writing a cache: `CacheWriter`, called by stage 1, in any number of processes at once.

    writer = CacheWriter.open(folder, manifest, vocabulary)
    for shard in writer.missing():
        if writer.claim(shard):
            writer.commit(shard, rows, quarantined, provenance)
    writer.seal()

A shard is committed by its record alone, which only one writer can create. Stop a writer anywhere: what is committed
stays, what is not is done again, and `seal` sweeps what was left behind.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from cache_schema import jsondoc, layout
from cache_schema.claims import STALE_AFTER_S, Claims
from cache_schema.errors import CorruptShard, IncompleteCache, InvalidManifest, InvalidRow, NotACache
from cache_schema.manifest import Manifest, vocabulary_bytes
from cache_schema.record import RECORD_MOST_BYTES, SEAL_MOST_BYTES, CommitRecord, Seal, recorded_shards
from cache_schema.schema import CacheRow, QuarantinedExample, Status, TextRow
from cache_schema.shard import encode_shard
from cache_schema.store import Store, open_store


class CacheWriter:
    """An open cache, complete or not. `manifest` is the one on disk."""

    def __init__(self, store: Store, manifest: Manifest, stale_after_s: float) -> None:
        self._store = store
        self._claims = Claims(store, stale_after_s)
        self.exclusive = store.exclusive  # without, one process at a time may write
        self.manifest = manifest

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        manifest: Manifest,
        vocabulary: Sequence[str | None],
        *,
        stale_after_s: float = STALE_AFTER_S,
    ) -> CacheWriter:
        """Create the cache, or open the one that is there; any number of processes may do so at once.

        location: a folder, or a URL that fsspec knows.
        vocabulary: token text by id, `vocab_size` long, null where an id has none; kept as `vocabulary.json`.
        Raises FingerprintMismatch or PlanMismatch when the cache there is another, NotACache when something else is
        in the way, StorageError.
        """
        store = open_store(location)
        words = vocabulary_bytes(vocabulary)
        if len(vocabulary) != manifest.vocab_size:
            raise InvalidManifest(f"the vocabulary has {len(vocabulary)} entries; expected {manifest.vocab_size}")
        if hashlib.sha256(words).hexdigest() != manifest.vocabulary_sha256:
            raise InvalidManifest("vocabulary_sha256 is not that of the vocabulary given; use `vocabulary_sha256(...)`")
        with store.errors("creating the cache"):
            store.prepare()
            if not store.has(layout.MANIFEST):
                _refuse_other_content(store)
                store.create(layout.MANIFEST, manifest.dump())
            on_disk = Manifest.load(store)
            on_disk.expect_plan(store, manifest)
            if store.listing().get(layout.SHARDS, -1) >= 0:
                raise NotACache(f"{store.path(layout.SHARDS)} is a file; expected a folder, or nothing")
            if not store.has(layout.VOCABULARY):  # the winner may have died just here; any of us can write it
                store.create(layout.VOCABULARY, words)
        return cls(store, on_disk, stale_after_s)

    def missing(self) -> list[int]:
        """The shards without a commit record, in order. One listing of the folder."""
        with self._store.errors("looking for what is missing"):
            if self._store.has(layout.SEALED):
                return []
            return sorted(set(range(self.manifest.shards)) - set(recorded_shards(self._store)))

    def claim(self, shard: int) -> bool:
        """Whether to work on this shard: not committed, and not in another's hands. Again to renew, as a heartbeat.

        A hint only: a claim of a dead process of this machine, or one not renewed for `stale_after_s`, is taken over.
        """
        with suppress(FileNotFoundError), self._store.errors(f"claiming shard {shard}"):
            if self._claims.fresh(shard):
                return True
            if self._store.has(layout.SEALED) or self._store.has(layout.record(shard)):
                return False
            return self._claims.claim(shard)
        return False  # the claims were swept under us: the cache is sealed

    def release(self, shard: int) -> None:
        """Give up a claim; without effect when it is not ours."""
        with self._store.errors(f"giving up shard {shard}"):
            self._claims.release(shard)

    def commit(
        self,
        shard: int,
        rows: Sequence[CacheRow],
        quarantined: Sequence[QuarantinedExample],
        provenance: dict[str, Any],
    ) -> CommitRecord:
        """Make a shard part of the cache, for good. If another writer has, its record is returned and ours is void.

        rows: in input order, without the quarantined examples. Raises InvalidRow (a bug of the caller) when rows and
        quarantined are not the planned examples or a row breaks an invariant; StorageError, with nothing lost.
        """
        self._check_examples(shard, rows, quarantined)
        jsondoc.canonical(provenance)
        encoded = encode_shard(rows, shard, self.manifest)
        codes = Counter(int(code) for row in rows for code in row.status)
        record = CommitRecord(
            shard=shard,
            rows=len(rows),
            positions=codes.total(),
            bytes=len(encoded.data),
            sha256=encoded.sha256,
            footer_sha256=encoded.footer_sha256,
            codec_error_max=encoded.codec_error_max,
            quarantined=tuple(quarantined),
            quarantined_positions={Status(code).reason: n for code, n in sorted(codes.items()) if code},
            provenance=provenance,
        )
        data = record.dump(self.manifest.fingerprint)
        if not jsondoc.fits(data, RECORD_MOST_BYTES):
            raise InvalidRow(f"shard {shard} has too many quarantined examples: set cache.shard_examples lower")
        winner = self._committed(shard)
        if winner is None:
            with self._store.errors(f"writing shard {shard}"):
                winner = self._publish(record, data, encoded.data)
        self.release(shard)
        return winner

    def _publish(self, record: CommitRecord, document: bytes, data: memoryview) -> CommitRecord:
        name = layout.data(record.file)
        try:
            self._store.publish(name, data)  # over an orphan of the same name too: same name, same bytes
            if self._store.create(layout.record(record.shard), document):
                return record
        except FileNotFoundError:  # our temporary file was swept: somebody else committed this shard, and sealed
            pass
        winner = self._committed(record.shard)
        if winner is None:
            raise NotACache(f"the cache at {self._store.location} was removed while shard {record.shard} was written")
        if winner.file != record.file:
            self._store.remove(name)
        return winner

    def _committed(self, shard: int) -> CommitRecord | None:
        try:
            return CommitRecord.load(self._store, shard, self.manifest)
        except FileNotFoundError:
            return None

    def _check_examples(self, shard: int, rows: Sequence[CacheRow], quarantined: Sequence[QuarantinedExample]) -> None:
        if not 0 <= shard < self.manifest.shards:
            raise InvalidRow(f"there is no shard {shard}; the plan has {self.manifest.shards}")
        planned = len(self.manifest.examples_of(shard))
        if len(rows) + len(quarantined) != planned:
            raise InvalidRow(
                f"shard {shard}: {len(rows)} rows and {len(quarantined)} quarantined; expected {planned} in all"
            )
        examples: list[TextRow | QuarantinedExample] = [*rows, *quarantined]
        names = Counter((example.task, example.example_id) for example in examples)
        name, count = names.most_common(1)[0]
        if count > 1:
            raise InvalidRow(f"shard {shard}: example {name[1]!r} of task {name[0]!r} is there {count} times")
        for example in quarantined:
            if not example.reason or example.positions < 0:
                raise InvalidRow(f"shard {shard}: {example} has no reason, or a negative count")

    def seal(self) -> Seal:
        """Declare the cache complete and tidy it up: orphans, temporary files and claims go. Sealing again is fine.

        Raises IncompleteCache, listing the missing shards; CorruptShard when a committed data file is gone.
        """
        store, manifest = self._store, self.manifest
        try:
            seal = Seal.load(store, manifest)
        except FileNotFoundError:
            missing = self.missing()
            if missing:
                raise IncompleteCache(
                    store.location, manifest.shards, missing, manifest.stage1_command(store.location)
                ) from None
            records = store.map(lambda shard: CommitRecord.load_listed(store, shard, manifest), range(manifest.shards))
            seal = Seal(tuple(records))
            data = seal.dump(manifest)
            if not jsondoc.fits(data, SEAL_MOST_BYTES):
                raise self._too_many_lost(records) from None
            with store.errors("sealing the cache"):
                self._check_sizes(seal)
                if not store.create(layout.SEALED, data):
                    seal = Seal.load(store, manifest)
        self._sweep(seal)
        return seal

    def _too_many_lost(self, records: Sequence[CommitRecord]) -> InvalidManifest:
        return InvalidManifest(
            f"the cache at {self._store.location} cannot be sealed: its records, with "
            f"{sum(len(record.quarantined) for record in records)} quarantined examples, are too large for one seal\n"
            "  next: leave such rows out of the data, or make several caches"
        )

    def _check_sizes(self, seal: Seal) -> None:
        sizes = self._store.listing(layout.SHARDS)
        for record in seal.records:
            size = sizes.get(record.file)
            if size != record.bytes:
                found = "gone" if size is None else f"{size} bytes long" if size >= 0 else "no plain file"
                raise CorruptShard(
                    record.shard,
                    self._store,
                    layout.data(record.file),
                    f"it is {found}, its commit record says {record.bytes} bytes",
                )

    def _sweep(self, seal: Seal) -> None:
        """Every shard has its record now, so any other data file is an orphan, and no claim means anything.

        Unless we slept since: then a shard may have been repaired and be in work again. So the record is asked.
        """
        committed = {record.file for record in seal.records}
        with self._store.errors("tidying up the cache"):
            for plain in self._store.listing(layout.SHARDS):
                shard = layout.shard_of_data(plain)
                if shard is not None and plain not in committed:
                    now = self._committed(shard)
                    if now is not None and now.file != plain:
                        self._store.remove(layout.data(plain))
            self._store.tidy()


def _refuse_other_content(store: Store) -> None:
    """A cache is made in an empty place: one that has other things in it was probably named by mistake."""
    others = sorted(store.listing().keys() - {layout.CLAIMS})  # where another process tries what the store can do
    if others and not store.has(layout.MANIFEST):  # unless another process made it a cache meanwhile
        raise NotACache(
            f"the folder {store.location} is no cache and is not empty (it has {others[0]!r})\n"
            "  next: choose an empty or a new folder: --set cache.dir=FOLDER"
        )
