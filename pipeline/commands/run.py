"""`python -m pipeline run`: all three stages, each in a process of its own.

So a stage's GPU memory is freed before the next one begins, and each can also be run, resumed and crash alone. What is
finished is found finished; `run` again is how to resume.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import EXIT_INCOMPLETE, add_executor_argument, add_recipe_arguments, recipe_arguments, recipe_of
from pipeline.errors import RunError
from pipeline.output import facts, result
from pipeline.stages import STAGES, run_stage, stage_command

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

HELP = "all three stages, each in a process of its own; resumes"
EXAMPLES = (
    "python -m pipeline run",
    "python -m pipeline run --recipe pocket-uld",
    "python -m pipeline run --recipe gsm8k-qwen3 --set train.lr=1e-4 --set run_dir=runs/slow",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--recipe`, `--set`, `--executor`."""
    add_recipe_arguments(parser)
    add_executor_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Run the stages in order; the exit code of the first that stops, or 3 where something is missing."""
    from pipeline.run_dir import RunDir

    recipe = recipe_of(args)
    run_dir = RunDir.of(recipe)
    remember(recipe, run_dir.recipe)
    started, incomplete = time.monotonic(), False
    for number, stage in enumerate(STAGES, 1):
        command = stage_command(stage, recipe, recipe_arguments(args))
        print(f"\n=== stage {number} of 3: {shlex.join(['python', *command[1:]])}", flush=True)
        before = time.monotonic()
        code = run_stage(command)
        incomplete |= code == EXIT_INCOMPLETE
        if code and not (stage == "stage2_student" and code == EXIT_INCOMPLETE):  # the arms that are trained are scored
            resume = shlex.join(["python", "-m", "pipeline", "run", *recipe_arguments(args)])
            print(f"\nstage {number} stopped with exit code {code}; to resume: {resume}", file=sys.stderr)
            facts(stopped_at=stage, run_dir=str(run_dir.root), resume=resume)
            return code
        print(f"=== stage {number} took {time.monotonic() - before:.0f} s", flush=True)
    seconds = time.monotonic() - started
    said = f"\nall three stages took {seconds:.0f} s; run folder: {run_dir.root}"
    result(said, run_dir=str(run_dir.root), seconds=seconds, incomplete=incomplete)
    if incomplete:
        print("something is missing, see above; the same command tries it again", file=sys.stderr)
    return EXIT_INCOMPLETE if incomplete else 0


def remember(recipe: "Recipe", path: Path) -> None:
    """Leave the resolved recipe beside its results."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}; set run_dir=<folder>") from None
