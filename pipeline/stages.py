"""The stages as processes: their names and their command lines. Who starts one asks here."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import RunError
from pipeline.stopping import run_child

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

STAGES = ("stage1_teacher", "stage2_student", "stage3_eval")


def stage_command(module: str, recipe: "Recipe", arguments: Sequence[str]) -> list[str]:
    """The command line of a stage, or of a program in one (`stage2_student.export`), in the interpreter that the recipe
    names for the stage."""
    stage = module.partition(".")[0]
    python = recipe.runtime.python.get(stage, sys.executable)  # type: ignore[call-overload]
    return [python, "-m", module, *arguments]


def run_stage(command: Sequence[str], stdout: int | None = None) -> int:
    """Run what `stage_command` gave; its exit code. stdout: a file descriptor, ours unless given.

    Raises RunError where the interpreter cannot be started, Stopped as `stopping.run_child` does.
    """
    try:
        return run_child(command, stdout)
    except OSError as error:
        python, _, module, *_ = command
        raise RunError(
            f"runtime.python.{module.partition('.')[0]}: expected a Python interpreter, found {python}: "
            f"{error.strerror}"
        ) from None
