"""Disks that are really full, really read-only or really forbidden, under a cache's writer and under all three stages.

Each time: an error with exit code 2 and no traceback, in bounded time; what was committed is whole, nothing is there by
half; with room made, the same command ends as if nothing had been.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import crashes
import promised
import pytest
import toys
from crashes import SmallDisk, cache_content, cache_sound, run_content
from forks import Outcome
from syscalls import inject_in_threads, needs_strace

from cache_schema.verify import verify
from stage3_eval import predictions

ROOMY = "size=64m"


def refused(outcome: Outcome, *words: str) -> None:
    """It ended as it should: by code 2, with these words and no traceback."""
    assert outcome.code == 2, outcome
    assert "error: " in outcome.output and "Traceback" not in outcome.output, outcome.output
    assert any(word in outcome.output for word in words), outcome.output


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".tmp*") if path.is_file()]


# --- a cache's writer ------------------------------------------------------------------------------------------------


@pytest.mark.promise(promised.REFUSED)
@pytest.mark.parametrize(
    "limits",
    [
        pytest.param([f"size={kib}k" for kib in range(4, 80, 16)] + ["nr_inodes=7"], id="a few sizes"),
        pytest.param(
            [f"size={kib}k" for kib in range(4, 80, 4)] + [f"nr_inodes={n}" for n in range(2, 20)],
            id="every size",
            marks=crashes.LONG,
        ),
    ],
)
def test_a_writer_on_a_full_disk(writers, tmp_path, tried, limits):
    """Out of room, or of inodes, at every document of a cache in turn."""
    assert writers.run(tmp_path / "clean").code == 0
    expected, codes = cache_content(tmp_path / "clean"), []
    for limit in limits:
        with SmallDisk(tmp_path / limit, limit) as disk:
            cache = disk.path / "cache"
            outcome = writers.run(cache)
            codes.append(outcome.code)
            if outcome.code != 0:
                refused(outcome, "No space left on device")
                cache_sound(cache)
                assert not temporaries(disk.path)
            disk.remount("size=1m,nr_inodes=100")
            again = writers.run(cache)
            assert again.code == 0, again.output
            assert cache_content(cache) == expected, limit
    assert codes.count(2) >= len(limits) / 2
    tried(codes.count(2), "full disks under a cache's writer")


@pytest.mark.promise(promised.REFUSED)
def test_a_writer_on_a_read_only_disk(writers, tmp_path, tried):
    """An empty one, one with half a cache, one with a whole one: to find that there is nothing to do is no error."""
    with SmallDisk(tmp_path / "disk", "size=32k") as disk:
        cache = disk.path / "cache"
        disk.remount("ro")
        refused(writers.run(cache), "Read-only file system")
        disk.remount("rw")
        refused(writers.run(cache), "No space left")
        half = cache_content(cache)
        disk.remount("ro,size=1m")
        refused(writers.run(cache), "Read-only file system")
        assert cache_content(cache) == half and cache_sound(cache) > 0
        disk.remount("rw")
        assert writers.run(cache).code == 0
        disk.remount("ro")
        outcome = writers.run(cache)
        assert outcome.code == 0, outcome.output
        assert verify(cache).complete
    tried(3, "read-only disks under a cache's writer")


@contextmanager
def forbidden(folder: Path) -> Iterator[None]:
    """It may be read but not written to."""
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)


@pytest.mark.promise(promised.REFUSED)
@pytest.mark.parametrize("where", ["above", "cache", "shards", "claims"])
def test_a_writer_without_permission(writers, tmp_path, tried, where):
    folder, cache = tmp_path / "above", tmp_path / "above" / "cache"
    folder.mkdir()
    if where in ("shards", "claims"):
        assert writers.run(cache, "one shard").code == 0
        (cache / "claims").mkdir(exist_ok=True)
    elif where == "cache":
        cache.mkdir()
    with forbidden({"above": folder, "cache": cache}.get(where, cache / where)):
        refused(writers.run(cache, bound=True), "Permission denied")
        cache_sound(cache)
        assert not temporaries(tmp_path)
    assert writers.run(cache, bound=True).code == 0
    tried(1, "folders without permission under a cache's writer")


# --- the stages ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean(stages, tmp_path_factory):
    """A tiny recipe, run whole: its cache of 11 shards, its two checkpoints, its report."""
    folder = tmp_path_factory.mktemp("clean")
    recipe = toys.tiny_recipe(
        folder, cache={"shard_examples": 2}, arms={"sft": None}, eval={"engine": "hf", "baselines": []}
    )
    for stage in ("stage1_teacher", "stage2_student", "stage3_eval"):
        outcome = stages.run(stage, "--recipe", recipe)
        assert outcome.code == 0, outcome.output
    return folder


def stage1(clean: Path, cache: Path) -> list[str]:
    return ["stage1_teacher", "--recipe", str(clean / "recipe.yaml"), "--set", f"cache.dir={cache}"]


def stage2(clean: Path, run: Path) -> list[str]:
    return ["stage2_student", "--recipe", str(clean / "recipe.yaml"), "--set", f"run_dir={run}"]


@pytest.mark.promise(promised.REFUSED)
def test_stage_1_on_a_full_disk(stages, clean, tmp_path, tried):
    """Some shards have room. They are kept, as they are."""
    with SmallDisk(tmp_path / "disk", "size=100k") as disk:
        cache = disk.path / "cache"
        refused(stages.run(*stage1(clean, cache)), "No space left on device", "every committed shard is kept")
        kept = {path: path.read_bytes() for path in (cache / "shards").iterdir()}
        assert 0 < cache_sound(cache) < 11 and not temporaries(cache)
        disk.remount("ro")
        refused(stages.run(*stage1(clean, cache)), "Read-only file system")
        disk.remount(f"rw,{ROOMY}")
        outcome = stages.run(*stage1(clean, cache))
        assert outcome.code == 0, outcome.output
        assert {path: path.read_bytes() for path in kept} == kept
        assert cache_content(cache) == cache_content(clean / "cache")
    tried(2, "full or read-only disks under stage 1")


@pytest.mark.promise(promised.REFUSED)
@pytest.mark.parametrize(
    ("call", "where", "code", "words"),
    [
        ("fsync:error=ENOSPC:when=3+", "shards", 2, "error: writing shard 1 failed: No space left on device"),
        ("fsync:error=ENOSPC:when=2", "shards", 2, "error: writing shard 0 failed: No space left on device"),
        ("link:error=EIO", "shards/00004.json", 3, "writing shard 4 failed: Input/output error"),
    ],
)
def test_stage_1_when_its_writing_thread_is_refused(stages, clean, tmp_path, tried, call, where, code, words):
    """In the thread that writes: the one that computes does not wait for it. It stops where there is no room, and goes
    on with the other shards where one of them failed."""
    needs_strace()
    cache = tmp_path / "cache"
    outcome, in_thread = inject_in_threads(stages, stage1(clean, cache), call, cache / where)
    assert outcome.code == code and words in outcome.output, outcome
    assert "Traceback" not in outcome.output
    assert in_thread and all(in_thread), outcome.output
    assert cache_sound(cache) < 11 and not temporaries(cache)
    assert stages.run(*stage1(clean, cache)).code == 0
    assert cache_content(cache) == cache_content(clean / "cache")
    tried(len(in_thread), "calls refused in the thread of stage 1 that writes")


@pytest.mark.promise(promised.REFUSED)
@pytest.mark.parametrize(
    "sizes",
    [pytest.param([4, 120], id="2 sizes"), pytest.param(range(4, 200, 8), id="all", marks=crashes.LONG)],
)
def test_stage_2_on_a_full_disk(stages, clean, tmp_path, tried, sizes):
    """At arm.json, the metrics, TensorBoard's events, a checkpoint."""
    expected, codes = run_content(clean / "run"), []
    for kib in sizes:
        with SmallDisk(tmp_path / str(kib), f"size={kib}k") as disk:
            run = disk.path / "run"
            outcome = stages.run(*stage2(clean, run))
            codes.append(outcome.code)
            if outcome.code != 0:
                refused(outcome, "No space left on device")
                assert not temporaries(disk.path)
            disk.remount(ROOMY)
            again = stages.run(*stage2(clean, run))
            assert again.code == 0, again.output
            assert run_content(run) == expected, kib
    tried(codes.count(2), "full disks under stage 2")


