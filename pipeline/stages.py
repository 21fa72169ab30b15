"""The stages as processes: their names and their command lines. Who starts one asks here."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

STAGES = ("stage1_teacher", "stage2_student", "stage3_eval")


def stage_command(stage: str, recipe: "Recipe", arguments: Sequence[str]) -> list[str]:
    """The command line of one stage, in the interpreter that the recipe names for it."""
    python = recipe.runtime.python.get(stage, sys.executable)  # type: ignore[call-overload]
    return [python, "-m", stage, *arguments]
