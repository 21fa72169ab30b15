"""A billion positions from 64 GPUs through one bucket: what a cache of that size costs besides the teacher.

    python benchmarks/billion.py [--positions 1000000000] [--workers 64] [--shard-examples 256 2048] [--out FILE]

A simulation: no byte goes anywhere. Each worker runs the package's own `CacheWriter` (what is missing, claims, what a
commit asks) on a store that keeps names and sizes in memory and charges a virtual clock for every request. What that
costs is assumed, and printed; sealing is reckoned from it. What local code takes (opening a seal of so many records,
the order of an epoch) is measured here, now, with the real code. Bytes a position are those that cache_bytes.py found.
"""

import argparse
import heapq
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import RESULTS, Row, finish

from cache_schema import layout
from cache_schema.claims import Claims
from cache_schema.manifest import Manifest
from cache_schema.reader import CacheReader
from cache_schema.record import CommitRecord, Seal
from cache_schema.store import Store
from cache_schema.writer import CacheWriter
from pipeline.handout import Handout, Outcome
from stage1_teacher.executor import TAKEN_IN_A_ROW
from stage2_student.order import order

ANSWER_POSITIONS = 122  # of a GSM8K answer in Qwen's tokens
ASSUMED = {
    "teacher, positions/s a GPU": 20_000,
    "spread of a shard's time": 0.1,
    "request, s": 0.030,
    "LIST of 1,000 names, s": 0.100,
    "upload, MB/s a worker": 200,
    "GETs in flight when sealing": 32,
    "student, positions/s a GPU": 3_549,
    "student's tokenizer, examples/s a process": 5_000,
    "download, MB/s a machine of 8 GPUs": 1_000,
}


@dataclass
class Bucket:
    """Names and sizes, shared by all workers, and how many requests of each kind there were."""

    names: dict[str, dict[str, int]] = field(default_factory=dict)  # folder -> plain name -> bytes
    requests: dict[str, int] = field(default_factory=dict)


