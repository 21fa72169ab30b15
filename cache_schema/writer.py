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
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cache_schema.atomic import create, publish, remove_temporaries, storage_errors, sync_folder
from cache_schema.claims import STALE_AFTER_S, Claims
from cache_schema.errors import CorruptShard, IncompleteCache, InvalidManifest, InvalidRow, NotACache
from cache_schema.jsondoc import canonical
from cache_schema.layout import Layout
from cache_schema.manifest import Manifest, vocabulary_bytes
from cache_schema.record import CommitRecord, Seal
from cache_schema.schema import CacheRow, QuarantinedExample, Status, TextRow
from cache_schema.shard import encode_shard


class CacheWriter:
    """An open cache, complete or not. `manifest` is the one on disk."""

    def __init__(self, layout: Layout, manifest: Manifest, stale_after_s: float) -> None:
        self._layout = layout
        self._claims = Claims(layout, stale_after_s)
        self.manifest = manifest

    @classmethod
    def open(
        cls,
        cache_dir: Path,
        manifest: Manifest,
        vocabulary: Sequence[str | None],
        *,
        stale_after_s: float = STALE_AFTER_S,
    ) -> CacheWriter:
        """Create the cache, or open the one that is there; any number of processes may do so at once.

        vocabulary: token text by id, `vocab_size` long, null where an id has none; kept as `vocabulary.json`.
        Raises FingerprintMismatch or PlanMismatch when the cache there is another, NotACache when something else is
        in the way, StorageError.
        """
        root = Path(cache_dir).absolute()
        layout = Layout(root)
        words = vocabulary_bytes(vocabulary)
        if len(vocabulary) != manifest.vocab_size:
            raise InvalidManifest(f"the vocabulary has {len(vocabulary)} entries; expected {manifest.vocab_size}")
        if hashlib.sha256(words).hexdigest() != manifest.vocabulary_sha256:
            raise InvalidManifest("vocabulary_sha256 is not that of the vocabulary given; use `vocabulary_sha256(...)`")
        with storage_errors(root, "creating the cache"):
            _make_folder(root)
            if not layout.manifest.exists():
                _refuse_other_content(layout)
                create(layout.manifest, manifest.dump())
            on_disk = Manifest.load(root)
            on_disk.expect_plan(root, manifest)
            layout.shards.mkdir(exist_ok=True)
            if not layout.vocabulary.exists():  # the winner may have died just here; any of us can write it
                create(layout.vocabulary, words)
            sync_folder(root)
        return cls(layout, on_disk, stale_after_s)

    def missing(self) -> list[int]:
        """The shards without a commit record, in order. One listing of the folder."""
        if self._layout.sealed.exists():
            return []
        return sorted(set(range(self.manifest.shards)) - set(self._layout.recorded()))

    def claim(self, shard: int) -> bool:
        """Whether to work on this shard: not committed, and not in another's hands. Again to renew, as a heartbeat.

        A hint only: a claim of a dead process of this machine, or one not renewed for `stale_after_s`, is taken over.
        """
        if self._layout.sealed.exists() or self._layout.record(shard).exists():
            return False
        with suppress(FileNotFoundError), storage_errors(self._layout.root, f"claiming shard {shard}"):
            return self._claims.claim(shard)
        return False  # the claims were swept under us: the cache is sealed

    def release(self, shard: int) -> None:
        """Give up a claim; without effect when it is not ours."""
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
        canonical(provenance)
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
        winner = self._committed(shard)
        if winner is None:
            with storage_errors(self._layout.shards, f"writing shard {shard}"):
                winner = self._publish(record, encoded.data)
        self.release(shard)
        return winner

    def _publish(self, record: CommitRecord, data: memoryview) -> CommitRecord:
        path = self._layout.shards / record.file
        try:
            publish(path, data)  # over an orphan of the same name too: same name, same bytes
            if create(self._layout.record(record.shard), record.dump(self.manifest.fingerprint)):
                return record
        except FileNotFoundError:  # our temporary file was swept: somebody else committed this shard, and sealed
            pass
        winner = self._committed(record.shard)
        if winner is None:
            raise NotACache(f"the cache at {self._layout.root} was removed while shard {record.shard} was written")
        if winner.file != record.file:
            path.unlink(missing_ok=True)
        return winner

    def _committed(self, shard: int) -> CommitRecord | None:
        try:
            return CommitRecord.load(self._layout.root, shard, self.manifest)
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
        root, manifest = self._layout.root, self.manifest
        try:
            seal = Seal.load(root, manifest)
        except FileNotFoundError:
            missing = self.missing()
            if missing:
                raise IncompleteCache(root, manifest.shards, missing, manifest.stage1_command) from None
            seal = Seal(tuple(CommitRecord.load(root, shard, manifest) for shard in range(manifest.shards)))
            self._check_sizes(seal)
            with storage_errors(root, "sealing the cache"):
                if not create(self._layout.sealed, seal.dump(manifest)):
                    seal = Seal.load(root, manifest)
        self._sweep(seal)
        return seal

    def _check_sizes(self, seal: Seal) -> None:
        for record in seal.records:
            path = self._layout.shards / record.file
            size = path.stat().st_size if path.is_file() else None
            if size != record.bytes:
                found = "gone" if size is None else f"{size} bytes long"
                raise CorruptShard(record.shard, path, f"it is {found}, its commit record says {record.bytes} bytes")

    def _sweep(self, seal: Seal) -> None:
        """Every shard has its record now, so any other data file is an orphan, and no claim means anything."""
        committed = {record.file for record in seal.records}
        with storage_errors(self._layout.root, "tidying up the cache"):
            for _, path in self._layout.data_files():
                if path.name not in committed:
                    path.unlink(missing_ok=True)
            for folder in (self._layout.root, self._layout.shards):
                remove_temporaries(folder)
            shutil.rmtree(self._layout.claims, ignore_errors=True)


def _make_folder(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        blocker = next(path for path in (root, *root.parents) if os.path.lexists(path))
        raise NotACache(
            f"the cache cannot be made at {root}: {blocker} is a file (or a broken link); expected a folder\n"
            "  next: remove that file, or choose another folder: --set cache.dir=FOLDER"
        ) from None


def _refuse_other_content(layout: Layout) -> None:
    """A cache is made in an empty folder: one that has other things in it was probably named by mistake."""
    others = sorted(p.name for p in layout.root.iterdir() if p.name != "lost+found" and not p.name.startswith(".tmp-"))
    if others and not layout.manifest.exists():  # unless another process made it a cache meanwhile
        raise NotACache(
            f"the folder {layout.root} is no cache and is not empty (it has {others[0]!r})\n"
            "  next: choose an empty or a new folder: --set cache.dir=FOLDER"
        )