@pytest.mark.promise(promised.REFUSED)
def test_stage_2_on_a_read_only_disk_and_over_the_file_size_limit(stages, clean, tmp_path, tried):
    with SmallDisk(tmp_path / "disk", ROOMY) as disk:
        disk.remount("ro")
        refused(stages.run(*stage2(clean, disk.path / "run")), "Read-only file system")
    child = stages.start(*stage2(clean, tmp_path / "run"))
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (8000, 8000))
    child.release()
    refused(Outcome(child.wait(), child.output(), child.pid), "File too large")
    assert not temporaries(tmp_path / "run")
    assert stages.run(*stage2(clean, tmp_path / "run")).code == 0
    assert run_content(tmp_path / "run") == run_content(clean / "run")
    tried(2, "read-only disks and file size limits under stage 2")


def stage3(clean: Path, run: Path) -> list[str]:
    return ["stage3_eval", "--recipe", str(clean / "recipe.yaml"), "--set", f"run_dir={run}"]


def answers(run: Path) -> dict[str, object]:
    """What was generated, and the table of what it is worth."""
    found: dict[str, object] = {"table": (run / "report" / "table.md").read_text(encoding="utf-8")}
    for path in (run / "predictions").rglob("*.jsonl.zst"):
        found[str(path.relative_to(run))] = predictions.load(path).predictions
    assert len(found) == 3, "a table and the answers of two checkpoints"
    return found


