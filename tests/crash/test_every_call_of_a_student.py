"""Stage 2, killed or refused at every system call by which it changes its run folder, one run each.

The oracle is a run that nobody disturbed: every checkpoint (adapter, optimizer, state) and arm.json byte for byte, the
metrics but for the speed. TensorBoard's files are killed at too, but not compared: they have times in them.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import crashes
import promised
import pytest
import toys
from crashes import run_content
from syscalls import Point, inject, needs_strace, trace

from pipeline.recipe import load_recipe
from stage2_student.checkpoint import complete_steps

TWO_STEPS = {"steps": 2, "save_every": 1}
EACH = [
    pytest.param(20, id="every 20th"),
    pytest.param(1, id="all", marks=crashes.LONG),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = toys.tiny_recipe(tmp_path_factory.mktemp("recipe"), train=TWO_STEPS, arms={"sft": None})
    toys.fill_cache(load_recipe(str(path)))
    return path


@pytest.fixture(scope="module")
def clean(stages, recipe, tmp_path_factory):
    """An undisturbed run, and the calls that made it."""
    needs_strace()
    run = tmp_path_factory.mktemp("clean") / "run"
    points = trace(stages, student(recipe, run), run)
    assert {"openat", "write", "fsync", "rename", "mkdir"} <= {point.call for point in points}
    assert sum(point.line.endswith("/metrics.jsonl") and point.call == "write" for point in points) == 2
    assert {"mkdir", "openat", "write"} <= {point.call for point in points if "/tensorboard" in point.line}
    return run_content(run), points


def student(recipe: Path, run: Path) -> list[str]:
    return ["stage2_student", "--recipe", str(recipe), "--set", f"run_dir={run}"]


def sound(run: Path, expected: dict[str, object]) -> None:
    """What has its name is what it will be in the end; only the metrics may lag behind, or end in half a line."""
    arm = run / "students" / "toy" / "distill"
    for step in complete_steps(arm.joinpath("checkpoints")):
        folder = arm / "checkpoints" / f"step-{step:06d}"
        state = json.loads((folder / "state.json").read_text())
        for name, digest in (("adapter_model", "adapter_sha256"), ("optimizer", "optimizer_sha256")):
            assert sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest() == state[digest]
    for path in (p for p in run.rglob("*") if p.is_file() and ".tmp" not in str(p) and "tensorboard" not in p.parts):
        name = str(path.relative_to(run))
        assert path.name == "metrics.jsonl" or path.read_bytes() == expected[name], name


def chosen(points: list[Point], stride: int) -> list[tuple[int, Point]]:
    """All of them, or a few: then none that opens a file, since many others are opened in an order that varies."""
    if stride == 1:
        return list(enumerate(points))
    return [(i, point) for i, point in enumerate(points) if point.call != "openat"][::stride]


def resumed(stages, recipe: Path, run: Path) -> dict[str, object]:
    """What another process makes of what is there."""
    again = stages.run(*student(recipe, run))
    assert again.code == 0, again.output
    return run_content(run)


@pytest.mark.promise(promised.CRASH)
@pytest.mark.parametrize("stride", EACH)
def test_killed_at_every_call(stages, recipe, clean, tmp_path, tried, stride):
    expected, points = clean
    saved = []
    for i, point in chosen(points, stride):
        run = tmp_path / str(i)
        assert inject(stages, student(recipe, run), run, point, "signal=SIGKILL").code == -9, point
        sound(run, expected)
        saved.append(len(complete_steps(run / "students" / "toy" / "distill" / "checkpoints")))
        assert resumed(stages, recipe, run) == expected, point
    assert saved == sorted(saved) and set(saved) >= {0, 1}
    tried(len(saved), "system calls of stage 2, killed at each")


def test_control_a_checkpoint_written_in_place_is_caught(stages, recipe, clean, tmp_path):
    """Without its optimizer, under its final name, it is found out."""
    expected, points = clean
    last = next(point for point in points if point.line.endswith("step-000002"))
    run = tmp_path / "run"
    assert inject(stages, student(recipe, run), run, last, "signal=SIGKILL").code == -9
    checkpoints = run / "students" / "toy" / "distill" / "checkpoints"
    (half,) = checkpoints.glob(".tmp*")
    (half / "optimizer.safetensors").write_bytes(b"")
    half.rename(checkpoints / "step-000002")
    with pytest.raises(AssertionError):
        sound(run, expected)


@pytest.mark.promise(promised.REFUSED)
@pytest.mark.parametrize("stride", EACH)
def test_refused_at_every_call(stages, recipe, clean, tmp_path, tried, stride):
    """ENOSPC, or EIO, once: an error that says so, or a call that was not needed; another run ends the same."""
    expected, points = clean
    ended, wrong = [], []
    for i, point in chosen(points, stride):
        run = tmp_path / str(i)
        outcome = inject(stages, student(recipe, run), run, point, f"error={['ENOSPC', 'EIO'][i % 2]}")
        ended.append(outcome.code)
        if "Traceback" in outcome.output or outcome.code != (2 if "error: " in outcome.output else 0):
            wrong.append(f"{point}: {outcome}")
        sound(run, expected)
        assert resumed(stages, recipe, run) == expected, point
    assert not wrong, "\n".join(wrong)
    assert ended.count(2) > len(ended) / 2, "most calls are needed"
    tried(len(ended), "system calls of stage 2, refused at each")
