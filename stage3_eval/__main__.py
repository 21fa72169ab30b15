"""`python -m stage3_eval --recipe R`: score references, untouched students and every checkpoint, and report.

Answers that are there are not generated again, so a second call only scores; `--rescore` promises it, and needs
neither the models nor the checkpoints.
"""

import sys
import time
from collections.abc import Sequence

from pipeline.cli import guarded, recipe_arguments, recipe_of, recipe_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Generate what is missing, score everything, write the report, and print its table."""
    parser = recipe_parser("stage3_eval", "Score references, untouched students and every checkpoint, with error bars.")
    parser.add_argument("--student", metavar="NAME", help="generate for this student alone")
    parser.add_argument(
        "--rescore", action="store_true", help="never generate: score the predictions that were kept, without a model"
    )
    args = parser.parse_args(argv)
    recipe = recipe_of(args)

    from pipeline.errors import RunError, unknown_name

    if args.student is not None and args.student not in recipe.students:
        raise RunError(f"--student {args.student}: {unknown_name('student', args.student, recipe.students)}")

    from pipeline.tasks import get_task
    from stage3_eval.blocks import Blocks
    from stage3_eval.evaluate import ModelRun
    from stage3_eval.metrics import check_available
    from stage3_eval.report import write_report

    started, arguments = time.monotonic(), recipe_arguments(args)
    check_available((metric for task in recipe.data.tasks for metric in get_task(task).metrics), recipe.eval.metrics)
    blocks, evaluated = Blocks(recipe), []
    names = [*recipe.eval.references, *recipe.students]
    runs = [ModelRun(recipe, name, blocks, arguments, args.rescore) for name in names]  # all are found before one runs
    for run in runs:  # one after another: each frees its memory before the next
        for note in run.notes:
            print(note, flush=True)
        if args.student not in (None, run.name) and not run.complete():
            print(f"{run.name}: not asked for, and some of its answers are missing; it is left out of the report")
            continue
        evaluated.append(run.evaluate())
    command = ["stage3_eval", *arguments, *(["--rescore"] if args.rescore else [])]
    table, files = write_report(recipe, blocks.scored, evaluated, command)
    print(f"\n{table}")
    for path in files:
        print(f"{'picture' if path.suffix == '.png' else 'report '}  {path}")
    print(f"done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
