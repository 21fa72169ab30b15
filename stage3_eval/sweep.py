"""`python -m stage3_eval.sweep`: compare the points of a sweep, from the predictions that they kept. Loads no model.

`python -m pipeline sweep` starts it at its end; with the same `--over` it can be run again at any time. A point of
which something is missing is listed with its reason, and the others are compared; the exit code is then 3.
"""

import argparse
import io
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from pipeline.cli import EXIT_INCOMPLETE, guarded, parsed, recipe_parser
from pipeline.commands.sweep import add_sweep_arguments
from pipeline.output import result

if TYPE_CHECKING:
    from pipeline.sweep import Point
    from stage3_eval.blocks import Block, Blocks
    from stage3_eval.evaluate import Evaluated
    from stage3_eval.report.sweep import ArmRow, StudentRows
    from stage3_eval.score import Scores

EXAMPLES = ("python -m stage3_eval.sweep --over train.lr=5e-4,1e-3 --against train.lr=1e-3",)
JSON, TABLE = "comparison.json", "comparison.md"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = recipe_parser("stage3_eval.sweep", "Compare the points of a sweep.", EXAMPLES)
    add_sweep_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Score all points' predictions, compare them, write the comparison and print it."""
    args = parsed(parser(), argv)

    from cache_schema.atomic import publish
    from pipeline.errors import RunError
    from pipeline.progress import progress
    from pipeline.sweep import chosen, points
    from stage3_eval.blocks import Blocks
    from stage3_eval.report.sweep import FORMAT, StudentRows, compared, document

    found = points(args.recipe, args.overrides, args.over)
    against, blocks = chosen(found, args.against), Blocks(found[0].recipe)
    students: dict[str, StudentRows] = {}
    caches: dict[str, str] = {}
    listed: list[dict[str, Any]] = []
    with progress("comparison", len(found), "points") as bar:
        for point in found:
            missing = _read(point, blocks, students, caches)
            run_dir = str(point.run_dir.root)
            told = {"point": point.label, "settings": dict(point.settings), "run_dir": run_dir, "missing": missing}
            listed.append(told)
            bar.advance()
    comparison = {
        "format": FORMAT,
        "recipe": found[0].recipe.name,
        "over": list(args.over),
        "against": against.label,
        "points": listed,
        **compared(students, against.label),
    }
    text, folder = document(comparison), against.run_dir.root.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        publish(folder / TABLE, text.encode())
        publish(folder / JSON, (json.dumps(comparison, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise RunError(f"{folder}: the comparison cannot be written: {error.strerror or error}") from None
    result(f"\n{text}", files=[str(folder / name) for name in (TABLE, JSON)])
    print(f"report   {folder / TABLE}\nreport   {folder / JSON}")
    return EXIT_INCOMPLETE if any(of["missing"] for of in listed) else 0


def _read(
    point: "Point", blocks: "Blocks", students: "dict[str, StudentRows]", caches: dict[str, str]
) -> dict[str, str]:
    """Put a point's scores into the students' rows; what of it is missing, and why.

    caches: the fingerprint of the cache that points were trained from -> the first one of these points.
    """
    from pipeline.errors import UserError
    from stage3_eval.evaluate import ModelRun
    from stage3_eval.report.sweep import StudentRows

    missing = {}
    for student in point.recipe.students:
        try:
            with redirect_stdout(io.StringIO()):  # that no model is loaded, of every point and student
                model = ModelRun(point.recipe, student, blocks, point.arguments, rescore=True).evaluate()
            rows = [_arm_row(point, model, arm, blocks.scored) for arm in point.recipe.arms]
        except UserError as error:
            missing[student] = str(error)
            continue
        found = sorted({str(run.trained_with["cache"]) for run in model.runs if "cache" in run.trained_with})
        for cache in found:
            caches.setdefault(cache, point.label)
        if other := next((cache for cache in found if cache != next(iter(caches))), None):
            missing[student] = _other_cache(point, other, caches)
            continue
        of_student = students.setdefault(student, StudentRows())
        of_student.arms += [row for row in rows if row is not None]
        for of in blocks.scored:
            _add_untouched(point, model, of, of_student)
        lacking = {run.name for run in point.recipe.arm_runs} - {run.name for run in model.runs}
        missing |= {f"{student}/{name}": "it has no answers" for name in sorted(lacking)}
        steps = point.recipe.train.steps
        short = {run.name: run.last for run in model.runs if run.last < steps}
        missing |= {f"{student}/{name}": f"its last answers are of step {at} of {steps}" for name, at in short.items()}
    return missing


def _other_cache(point: "Point", other: str, caches: Mapping[str, str]) -> str:
    """Why a point is left out that was trained from another cache: data or a teacher's folder changed in between."""
    cache, first = next(iter(caches.items()))
    return (
        f"trained from the cache {other[:12]}, but {first} from {cache[:12]}, and only points of one cache are "
        "compared; remove the folder of the one that is out of date, and run the same sweep "
        f"(of this one: rm -r {shlex.quote(str(point.run_dir.root))})"
    )


def _arm_row(point: "Point", model: "Evaluated", arm: str, blocks: "Sequence[Block]") -> "ArmRow | None":
    from cache_schema.manifest import fingerprint_of
    from stage3_eval.report.sweep import ArmRow, held_out_mean

    headlines = {
        run.name.removeprefix(arm): run.checkpoints[model.headline[run.name]] for run in model.runs if run.arm == arm
    }
    if not headlines:
        return None
    tables: dict[str, dict[str, dict[str, Scores]]] = {}
    answers: dict[str, dict[str, str]] = {}
    for block in blocks:
        for seed, condition in headlines.items():
            for task, scores in _scores(point, model, condition.name, block).items():
                tables.setdefault(block.name, {}).setdefault(task, {})[seed] = scores
            identity = model.files[condition.name, block.name].identity
            answers.setdefault(block.name, {})[seed] = fingerprint_of(dict(identity))
    chosen_by = [(model.held_out.get(of.run or "", {}), of.step or 0) for of in headlines.values()]
    scored = [steps[step] for steps, step in chosen_by if step in steps]
    shown = {seed: condition.step or 0 for seed, condition in headlines.items()}
    return ArmRow(point.label, arm, tables, shown, answers, held_out_mean(scored))


def _add_untouched(point: "Point", model: "Evaluated", block: "Block", to: "StudentRows") -> None:
    """The untouched student's scores, once for all points; where a swept key makes it another one, under its point's
    name too."""
    from cache_schema.manifest import fingerprint_of
    from stage3_eval.conditions import asked, baselines

    for condition in baselines(point.recipe):
        if not asked(condition, block) or (condition.name, block.name) not in model.files:
            continue
        answers = fingerprint_of(dict(model.files[condition.name, block.name].identity))
        known = to.untouched.setdefault((block.name, condition.name), {})
        if answers in known:
            continue
        known[answers] = f"{condition.name}, {point.label}" if known else condition.name
        for task, scores in _scores(point, model, condition.name, block).items():
            to.baselines.setdefault(block.name, {}).setdefault(task, {})[known[answers]] = scores


def _scores(point: "Point", model: "Evaluated", condition: str, block: "Block") -> "dict[str, Scores]":
    """task -> its first metric on a block; of several tasks ALL as well."""
    from pipeline.tasks import get_task
    from stage3_eval.report.sweep import ALL, together
    from stage3_eval.score import score

    answers, where = model.answers(condition, block.name), f"{model.name}/{condition} on {block.name}"
    settings = point.recipe.eval.metrics
    found = {
        task: score(examples, answers, where, settings, [get_task(task).metrics[0]])
        for task, examples in block.tasks.items()
    }
    return {ALL: together(found), **found} if len(found) > 1 else found


if __name__ == "__main__":
    sys.exit(guarded(main))