class Simulated(Store):
    """One worker's view of the bucket: every request adds to `spent_s`."""

    exclusive, at_once = True, int(ASSUMED["GETs in flight when sealing"])

    def __init__(self, bucket: Bucket, me: int) -> None:
        self.location, self._bucket, self.me, self.spent_s = "s3://simulated", bucket, me, 0.0

    def _ask(self, kind: str, name: str, count: int = 1, seconds: float | None = None) -> dict[str, int]:
        self._bucket.requests[kind] = self._bucket.requests.get(kind, 0) + count
        self.spent_s += count * ASSUMED["request, s"] if seconds is None else seconds
        return self._bucket.names.setdefault(name.rpartition("/")[0], {})

    def exists(self) -> bool:
        return bool(self._bucket.names)

    def prepare(self) -> None: ...

    def listing(self, folder: str = "") -> dict[str, int]:
        found = self._bucket.names.get(folder, {})
        lists = -(-max(1, len(found)) // 1000)
        self._ask("LIST", "", lists, lists * ASSUMED["LIST of 1,000 names, s"])
        return dict(found)

    def has(self, name: str) -> bool:
        there = name.rpartition("/")[2] in self._ask("HEAD", name)
        if not there:
            self._ask("LIST", name)  # fsspec looks whether it is a folder
        return there

    def read(self, name: str, most: int) -> bytes:
        self._ask("HEAD", name)
        if name.rpartition("/")[2] not in self._ask("GET", name):
            raise FileNotFoundError(name)
        return json.dumps({"host": "simulated", "pid": self.me}).encode()

    def publish(self, name: str, data: Any) -> None:
        size = data if isinstance(data, int) else len(data)
        upload_s = size / (ASSUMED["upload, MB/s a worker"] * 1e6)
        self._ask("PUT", name, 1, ASSUMED["request, s"] + upload_s)[name.rpartition("/")[2]] = size

    def create(self, name: str, data: Any) -> bool:
        folder, plain = self._ask("PUT", name), name.rpartition("/")[2]
        if plain in folder:
            return False
        folder[plain] = len(data)
        return True

    def remove(self, name: str) -> None:
        self._ask("DELETE", name).pop(name.rpartition("/")[2], None)

    def set_aside(self, name: str, to: str) -> None: ...

    def age_s(self, name: str) -> float:
        self._ask("HEAD", name)
        return 0.0

    def tidy(self) -> None: ...

    def open_data(self, file: str, sha256: str, size: int) -> Any: ...

    def path(self, name: str) -> str:
        return name

    def advice(self, error: OSError) -> str:
        return ""


class NoClock(Claims):
    """Claims without a heartbeat: real seconds mean nothing here."""

    def fresh(self, shard: int) -> bool:
        return False


def manifest_of(positions: int, shard_examples: int) -> Manifest:
    """A plan of the size asked for."""
    return Manifest.create(
        identity={"teacher": "simulated"},
        provenance={},
        top_k=256,
        vocab_size=151_936,
        temperatures=[1.0],
        step=1 / 64,
        store_ids=True,
        examples=-(-positions // ANSWER_POSITIONS),
        shard_examples=shard_examples,
        vocabulary_sha256="0" * 64,
    )


def record_of(shard: int, manifest: Manifest, bytes_per_position: float) -> CommitRecord:
    """What stage 1 would leave of a shard."""
    rows = len(manifest.examples_of(shard))
    size = int(rows * ANSWER_POSITIONS * bytes_per_position)
    sha = f"{shard:064x}"[::-1]
    provenance = {
        "host": "gpu-node-00",
        "device": "NVIDIA H200",
        "torch": "2.13.0",
        "batch_tokens": 4096,
        "threads": 16,
    }
    return CommitRecord(shard, rows, rows * ANSWER_POSITIONS, size, sha, sha, 0.0078125, (), {}, provenance)


def stage1(
    manifest: Manifest, workers: int, bytes_per_position: float, look_after: float
) -> tuple[float, float, float, Bucket]:
    """Seconds until the last shard is committed, until the last worker knows it, and that the teacher alone takes.

    Workers are independent processes, as by torchrun: they know of each other what the bucket says.
    look_after: how many shards that others have make a worker list what is there.
    """
    bucket, draw = Bucket(), random.Random(0)
    stores = [Simulated(bucket, me) for me in range(workers)]
    writers = [CacheWriter(store, manifest, 900.0) for store in stores]
    for me, (store, writer) in enumerate(zip(stores, writers, strict=True)):
        writer._claims = NoClock(store)
        writer._claims._me = {"host": "simulated", "pid": 10**9 + me}  # nobody's here: a claim is never taken over
        store.me = 10**9 + me
    todo, taken = [], [0] * workers
    for rank, writer in enumerate(writers):
        missing = writer.missing()
        start = rank * len(missing) // workers
        todo.append(Handout([*missing[start:], *missing[:start]]))
    a_shard_s = manifest.shard_examples * ANSWER_POSITIONS / ASSUMED["teacher, positions/s a GPU"]
    events = [(stores[me].spent_s, me, -1) for me in range(workers)]
    heapq.heapify(events)
    end = last_s = 0.0
    while events:
        now, me, writing = heapq.heappop(events)
        store, writer = stores[me], writers[me]
        store.spent_s = 0.0
        if writing >= 0:  # the commit overlaps the next shard; what it costs is charged to the store's thread
            record = record_of(writing, manifest, bytes_per_position)
            store.has(layout.record(writing))  # whether another was first
            store.publish(layout.data(record.file), record.bytes)
            store.create(layout.record(writing), record.dump(manifest.fingerprint))
            writer.release(writing)
            end = max(end, now + store.spent_s)
            continue
        shard = todo[me].next(0)
        if shard is None:
            last_s = max(last_s, now)
            continue
        took = writer.claim(int(shard))
        todo[me].settle(0, Outcome(shard, "done" if took else "taken"))
        taken[me] = 0 if took else taken[me] + 1
        if taken[me] == look_after:
            todo[me].narrow(set(writer.missing()))
            taken[me] = 0
        busy_s = store.spent_s
        if took:
            busy_s += a_shard_s * draw.lognormvariate(0, ASSUMED["spread of a shard's time"])
            heapq.heappush(events, (now + busy_s, me, int(shard)))
        heapq.heappush(events, (now + busy_s, me, -1))
    return end, last_s, manifest.shards * a_shard_s / workers, bucket


def opening(manifest: Manifest, bytes_per_position: float) -> tuple[float, int, float]:
    """Measured: seconds to make a seal's bytes into a reader, its bytes, seconds of an epoch's order."""
    seal = Seal(tuple(record_of(shard, manifest, bytes_per_position) for shard in range(manifest.shards)))

    class Sealed(Simulated):
        data = seal.dump(manifest)

        def read(self, name: str, most: int) -> bytes:
            return self.data if name == layout.SEALED else manifest.dump()

    started = time.perf_counter()
    store = Sealed(Bucket(), 0)
    found = Manifest.load(store)
    reader = CacheReader(store, found, Seal.load(store, found).records, True, 1)
    opened = time.perf_counter()
    order.__wrapped__(0, 0, len(reader))
    return opened - started, len(Sealed.data), time.perf_counter() - opened


def main() -> None:
    """Simulate, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--positions", type=int, default=10**9)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--shard-examples", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = json.loads((RESULTS / "cache_bytes.json").read_text(encoding="utf-8"))["rows"]
    bytes_per_position = max(row["value"] for row in sizes if "fine" in row["what"])
    rows: list[Row] = []
    for shard_examples in args.shard_examples:
        rows += of_size(manifest_of(args.positions, shard_examples), args.workers, bytes_per_position)
    finish("billion", rows, {"assumed": ASSUMED, "bytes a position (cache_bytes)": bytes_per_position}, args.out)


def of_size(manifest: Manifest, workers: int, bytes_per_position: float) -> list[Row]:
    """The rows of one shard size."""
    end_s, known_s, ideal_s, bucket = stage1(manifest, workers, bytes_per_position, TAKEN_IN_A_ROW)
    walked_end_s, walked_known_s, _, walked = stage1(manifest, workers, bytes_per_position, float("inf"))
    open_s, seal_bytes, order_s = opening(manifest, bytes_per_position)
    total = sum(bucket.names["shards"].values())
    seal_s = manifest.shards * ASSUMED["request, s"] / ASSUMED["GETs in flight when sealing"]
    lists = -(-2 * manifest.shards // 1000)
    epoch_s = manifest.examples * ANSWER_POSITIONS / workers / ASSUMED["student, positions/s a GPU"]
    download_s = total / (ASSUMED["download, MB/s a machine of 8 GPUs"] * 1e6)
    where = f"{manifest.shard_examples:,} examples a shard"

    def row(what: str, value: float, unit: str, against: str = "", note: str = "") -> Row:
        return Row.single(f"{what}, {where}", against, value, unit=unit, note=note)

    return [
        row("shards", manifest.shards, "shards", note=f"{total / manifest.shards / 1e6:.1f} MB each"),
        row("bytes", total / 1e9, "GB"),
        row("names listed to plan or to resume", 2 * manifest.shards, "names", note=f"{lists} LISTs"),
        row("stage 1", end_s / 60, "min", note=f"{ideal_s / 60:.1f} min of it the teacher"),
        row("stage 1", end_s / ideal_s, "x", "the teacher alone"),
        row("from the last commit until every worker knows", known_s - end_s, "s"),
        row(
            "the same, trying every shard",
            walked_known_s - walked_end_s,
            "s",
            note=f"{sum(walked.requests.values()):,} requests",
        ),
        row("requests of stage 1", sum(bucket.requests.values()), "", note=str(bucket.requests)),
        row("sealing", seal_s, "s", note="GETs of all commit records"),
        row("opening", open_s, "s", note=f"measured, a seal of {seal_bytes / 1e6:.0f} MB; its download not counted"),
        row(
            "before the first step: lengths of all examples",
            manifest.examples / workers / ASSUMED["student's tokenizer, examples/s a process"],
            "s",
            note="every process measures its part; each machine downloads its part of the shards for it",
        ),
        row("order of an epoch", order_s, "s", note="measured"),
        row("download, each machine, an epoch", download_s / 60, "min", note=f"an epoch takes {epoch_s / 60:.0f} min"),
    ]


if __name__ == "__main__":
    main()
