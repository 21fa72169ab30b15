"""The command line in processes of its own: killed and resumed, two together, and how fast it answers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from safetensors.torch import load_file

from cache_schema.schema import Status
from pipeline.recipe import Recipe, load_recipe
from pipeline.run_dir import ArmDir, RunDir
from stage2_student.__main__ import main

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def made(tmp_path: Path, edit: Callable[[Any], Any] = lambda row: row, **overrides: Any) -> tuple[str, Recipe]:
    path = str(toys.tiny_recipe(tmp_path, **overrides))
    toys.fill_cache(load_recipe(path), edit)
    return path, load_recipe(path)


def command(path: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "stage2_student", "--recipe", path, *more]


def metrics(folder: ArmDir) -> list[dict[str, float]]:
    return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """SIGKILL at whatever step it happens to be in; the oracle is a run that nobody disturbed."""
    path, recipe = made(
        tmp_path,
        students={"toy": {"lora": {"dropout": 0.1}}},
        train={"steps": 40, "save_every": 3, "batch_size": 5},
        arms={"sft": None, "distill": {"ce": 1.0, "logit_mse": 0.5, "kl": 0.5}},
    )
    folder = RunDir.of(recipe).arm("toy", "distill")
    process = subprocess.Popen(command(path), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (folder.metrics.exists() and folder.metrics.read_text().count("\n") >= 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= len(folder.metrics.read_text().splitlines()) < 40, "it was to be killed on its way"

    undisturbed = f"run_dir={tmp_path / 'undisturbed'}"
    assert main(["--recipe", path]) == 0
    assert main(["--recipe", path, "--set", undisturbed]) == 0
    other = RunDir.of(load_recipe(path, [undisturbed])).arm("toy", "distill")
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (folder.checkpoint(40) / name).read_bytes() == (other.checkpoint(40) / name).read_bytes()
    for found, expected in zip(metrics(folder), metrics(other), strict=True):
        assert found | {"tokens_per_s": 0} == expected | {"tokens_per_s": 0}


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Slices of 3 and 2 examples, two and one micro-batches: the same losses, up to the order of float sums.

    Answers have lost different shares of their teacher's positions, so every component has a count of its own.
    """

    def edit(row: Any) -> Any:
        lost = np.arange(len(row.status)) % (2 + int(row.example_id[-1]) % 3) == 1
        return replace(row, status=np.where(lost, Status.NOT_FINITE, Status.USABLE).astype(np.uint8))

    path, recipe = made(
        tmp_path,
        edit,
        train={"steps": 4, "save_every": 4, "batch_size": 5, "micro_batch_size": 2},
        arms={"sft": None, "distill": {"ce": 1.0, "logit_mse": 0.5, "kl": 0.5, "uld": 0.5}},
    )
    done = subprocess.run(
        command(path, "--set", "runtime.processes=2"), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x cpu") == 1  # only one of them speaks
    folder = RunDir.of(recipe).arm("toy", "distill")
    assert json.loads((folder.checkpoint(4) / "state.json").read_text())["provenance"]["processes"] == 2

    alone = ["--set", f"run_dir={tmp_path / 'alone'}", "--set", "train.micro_batch_size=5"]
    assert main(["--recipe", path, *alone]) == 0
    other = RunDir.of(load_recipe(path, alone[1::2])).arm("toy", "distill")
    for found, expected in zip(metrics(folder), metrics(other), strict=True):
        for name in ("positions", "aligned", "tokens"):
            assert found[name] == expected[name]
        assert 0 < found["aligned"] < found["positions"]
        for name in ("loss", "ce", "logit_mse", "kl", "uld", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    ours, theirs = (load_file(f.checkpoint(4) / "adapter_model.safetensors") for f in (folder, other))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 1e-5, name


def test_help_and_what_is_done_load_no_model_code(tmp_path: Path) -> None:
    """--help imports nothing heavy; a finished recipe and a report neither peft nor accelerate nor a model's code."""
    path, _ = made(tmp_path, train={"steps": 1})
    assert main(["--recipe", path]) == 0
    probe = (
        "import sys; from stage2_student.__main__ import main\n"
        "for arguments in {commands!r}:\n"
        "    try: code = main(arguments)\n"
        "    except SystemExit as exit: code = exit.code\n"
        "    assert code == 0\n"
        "loaded = {{m for m in {heavy!r} if m in sys.modules}}\n"
        "assert not loaded, loaded"
    )
    for commands, heavy in (
        ([["--help"]], ["torch", "transformers", "numpy", "pydantic"]),
        (
            [["--recipe", path], ["--recipe", path, "--alignment"]],
            ["peft", "accelerate", "stage2_student.train", "transformers.models.qwen3.modeling_qwen3"],
        ),
    ):
        code = probe.format(commands=commands, heavy=heavy)
        done = subprocess.run(
            [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_a_users_mistake_is_exit_code_2_without_a_traceback(tmp_path: Path) -> None:
    path = str(toys.tiny_recipe(tmp_path))
    done = subprocess.run(command(path), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"there is no cache at {tmp_path / 'cache'}" in done.stderr and "Traceback" not in done.stderr
