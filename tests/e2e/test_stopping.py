"""Ctrl-C and SIGTERM to real stages: they stop at a safe point, and what they say goes on to the same end."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import toys
import zstandard

from pipeline.recipe import load_recipe
from pipeline.run_dir import RunDir
from stage2_student.__main__ import main as train
from stage2_student.checkpoint import complete_steps, drop_between

ROOT = Path(__file__).parent.parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def stopped(command: list[str], there: Callable[[], bool], *signals: int, group: bool = False) -> tuple[int, str]:
    """Exit code and output of a command that gets signals once something is `there`. It is frozen before it gets them,
    so that it cannot come to its end meanwhile."""
    with subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, "-m", *command],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not there():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.001)
        send = os.killpg if group else os.kill
        for signum in (signal.SIGSTOP, *signals, signal.SIGCONT):
            send(process.pid, signum)
        said, _ = process.communicate(timeout=200)
    assert "Traceback" not in said, said
    return process.returncode, said


def gone_on(said: str) -> str:
    """What the command that a stopped process names prints, run to its end."""
    command = shlex.split(re.findall(r"^\s*(?:.*to resume: )?(python -m .*)$", said, re.MULTILINE)[-1])
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "shards").glob("?????.json"))


def long_run(folder: Path, **overrides: object) -> tuple[str, Callable[[], bool]]:
    """A cache and a recipe of 60 steps with a checkpoint every 50; and whether 3 steps are logged."""
    path = str(toys.tiny_recipe(folder, train={"steps": 60, "save_every": 50}, arms={"sft": None}, **overrides))
    toys.fill_cache(load_recipe(path))
    log = RunDir.of(load_recipe(path)).arm("toy", "distill").metrics
    return path, lambda: log.exists() and log.read_text().count("\n") >= 3


@pytest.mark.slow
def test_stage_1_writes_the_shard_in_work_and_goes_on(tmp_path: Path) -> None:
    recipe = str(toys.tiny_recipe(tmp_path, cache={"shard_examples": 1}))
    code, said = stopped(["stage1_teacher", "--recipe", recipe], lambda: len(records(tmp_path)) >= 2, signal.SIGINT)
    assert code == 130 and "stopping when the shards in work are written" in said
    assert 2 <= len(records(tmp_path)) < 22, "it was to be stopped on its way"
    shards = tmp_path / "cache" / "shards"
    assert len(list(shards.glob("*.parquet"))) == len(records(tmp_path)), "what was begun was written, or is not there"
    out = gone_on(said)
    assert "sealed, examples 22 in = 22 written" in out


def test_only_what_a_stop_left_behind_is_removed(tmp_path: Path) -> None:
    for step in (7, 50, 77, 100, 130):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}" / "state.json").touch()
    drop_between(tmp_path, save_every=50, before=100)
    assert complete_steps(tmp_path) == [50, 100, 130]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_a_second_signal_ends_stage_1_at_once(tmp_path: Path) -> None:
    recipe = str(toys.tiny_recipe(tmp_path, cache={"shard_examples": 1}))
    code, said = stopped(
        ["stage1_teacher", "--recipe", recipe], lambda: len(records(tmp_path)) >= 2, signal.SIGINT, signal.SIGTERM
    )
    assert code == 130 and "stopped at once" in said
    done = subprocess.run([sys.executable, "-m", "stage1_teacher", "--recipe", recipe], cwd=ROOT, env=ENV, check=False)
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stage_2_saves_its_step_and_ends_as_if_nobody_had_stopped_it(
    tmp_path: Path, processes: int, signum: int, code: int
) -> None:
    """To the byte, with two processes too, which stop at the same step; the step that it stopped at leaves no trace."""
    path, there = long_run(tmp_path, runtime={"processes": processes})
    found, said = stopped(["stage2_student", "--recipe", path], there, signum)
    assert found == code, said
    arm = RunDir.of(load_recipe(path)).arm("toy", "distill")
    (checkpoint,) = arm.checkpoints.glob("step-*/state.json")
    step = int(checkpoint.parent.name.removeprefix("step-"))
    assert 3 <= step < 50, "it was to be stopped between two checkpoints"
    assert len(arm.metrics.read_text().splitlines()) == step
    out = gone_on(said)
    assert f"to go on from step {step}" in out
    assert sorted(p.name for p in arm.checkpoints.glob("step-*")) == ["step-000050", "step-000060"]

    undisturbed = f"run_dir={tmp_path / 'undisturbed'}"
    command = [sys.executable, "-m", "stage2_student", "--recipe", path, "--set", undisturbed]
    assert subprocess.run(command, cwd=ROOT, env=ENV, check=False, capture_output=True).returncode == 0
    other = RunDir.of(load_recipe(path, [undisturbed])).arm("toy", "distill")
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (arm.checkpoint(60) / name).read_bytes() == (other.checkpoint(60) / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code", "group"), [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, True)])
def test_a_cluster_finishes_what_it_has_in_work(tmp_path: Path, signum: int, code: int, group: bool) -> None:
    """Ray would end the driver at once at a SIGTERM: its handler is not kept."""
    pytest.importorskip("ray", reason="ray is not installed")
    runtime = {"executor": "ray", "workers": 1}
    recipe = str(toys.tiny_recipe(tmp_path, cache={"shard_examples": 1}, runtime=runtime))
    begun = lambda: len(records(tmp_path)) >= 2  # noqa: E731
    found, said = stopped(["stage1_teacher", "--recipe", recipe], begun, signum, group=group)
    assert found == code and "what the workers have in work is done" in said
    assert 2 <= len(records(tmp_path)) < 22, "it was to be stopped on its way"
    assert len(list((tmp_path / "cache" / "shards").glob("*.parquet"))) == len(records(tmp_path))
    assert "sealed, examples 22 in = 22 written" in gone_on(said)


@pytest.mark.slow
def test_where_one_of_torchruns_processes_is_told_all_stop_at_the_same_step(tmp_path: Path) -> None:
    """The second one, which saves nothing itself. What torchrun makes of it (a traceback of its own) is torchrun's."""
    path, there = long_run(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "stage2_student", "--recipe", path]
    with subprocess.Popen(
        command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        deadline = time.monotonic() + 120
        while not there():
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()
            time.sleep(0.001)
        children = map(int, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split())
        (second,) = (p for p in children if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes())
        os.kill(second, signal.SIGTERM)
        said, _ = run.communicate(timeout=200)
    assert "stage2_student FAILED" in said and "exitcode  : 143" in said, said
    arm = RunDir.of(load_recipe(path)).arm("toy", "distill")
    (step,) = complete_steps(arm.checkpoints)
    assert 3 <= step < 50 and len(arm.metrics.read_text().splitlines()) == step
    out = gone_on(f"python -m stage2_student --recipe {path}")
    assert f"to go on from step {step}" in out and complete_steps(arm.checkpoints) == [50, 60]


@pytest.mark.slow
def test_stage_3_keeps_the_batch_in_work_and_goes_on(tmp_path: Path) -> None:
    """Eight answers a condition, one a batch: saved at the end of each condition, or where it is stopped."""
    recipe = str(toys.tiny_recipe(tmp_path, train={"steps": 40, "save_every": 1}, eval={"batch_size": 1}))
    toys.fill_cache(load_recipe(recipe))
    assert train(["--recipe", recipe]) == 0
    kept = tmp_path / "run"

    def files() -> list[Path]:
        return list((kept / "predictions").rglob("*.jsonl.zst"))

    code, said = stopped(["stage3_eval", "--recipe", recipe], lambda: bool(files()), signal.SIGTERM)
    assert code == 143 and "stopping when the batch in work is kept" in said, said
    texts = [zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes()) for path in files()]
    before = sum(text.count(b'"prediction"') for text in texts)
    assert not (kept / "report" / "table.md").exists(), "it was to be stopped on its way"
    out = gone_on(said)
    there = re.search(r"toy: ([\d,]+) of ([\d,]+) answers are there", out)
    assert there and int(there[1].replace(",", "")) == before > 0 and (kept / "report" / "table.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("group", [True, False], ids=["as a terminal does", "the parent alone"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_front_door_stops_its_stage_and_says_how_to_go_on(
    tmp_path: Path, group: bool, signum: int, code: int
) -> None:
    path, there = long_run(tmp_path)
    found, said = stopped(["pipeline", "run", "--recipe", path], there, signum, group=group)
    assert found == code, said
    assert "stopped at once" not in said
    arm = RunDir.of(load_recipe(path)).arm("toy", "distill")
    (checkpoint,) = arm.checkpoints.glob("step-*/state.json")
    step = int(checkpoint.parent.name.removeprefix("step-"))
    assert 3 <= step < 50 and said.rstrip().endswith(f"python -m pipeline run --recipe {path}")
    out = gone_on(said)
    assert f"to go on from step {step}" in out and "all three stages took" in out
