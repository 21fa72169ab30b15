"""A writer of a cache, killed or refused at every system call by which it changes the folder, one run each.

The oracle is a cache that nobody disturbed. The calls are found by tracing one run, and each run says which it was hit
at; the processes are forked from one that has imported everything, so that a kill costs a fiftieth of a second.
"""

from __future__ import annotations

import random
from pathlib import Path

import crashes
import promised
import pytest
from crashes import cache_sound
from forks import ForkServer
from syscalls import NotHit, Point, inject, inject_once, needs_strace, trace

from cache_schema.verify import verify


@pytest.fixture(scope="module")
def clean(writers, tmp_path_factory):
    """An undisturbed cache, and the calls that made it."""
    needs_strace()
    folder = tmp_path_factory.mktemp("clean") / "cache"
    points = trace(writers, [folder], folder)
    assert {"openat", "write", "fsync", "rename", "link", "unlink", "mkdir"} <= {point.call for point in points}
    assert len(points) > 50, "three shards, manifest, vocabulary and seal take dozens of calls"
    return contents(folder), points


def contents(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}


def resumed(writers: ForkServer, cache: Path) -> dict[str, bytes]:
    """What another process makes of what is there."""
    again = writers.run(cache)
    assert again.code == 0, again.output
    return contents(cache)


@pytest.mark.promise(promised.CRASH)
def test_killed_at_every_call(writers, clean, tmp_path, tried):
    """What is committed grows from call to call and is sound at each; another run always ends the same."""
    expected, points = clean
    committed = []
    for i, point in enumerate(points):
        cache = tmp_path / str(i)
        assert inject(writers, [cache], cache, point, "signal=SIGKILL").code == -9, point
        committed.append(cache_sound(cache))
        assert resumed(writers, cache) == expected, point
    assert committed == sorted(committed) and set(committed) == {0, 1, 2, 3}
    tried(len(points), "system calls of a cache's writer, killed at each")


def test_control_a_record_written_in_place_is_caught(writers, tmp_path):
    """The same kills find the third state of a writer that gives a file its name before its content."""
    needs_strace()
    points = trace(writers, [tmp_path / "clean", "careless"], tmp_path / "clean")
    half = [point for point in points if point.call == "write" and point.line == "/shards/00001.json"]
    assert half, points
    cache = tmp_path / "killed"
    assert inject(writers, [cache, "careless"], cache, half[0], "signal=SIGKILL").code == -9
    with pytest.raises(AssertionError, match=r"00001\.json"):
        cache_sound(cache)


@pytest.mark.promise(promised.EQUAL)
@pytest.mark.parametrize("runs", [pytest.param(10, id="10 runs"), pytest.param(200, id="200 runs", marks=crashes.LONG)])
def test_killed_again_and_again(writers, clean, tmp_path, tried, runs):
    """Every resumed run is killed too, at a call drawn anew, until one gets through."""
    expected, points = clean
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, kills = random.Random(seed), 0
    for i in range(runs):
        cache = tmp_path / str(i)
        while True:
            point = draw.choice(points)
            code = killed_if_it_gets_there(writers, cache, point)
            if code == 0:
                break
            assert code == -9, f"seed {seed}, run {i}: {point}"
            kills += 1
            cache_sound(cache)
        assert contents(cache) == expected, f"seed {seed}, run {i}"
    tried(kills, f"kills of a cache's writer at drawn calls, in {runs} caches each killed until done")


def killed_if_it_gets_there(writers: ForkServer, cache: Path, point: Point) -> int:
    """A resumed run makes fewer calls: it may end before the one that was drawn."""
    try:
        return inject_once(writers, [cache], cache, point, "signal=SIGKILL").code
    except NotHit as other:
        return other.outcome.code


@pytest.mark.promise(promised.REFUSED)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize(
    ("errors", "stride"),
    [
        pytest.param(["ENOSPC"], 5, id="no space, every 5th"),
        pytest.param(["ENOSPC", "EIO", "EACCES", "EROFS", "EDQUOT"], 1, id="all", marks=crashes.LONG),
    ],
)
def test_refused_at_every_call(writers, clean, tmp_path, tried, errors, stride, lasting):
    """The system says no: the writer ends with an error that says so, or did not need it; another run ends the same."""
    expected, points = clean
    ended, wrong = [], []
    for error in errors:
        for i, point in list(enumerate(points))[::stride]:
            cache = tmp_path / f"{error}-{i}"
            outcome = inject(writers, [cache], cache, point, f"error={error}", lasting)
            ended.append(outcome.code)
            if "Traceback" in outcome.output or outcome.code not in (0, 2):
                wrong.append(f"{error} at {point}: {outcome}")
            cache_sound(cache)
            assert outcome.code != 0 or verify(cache).complete, point
            assert resumed(writers, cache) == expected, point
    assert not wrong, "\n".join(wrong)
    assert ended.count(2) > len(ended) / 2, "most calls are needed"
    tried(len(ended), f"system calls of a cache's writer, refused {'from each on' if lasting else 'at each'}")
