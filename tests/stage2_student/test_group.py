"""What happens to one process alone, the others come to know: nobody waits for one that has given up."""

import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import together
import toys

from pipeline.recipe import Recipe, load_recipe
from pipeline.run_dir import RunDir
from stage2_student.__main__ import main


def made(tmp_path: Path, **overrides: Any) -> tuple[str, Recipe]:
    path = str(toys.tiny_recipe(tmp_path, **overrides))
    toys.fill_cache(load_recipe(path))
    return path, load_recipe(path)


def test_what_fails_on_one_process_stops_its_arm_on_all_and_no_other(tmp_path: Path) -> None:
    """Its part of a batch cannot be read, its memory runs out, it cannot begin; the main one's disk is full: before
    the last step, and with it. The last arm is whole, and the run ends by itself."""
    arms = ("load", "memory", "setup", "disk", "last", "whole")
    path, recipe = made(
        tmp_path,
        train={"steps": 4, "save_every": 2},
        arms={"sft": None, "distill": None, **{arm: {"ce": 1.0, "kl": 0.5} for arm in arms}},
    )
    faults = [
        ["load", 1, 2, "load"],
        ["memory", 1, 1, "backward"],
        ["setup", 1, 0, "setup"],
        ["disk", 0, 2, "save"],
        ["last", 0, 4, "save"],
    ]
    done = together.ran(together.torchrun(2, "--recipe", path), together.environment(tmp_path / "watch", faults))
    assert done.returncode != 0
    report = done.stderr[done.stderr.index("error: 5 of 6 arms failed; the others are trained:") :]
    for line in (
        r"- toy/load: process 1 of 2: shard 2: Input/output error",
        r"- toy/memory: process 1 of 2: can't allocate memory: 99 GB",
        r"- toy/setup: process 1 of 2: the adapter is not what it was",
        r"- toy/disk: saving the checkpoint of step 2 failed: No space left on device",
        r"- toy/last: saving the checkpoint of step 4 failed: No space left on device",
    ):
        assert re.search(line, report), (line, report)
    steps = {arm: [m["step"] for m in together.metrics(RunDir.of(recipe).arm("toy", arm))] for arm in arms}
    assert steps == {
        "load": [1, 2],
        "memory": [1],
        "setup": [],
        "disk": [1, 2],
        "last": [1, 2, 3, 4],
        "whole": [1, 2, 3, 4],
    }
    assert main(["--recipe", path]) == 0  # the same command again, with one process: all are trained
    for arm in arms:
        assert RunDir.of(recipe).arm("toy", arm).checkpoint(4).is_dir()


@pytest.mark.slow
def test_an_arm_whose_log_cannot_be_closed_fails_on_all(tmp_path: Path) -> None:
    """After the last step, on the main process alone: all end with the same exit code."""
    path, _ = made(tmp_path, train={"steps": 1}, arms={"sft": None})
    watch = tmp_path / "watch"
    done = together.ran(
        together.torchrun(2, "--recipe", path), together.environment(watch, [["distill", 0, 0, "close"]])
    )
    assert "- toy/distill: writing the metrics failed: No space left on device" in done.stderr
    assert [(watch / f"{rank}.code").read_text() for rank in (0, 1)] == ["3", "3"]


@pytest.mark.slow
def test_a_process_that_dies_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    path, _ = made(tmp_path, arms={"sft": None})
    faults = [["distill", 1, 1, "backward", "kill"]]
    began = time.monotonic()
    done = together.ran(together.torchrun(2, "--recipe", path), together.environment(tmp_path / "watch", faults))
    assert done.returncode != 0 and time.monotonic() - began < 100
    assert main(["--recipe", path]) == 0


@pytest.mark.slow
def test_processes_that_were_asked_for_other_things_are_refused(tmp_path: Path) -> None:
    """A machine with another recipe: the field, the process and the way out are named, on both."""
    path, _ = made(tmp_path, arms={"sft": None})
    port = together.free_port()
    env = together.environment(tmp_path / "watch")
    commands = [
        together.node(0, port, "--recipe", path),
        together.node(1, port, "--recipe", path, "--set", "train.lr=0.5", "--set", f"run_dir={tmp_path / 'other'}"),
    ]
    nodes = [
        subprocess.Popen(c, env=env, cwd=together.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    said = [node.communicate(timeout=120)[1] for node in nodes]
    assert all(node.returncode != 0 for node in nodes)
    for words in said:
        assert "the processes of this run were not asked for the same training:" in words
        assert re.search(r"toy/distill\.train\.lr: process 0 has 0\.001, process 1 on \S+ 0\.5", words)