@pytest.mark.promise(promised.REFUSED)
@pytest.mark.parametrize(
    "sizes",
    [pytest.param([4, 32], id="2 sizes"), pytest.param([0, *range(4, 260, 12)], id="all", marks=crashes.LONG)],
)
def test_stage_3_on_a_full_disk(stages, clean, tmp_path, tried, sizes):
    """At the predictions of each checkpoint, the scores, the tables, the pictures; and where nothing may be written."""
    expected = answers(clean / "run")
    used = sum(
        -(-path.stat().st_size // 4096) * 4 for path in (clean / "run" / "students").rglob("*") if path.is_file()
    )
    codes = []
    for kib in sizes:
        with SmallDisk(tmp_path / str(kib), ROOMY) as disk:
            run = disk.path / "run"
            shutil.copytree(clean / "run" / "students", run / "students")
            disk.remount(f"size={used + kib}k")
            if kib == 4:
                disk.remount("ro")
                refused(stages.run(*stage3(clean, run)), "Read-only file system")
                disk.remount("rw")
            outcome = stages.run(*stage3(clean, run))
            codes.append(outcome.code)
            if outcome.code != 0:
                refused(outcome, "No space left on device")
                assert not temporaries(disk.path)
            disk.remount(ROOMY)
            again = stages.run(*stage3(clean, run))
            assert again.code == 0, again.output
            assert answers(run) == expected
    tried(codes.count(2) + 1, "full or read-only disks under stage 3")


@pytest.mark.promise(promised.REFUSED)
def test_stages_without_permission(stages, clean, tmp_path, tried):
    run = tmp_path / "run"
    for folder, command in ((tmp_path, stage1(clean, tmp_path / "cache")), (run, stage2(clean, run))):
        run.mkdir(exist_ok=True)
        with forbidden(folder):
            refused(stages.run(*command, bound=True), "Permission denied")
            assert not temporaries(tmp_path)
        assert stages.run(*command, bound=True).code == 0
    with forbidden(run):
        refused(stages.run(*stage3(clean, run), bound=True), "Permission denied")
        assert not temporaries(tmp_path)
    assert stages.run(*stage3(clean, run), bound=True).code == 0
    assert answers(run) == answers(clean / "run") and run_content(run) == run_content(clean / "run")
    tried(3, "folders without permission under the stages")
