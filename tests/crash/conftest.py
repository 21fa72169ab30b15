"""Two processes for all crash tests: one has imported a cache's writer, one the stages; they fork runs in no time."""

from collections.abc import Iterator

import crashes
import pytest
from forks import ForkServer

STAGES = """
import importlib, sys
import accelerate, peft, safetensors.torch, tensorboard.summary.writer.record_writer, torch, transformers
from transformers.models.qwen3 import modeling_qwen3
import stage1_teacher.capture, stage1_teacher.teacher, stage2_student.train, stage3_eval.evaluate
from pipeline.cli import guarded

def run(stage, *arguments):  # what `python -m stage --recipe ...` does
    sys.argv = [stage, *arguments]
    return guarded(importlib.import_module(stage + ".__main__").main)
"""


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """`stages.start("stage1_teacher", "--recipe", path)` forks a run of it."""
    with ForkServer(STAGES, tmp_path_factory.mktemp("stages")) as server:
        yield server


@pytest.fixture(scope="session")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """`writers.start(folder)` forks a process that fills and seals a toy cache."""
    with ForkServer(crashes.WRITER, tmp_path_factory.mktemp("writers")) as server:
        yield server
