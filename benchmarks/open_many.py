"""How opening a cache grows with its shards: 1,000, 10,000 and 100,000 of them, made of tiny files.

    python benchmarks/open_many.py [--shards 1000 10000 100000] [--scratch FOLDER] [--out FILE]

The caches are real ones, sealed, one example a shard, written by the package's own writer in two processes; only the
flushing of each file to the disk is left out, which protects against power cuts and would take minutes. They lie in
memory (/dev/shm) where it can hold them. Measured, each in a fresh reader: opening, the files that it opens, and the
first row read, any row. Against them: the same cache without its seal, so that every commit record is a file to read.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from harness import Row, finish, side_by_side

from cache_schema.manifest import Manifest, vocabulary_sha256
from cache_schema.reader import CacheReader
from cache_schema.schema import CacheRow
from cache_schema.store import open_store
from cache_schema.writer import CacheWriter

WORDS = [f"w{i}" for i in range(8)]
TOP_K = 4
OPEN_S = 2.0  # what opening 100,000 shards may take


def main() -> None:
    """Build, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--scratch", type=Path, help="where the caches are built, 1.7 GB of them; then removed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    build_s: dict[str, float] = {}
    memory = Path("/dev/shm")  # noqa: S108  our own folder below it has a random name
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 4e9
    with tempfile.TemporaryDirectory(dir=args.scratch or (memory if roomy else None)) as scratch:
        folders = {}
        for shards in sorted(args.shards):
            started = time.perf_counter()
            folders[shards] = build(Path(scratch) / str(shards), shards)
            build_s[f"{shards:,} shards"] = round(time.perf_counter() - started, 1)
        least, most = min(folders), max(folders)
        rows += opening(folders, args.rounds)
        rows += first_reads(folders[least], least, folders[most], most, args.rounds)
        rows.append(without_seal(folders[sorted(folders)[len(folders) // 2]], args.rounds))
    finish("open_many", rows, {"row": f"1 example, 2 positions, K = {TOP_K}", "seconds to build": build_s}, args.out)


def opening(folders: dict[int, Path], rounds: int) -> list[Row]:
    """Seconds and files of opening each cache, and seconds a shard from the fewest to the most."""
    times = side_by_side({str(n): (lambda f=f: CacheReader.open(f)) for n, f in folders.items()}, rounds)
    rows = []
    for shards, folder in folders.items():
        taken = sorted(times[str(shards)])
        files = opened(lambda folder=folder: CacheReader.open(folder), folder)
        goal = f"<= {OPEN_S:g}" if shards == 100_000 else ""
        what, note = f"opening a sealed cache of {shards:,} shards", f"opens {', '.join(files)}"
        rows.append(Row(what, "", taken[len(taken) // 2], taken[0], taken[-1], goal, "s", note))
        rows.append(Row.single(f"files opened, {shards:,} shards", "", len(files), "<= 2", unit="files"))
    least, most = min(folders), max(folders)
    a_shard = {n: [seconds / n for seconds in times[str(n)]] for n in (least, most)}
    what, against = f"opening, seconds a shard, {most:,} shards", f"{least:,} shards"
    return [*rows, Row.of_times(what, against, a_shard[most], a_shard[least])]


def first_reads(few: Path, least: int, many: Path, most: int, rounds: int) -> list[Row]:
    """The first row that a fresh reader reads, drawn at random: it must not depend on the number of shards."""
    draw = random.Random(0)

    def seconds(folder: Path) -> float:
        reader = CacheReader.open(folder)
        taken = []
        for index in draw.sample(range(len(reader)), 200):
            started = time.perf_counter()
            reader.read([index])
            taken.append(time.perf_counter() - started)
        return sorted(taken)[len(taken) // 2]

    found = [(seconds(many), seconds(few)) for _ in range(rounds)]
    mine, theirs = [m for m, _ in found], [f for _, f in found]
    note = f"{1e3 * sorted(mine)[len(mine) // 2]:.2f} ms"
    return [Row.of_times(f"first read of a shard's row, {most:,} shards", f"{least:,} shards", mine, theirs, "", note)]


def without_seal(folder: Path, rounds: int) -> Row:
    """Opening by the seal, against reading every commit record."""
    seal, aside = folder / "sealed.json", folder / ".aside"

    def by_records() -> None:
        seal.rename(aside)
        try:
            CacheReader.open(folder, require_sealed=False)
        finally:
            aside.rename(seal)

    times = side_by_side({"seal": lambda: CacheReader.open(folder), "records": by_records}, min(rounds, 3))
    shards = Manifest.load(open_store(folder)).shards
    what, against = f"opening {shards:,} shards by the seal", "by every commit record"
    return Row.of_times(what, against, times["seal"], times["records"], "< 1")


_touched: list[str] | None = None


def opened(work: Callable[[], Any], folder: Path) -> list[str]:
    """The names of the files below `folder` that `work` opens, in order."""
    global _touched
    if not hasattr(opened, "hooked"):
        sys.addaudithook(_note)
        opened.hooked = True  # type: ignore[attr-defined]
    _touched = []
    work()
    found, _touched = _touched, None
    return [str(Path(name).relative_to(folder)) for name in found if name.startswith(str(folder))]


def _note(event: str, arguments: Any) -> None:
    if _touched is not None and event == "open":
        _touched.append(str(arguments[0]))


def build(folder: Path, shards: int) -> Path:
    """A sealed cache of so many shards of one tiny example each."""
    plan = Manifest.create(
        identity={"teacher": "none", "cache": {"top_k": TOP_K}},
        provenance={"recipe": "open_many"},
        top_k=TOP_K,
        vocab_size=len(WORDS),
        temperatures=(1.0,),
        step=1 / 64,
        store_ids=True,
        examples=shards,
        shard_examples=1,
        vocabulary_sha256=vocabulary_sha256(WORDS),
    )
    CacheWriter.open(folder, plan, WORDS)
    context = get_context("fork")
    writers = [context.Process(target=_fill, args=(folder, plan, part)) for part in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        if writer.exitcode:
            sys.exit(f"building {folder} failed")
    CacheWriter.open(folder, plan, WORDS).seal()
    return folder


def _fill(folder: Path, plan: Manifest, part: int) -> None:
    os.fsync = lambda fd: None  # type: ignore[assignment]
    writer, row = CacheWriter.open(folder, plan, WORDS), _row()
    provenance = {"device": "cpu", "batch_tokens": 4096, "torch": "2.13.0", "transformers": "5.23.0", "threads": 2}
    for shard in range(part, plan.shards, 2):
        writer.commit(shard, [replace(row, example_id=f"train/{shard}")], [], provenance)


def _row() -> CacheRow:
    logits_NV = np.random.default_rng(0).normal(0, 3, (2, len(WORDS))).astype(np.float32)
    ids_NV = np.argsort(-logits_NV, axis=1, kind="stable").astype(np.int32)
    sorted_NV = np.take_along_axis(logits_NV, ids_NV, axis=1)
    summed = [np.log(np.exp(part.astype(np.float64)).sum(1))[:, None] for part in (sorted_NV, sorted_NV[:, TOP_K:])]
    return CacheRow(
        example_id="",
        task="tiny",
        prompt="2 + 3?",
        answer="5",
        answer_ids=np.array([5, 0], np.int32),
        answer_start=4,
        answer_offsets=np.array([[0, 1], [1, 1]], np.int32),
        status=np.zeros(2, np.uint8),
        top_logit=sorted_NV[:, 0].copy(),
        logits=sorted_NV[:, :TOP_K].copy(),
        token_ids=ids_NV[:, :TOP_K].copy(),
        logsumexp=summed[0].astype(np.float32),
        log_tail=summed[1].astype(np.float32),
    )


if __name__ == "__main__":
    main()
