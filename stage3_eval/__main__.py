"""`python -m stage3_eval --recipe R`: score references, untouched students and every checkpoint, and report.

Answers that are there are not generated again, so a second call only scores; `--rescore` promises it, and needs
neither the models nor the checkpoints. A checkpoint that cannot be loaded or generated is left out and listed, with
exit code 3; the same command tries just those again. `--executor ray` generates on a cluster; see
stage1_teacher/RAY.md.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pipeline.cli import (
    EXIT_INCOMPLETE,
    add_executor_argument,
    guarded,
    parsed,
    recipe_arguments,
    recipe_of,
    recipe_parser,
)
from pipeline.output import facts, result

if TYPE_CHECKING:
    from pipeline.handout import Unit
    from pipeline.recipe import Recipe
    from stage3_eval.answers import Job
    from stage3_eval.blocks import Blocks
    from stage3_eval.evaluate import Evaluated


EXAMPLES = (
    "python -m stage3_eval",
    "python -m stage3_eval --recipe pocket-uld --rescore",
    "python -m stage3_eval --recipe gsm8k-qwen3 --set eval.engine=hf --set runtime.device=cpu",
    "python -m stage3_eval --recipe flan-uld --student gpt2-medium --executor ray",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "Score references, untouched students and every checkpoint, with error bars."
    parser = recipe_parser("stage3_eval", about, EXAMPLES)
    add_executor_argument(parser)
    parser.add_argument("--student", metavar="NAME", help="generate for this student alone")
    parser.add_argument(
        "--rescore", action="store_true", help="never generate: score the predictions that were kept, without a model"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Generate what is missing, score everything, write the report, and print its table."""
    args = parsed(parser(), argv)
    recipe = recipe_of(args)

    from pipeline.errors import RunError, unknown_name

    if args.student is not None and args.student not in recipe.students:
        raise RunError(f"--student {args.student}: {unknown_name('student', args.student, recipe.students)}")

    from pipeline.tasks import get_task
    from stage3_eval.blocks import Blocks
    from stage3_eval.metrics import check_available
    from stage3_eval.report import write_report
    from stage3_eval.viewer import look_inside

    started, arguments = time.monotonic(), recipe_arguments(args)
    check_available((metric for task in recipe.data.tasks for metric in get_task(task).metrics), recipe.eval.metrics)
    blocks = Blocks(recipe)
    evaluated = _evaluated(recipe, blocks, arguments, args.rescore, args.student)
    if any(model.files for model in evaluated):
        command = ["stage3_eval", *arguments, *(["--rescore"] if args.rescore else [])]
        inside = look_inside(recipe, blocks.scored, evaluated, args.rescore)
        table, files = write_report(recipe, blocks.scored, evaluated, command, inside)
        result(f"\n{table}", files=[str(path) for path in files])
        for path in files:
            print(f"{'picture' if path.suffix == '.png' else 'report '}  {path}")
        print(f"done in {time.monotonic() - started:.0f} s")
    return _say_missing(evaluated, arguments)


def _evaluated(
    recipe: "Recipe", blocks: "Blocks", arguments: Sequence[str], rescore: bool, student: str | None
) -> "list[Evaluated]":
    """Every model with its answers, generated where they are missing, here or on a cluster. student: that one alone,
    and the others whose answers are all there. All models are found before one runs."""
    from stage3_eval.answers import Answers
    from stage3_eval.evaluate import ModelRun

    evaluated = []
    with ExitStack() as stack:
        make: Callable[[Answers, Sequence[Job], str], dict[Unit, str]] = Answers.make
        if recipe.runtime.executor != "local" and not rescore:
            from stage3_eval.executor_ray import Crew

            make = stack.enter_context(Crew(recipe)).make
        names = [*recipe.eval.references, *recipe.students]
        runs = [ModelRun(recipe, name, blocks, arguments, rescore, make) for name in names]
        for run in runs:  # one after another: each frees its memory before the next
            for lacking, why in run.missing.items():
                print(f"{run.name}/{lacking}: {why}", flush=True)
            if student not in (None, run.name) and not run.complete():
                print(f"{run.name}: not asked for, and some of its answers are missing; it is left out of the report")
                continue
            evaluated.append(run.evaluate())
    return evaluated


def _say_missing(evaluated: "Sequence[Evaluated]", arguments: Sequence[str]) -> int:
    """What was left out and why, and the command that tries just these again; the exit code."""
    missing = [f"{model.name}/{name}: {why}" for model in evaluated for name, why in model.missing.items()]
    facts(missing=missing)
    if not missing:
        return 0
    lines = [f"{len(missing)} conditions are missing in the report; all that was generated is kept:", *missing]
    again = shlex.join(["python", "-m", "stage3_eval", *arguments])
    print("\n  ".join(lines) + f"\nTo try just these again:\n  {again}", file=sys.stderr)
    return EXIT_INCOMPLETE


if __name__ == "__main__":
    sys.exit(guarded(main))
