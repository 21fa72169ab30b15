"""Two machines, as far as the loopback goes: two launchers, each with a run folder of its own. See NODES.md."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import together
import toys
from safetensors.torch import load_file

from pipeline.recipe import load_recipe
from pipeline.run_dir import ArmDir, RunDir
from stage2_student.__main__ import main
from stage2_student.checkpoint import ADAPTER


def both(commands: list[list[str]], envs: list[dict[str, str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each, run at the same time; a hang fails."""
    nodes = [
        subprocess.Popen(c, env=env, cwd=together.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c, env in zip(commands, envs, strict=True)
    ]
    try:
        said = [node.communicate(timeout=150) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, *texts) for node, texts in zip(nodes, said, strict=True)]


def folder_of(path: str, run_dir: Path) -> ArmDir:
    return RunDir.of(load_recipe(path, [f"run_dir={run_dir}"])).arm("toy", "distill")


def assert_same(found: ArmDir, expected: ArmDir, step: int) -> None:
    """The same global batches and, within rounding, losses and adapter."""
    for ours, theirs in zip(together.metrics(found), together.metrics(expected), strict=True):
        assert [ours[k] for k in ("step", "positions", "tokens")] == [
            theirs[k] for k in ("step", "positions", "tokens")
        ]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    ours, theirs = (load_file(f.checkpoint(step) / ADAPTER) for f in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 1e-5, name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ArmDir]:
    """A recipe with its cache, and what one process makes of it."""
    tmp_path: Path = tmp_path_factory.mktemp("nodes")
    tree: dict[str, Any] = {
        "train": {"steps": 6, "save_every": 2, "batch_size": 5},
        "arms": {"sft": None, "distill": {"ce": 1.0, "logit_mse": 0.5}},
    }
    path = str(toys.tiny_recipe(tmp_path, **tree))
    toys.fill_cache(load_recipe(path))
    assert main(["--recipe", path, "--set", f"run_dir={tmp_path / 'alone'}"]) == 0
    return path, folder_of(path, tmp_path / "alone")


@pytest.mark.parametrize("shared", [True, False], ids=["shared disk", "a disk each"])
@pytest.mark.slow
def test_two_machines_are_one(alone: tuple[str, ArmDir], tmp_path: Path, shared: bool) -> None:
    """The documented command: the module itself, unwatched. With a disk each, only the main machine's has the run."""
    path, expected = alone
    runs = [tmp_path / "run", tmp_path / ("run" if shared else "second")]
    port = together.free_port()
    commands = [
        together.node(rank, port, "--recipe", path, "--set", f"run_dir={run}", module=True)
        for rank, run in enumerate(runs)
    ]
    ended = both(commands, [together.environment(tmp_path / "watch")] * 2)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "2 x cpu" in ended[0][1] and "2 x cpu" not in ended[1][1]  # really two; the main one speaks
    assert_same(folder_of(path, runs[0]), expected, 6)
    assert shared or not (runs[1] / "students").exists()


@pytest.mark.slow
def test_a_machine_dies_and_the_run_goes_on(alone: tuple[str, ArmDir], tmp_path: Path) -> None:
    """The second machine's power fails in step 4: the first ends by itself. Both are started again, the second with an
    empty disk: they go on from the first one's checkpoint of step 2. The control: the adapter of
    two steps before is not the same."""
    path, expected = alone
    runs, faults = [tmp_path / "run", tmp_path / "second"], [["distill", 1, 3, "backward", "kill"]]
    watch = tmp_path / "watch"
    for attempt in range(2):
        port = together.free_port()
        commands = [
            together.node(rank, port, "--recipe", path, "--set", f"run_dir={run}") for rank, run in enumerate(runs)
        ]
        ended = both(commands, [together.environment(watch, [] if attempt else faults)] * 2)
        folder = folder_of(path, runs[0])
        if attempt == 0:
            assert all(code != 0 for code, *_ in ended)
            assert [folder.checkpoint(step).is_dir() for step in (2, 4)] == [True, False]
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "toy/distill: to go on from step 2 (6 steps)" in ended[0][1]
    assert_same(folder, expected, 6)
    shutil.copy(folder.checkpoint(2) / ADAPTER, folder.checkpoint(4) / ADAPTER)
    with pytest.raises(AssertionError):
        assert_same(folder, expected, 4)
