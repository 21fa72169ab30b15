"""Writers of one cache at once: eight that race for every record, and one that was stopped and wakes up too late.

Every writer's rows, and so its files, differ from the others'. So a shard whose record, file and rows are not all of
one writer would be seen.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import crashes
import promised
import pytest
from forks import ForkServer
from syscalls import needs_strace, stalled, trace

from cache_schema.reader import CacheReader
from cache_schema.verify import verify

RACER = (
    crashes.LOAD_TOY
    + """
import random
from dataclasses import replace
__import__("pyarrow").array([""])
toy = Toy(examples=6, shard_examples=1)
ROWS = [toy.row(i) for i in range(6)]

def run(folder, gate, me):
    heeds_claims = int(me) % 2 == 0
    rows = [replace(row, prompt=me) for row in ROWS]
    while not os.path.exists(gate):
        pass
    writer = toy.writer(Path(folder))
    lost = 0
    for shard in random.Random(int(me)).sample(range(6), 6) if heeds_claims else range(6):
        if not heeds_claims or writer.claim(shard):
            lost += writer.commit(shard, [rows[shard]], [], {"writer": me}).provenance != {"writer": me}
    if not writer.missing():
        writer.seal()
    print(lost)
"""
)


@pytest.fixture(scope="module")
def racers(tmp_path_factory):
    with ForkServer(RACER, tmp_path_factory.mktemp("racers")) as server:
        yield server


@pytest.mark.promise(promised.ONE_WINNER)
@pytest.mark.parametrize(
    "rounds",
    [pytest.param(10, id="10 rounds"), pytest.param(300, id="300 rounds", marks=crashes.LONG)],
)
def test_eight_processes_race(racers, tmp_path, tried, rounds):
    """They create the cache, claim or do not care, commit all its shards and seal it, all at once."""
    lost, winners = 0, Counter()
    for number in range(rounds):
        cache, gate = tmp_path / str(number), tmp_path / f"gate-{number}"
        running = [racers.start(cache, gate, me) for me in range(8)]
        for racer in running:
            racer.release()
        gate.touch()
        for racer in running:
            assert racer.wait() == 0, racer.output()
            lost += int(racer.output())
        report = verify(cache)
        assert report.good and report.complete and not report.orphans
        for record, row in zip(report.records, CacheReader.open(cache).rows(), strict=True):
            assert row.prompt == record.provenance["writer"]
            winners[row.prompt] += 1
        assert not list(cache.rglob(".tmp*")) and len(list((cache / "shards").iterdir())) == 2 * 6
    assert lost > rounds and len(winners) > 1, "they were to meet"
    tried(8 * rounds, f"processes in {rounds} races for every shard, lost {lost} times")


@pytest.mark.promise(promised.ONE_WINNER)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("stride", [pytest.param(6, id="every 6th"), pytest.param(1, id="all", marks=crashes.LONG)])
def test_a_stalled_writer_wakes_up_late(writers, tmp_path, tried, stride, before):
    """Stopped at any of its calls, while another takes over its claims, commits its shards, seals and tidies up."""
    needs_strace()
    points = trace(writers, [tmp_path / "clean"], tmp_path / "clean")
    left, overtaken = [], 0
    for i, point in list(enumerate(points))[::stride]:
        cache = tmp_path / str(i)
        with stalled(writers, [cache], point, before) as late:
            outcome = writers.run(cache, "impatient")
            assert outcome.code == 0, (point, outcome)
            report = verify(cache)
            assert report.good and report.complete, point
            overtaken += any(record.provenance["device"] == "impatient" for record in report.records)
            sealed = names(cache)
            assert late.state() in ("t", "T"), point
            late.wake()
            assert late.wait() == 0, (point, late.output())
        if names(cache) != sealed:
            left.append(f"{point}: {sorted(names(cache).items() ^ sealed.items())}")
        assert verify(cache).complete and verify(cache).good, point
    assert not left, "\n".join(left)
    assert overtaken > len(points) / stride / 2
    tried(len(range(0, len(points), stride)), "places where a writer was stopped, overtaken and woken up late")


def names(cache: Path) -> dict[str, bytes]:
    """Every file and folder of a cache, with its content."""
    return {str(p.relative_to(cache)): p.read_bytes() if p.is_file() else b"" for p in cache.rglob("*")}
