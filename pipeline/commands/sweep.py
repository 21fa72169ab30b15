"""`python -m pipeline sweep`: many students from one cache, a run folder each, and a table that compares them.

Stage 1 runs once, stages 2 and 3 for every combination of the values given. What two points would make alike (an arm
that the swept key does not touch, the untouched student's answers) is made once. The same command goes on where it
was stopped: finished points stay, and those that failed are tried again.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from pipeline.cli import EXIT_INCOMPLETE, add_executor_argument, add_recipe_arguments, recipe_arguments
from pipeline.errors import RecipeError, UserError
from pipeline.output import QUIET, mode, result
from pipeline.stages import STAGES, run_stage, stage_command
from pipeline.stopping import deferred

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.sweep import Point

HELP = "one cache, many students: every combination of some values, compared at the end; resumes"
EXAMPLES = (
    "python -m pipeline sweep --over train.lr=5e-4,1e-3 --over arms.distill.logit_mse=0.25,0.5,1",
    "python -m pipeline sweep --recipe gsm8k-qwen3 --over students.qwen3.lora.r=8,16,32 --over train.seed=0,1 --jobs 2",
    "python -m pipeline sweep --over train.lr=5e-4,1e-3 --against train.lr=1e-3",
)
LOG = "sweep.log"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--recipe`, `--set`, `--executor`, `--over`, `--against`, `--jobs`."""
    add_recipe_arguments(parser)
    add_executor_argument(parser)
    add_sweep_arguments(parser)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="points that run at the same time (1)")


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """What is swept and compared; `stage3_eval.sweep` takes the same."""
    parser.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="KEY=VALUE,VALUE,...",
        help="a key of students, train, arms or eval with its values; given often, every combination is a point",
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="the point that others are compared with, by as many of its values as it takes (the first point)",
    )


def run(args: argparse.Namespace) -> int:
    """Check all points, run what is left of them, compare; 3 where one of them failed or lacks something."""
    from pipeline.sweep import chosen, points

    if args.jobs < 1:
        raise RecipeError(f"--jobs {args.jobs}: expected 1 or more")
    found = points(args.recipe, args.overrides, args.over)
    chosen(found, args.against)
    print(f"{len(found)} points in {found[0].run_dir.root.parent}")
    left = [number for number, point in enumerate(found) if not is_finished(point)]
    for number, point in enumerate(found):
        print(f"  {point.label}: {'to be run' if number in left else 'finished'}", flush=True)
    if left:
        code = _stage("stage1_teacher", found[0].recipe, recipe_arguments(args))
        if code:
            print(f"\nstage 1 stopped with exit code {code}; no point was run", file=sys.stderr)
            return code
    failed = _run_points(found, left, args.jobs, args.jobs > 1 or mode() == QUIET)
    swept = [part for name in ("over", "against") for text in getattr(args, name) for part in (f"--{name}", text)]
    print("\n=== comparison", flush=True)
    compared = run_stage(stage_command("stage3_eval.sweep", found[0].recipe, [*recipe_arguments(args), *swept]))
    if failed:
        lines = [f"{len(failed)} of {len(found)} points are not finished; to try one of them alone:"]
        for number, why in failed.items():
            again = shlex.join(["python", "-m", "pipeline", "run", *found[number].arguments])
            lines.append(f"  {found[number].label}: {why}\n    {again}")
        print("\n".join([*lines, "the same sweep command tries them all again"]), file=sys.stderr)
    folder = found[0].run_dir.root.parent
    result(
        f"{len(found) - len(failed)} of {len(found)} points are finished; folder: {folder}",
        folder=str(folder),
        points={point.label: str(point.run_dir.root) for point in found},
        failed={found[number].label: why for number, why in failed.items()},
    )
    return compared or (EXIT_INCOMPLETE if failed else 0)


def is_finished(point: "Point") -> bool:
    """Whether the point's report is there, of these very settings, with nothing missing. Where and how it ran is no
    matter."""
    import json

    try:
        results = json.loads((point.run_dir.report / "results.json").read_text(encoding="utf-8"))
        reported, missing = results["provenance"]["recipe"], results["missing"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return not missing and _settings(reported) == _settings(point.recipe.model_dump(mode="json"))


def _settings(tree: object) -> object:
    """A recipe without what changes no result."""
    if not isinstance(tree, dict):
        return None
    from pipeline.sections import KEPT_APART

    train = {key: value for key, value in tree.get("train", {}).items() if key not in KEPT_APART}
    return {key: value for key, value in tree.items() if key not in ("runtime", "run_dir", "train")} | {"train": train}


def _run_points(found: "Sequence[Point]", left: Sequence[int], jobs: int, to_a_log: bool) -> dict[int, str]:
    """Run points, so many at once, each once those that it takes something from are done; point -> why it failed.

    to_a_log: what their stages print goes to a file of each point.
    """
    from pipeline.sweep import sources

    taken, failed = sources(found), {}
    waiting, running = list(left), dict[Future[str], int]()
    with (
        deferred("the points in work have come to their safe points"),
        ThreadPoolExecutor(jobs, thread_name_prefix="point") as pool,
    ):
        while waiting or running:
            unfinished = {*waiting, *running.values()}
            for number in [n for n in waiting if not unfinished & set(taken[n].values())][: jobs - len(running)]:
                waiting.remove(number)
                print(f"\n=== point {number + 1} of {len(found)}: {found[number].label}", flush=True)
                running[pool.submit(_run_point, found, number, taken[number], to_a_log)] = number
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(done)
                if why := done.result():
                    failed[number] = why
    return dict(sorted(failed.items()))


def _run_point(found: "Sequence[Point]", number: int, taken: dict[tuple[str, ...], int], to_a_log: bool) -> str:
    """Stages 2 and 3 of one point; why it is not finished, or nothing."""
    from pipeline.commands.run import remember
    from pipeline.reuse import take

    point, started = found[number], time.monotonic()
    try:
        remember(point.recipe, point.run_dir.recipe)
        for what in take(point, taken, found):
            print(f"{point.label}: taken from a point that made the same: {what}", flush=True)
        incomplete = False
        for stage in STAGES[1:]:
            code = _stage(stage, point.recipe, point.arguments, point if to_a_log else None)
            incomplete |= code == EXIT_INCOMPLETE
            if code not in (0, EXIT_INCOMPLETE):
                return f"stage {STAGES.index(stage) + 1} stopped with exit code {code}{_see(point, to_a_log)}"
    except UserError as error:
        return str(error)
    print(f"=== {point.label}: done in {time.monotonic() - started:.0f} s", flush=True)
    return f"something is missing in its report{_see(point, to_a_log)}" if incomplete else ""


def _see(point: "Point", to_a_log: bool) -> str:
    return f"; see {point.run_dir.root / LOG}" if to_a_log else ""


def _stage(stage: str, recipe: "Recipe", arguments: Sequence[str], logged: "Point | None" = None) -> int:
    """One stage in a process of its own; its exit code."""
    command = stage_command(stage, recipe, arguments)
    if logged is None:
        print(f"\n=== {shlex.join(['python', *command[1:]])}", flush=True)
        return run_stage(command)
    with (logged.run_dir.root / LOG).open("ab") as log:
        return run_stage(command, log.fileno())
