"""One process for all crash tests that has imported the stages, and forks a run of one of them in no time."""

from collections.abc import Iterator

import crashes
import pytest

STAGES = """
import importlib, sys
import accelerate, peft, safetensors.torch, torch, transformers, torch.utils.tensorboard
from transformers.models.qwen3 import modeling_qwen3
import stage1_teacher.capture, stage1_teacher.teacher, stage2_student.train, stage3_eval.evaluate
from pipeline.cli import guarded

def run(stage, *arguments):  # what `python -m stage --recipe ...` does
    sys.argv = [stage, *arguments]
    return guarded(importlib.import_module(stage + ".__main__").main)
"""


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[crashes.ForkServer]:
    """`stages.start("stage1_teacher", "--recipe", path)` forks a run of it."""
    with crashes.ForkServer(STAGES, tmp_path_factory.mktemp("stages")) as server:
        yield server
