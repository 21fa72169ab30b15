"""From predictions to `results.json`: every number with its n, its error and its test. Called by `report`.

    blocks:     <block>: <task>: {examples, contexts_cut}
    metrics:    <metric>: how it was computed
    references: <name>: {model, ..., blocks: <block>: <task>: <metric>: a row}
    students:   <name>: {headline: {<run>: {step, chosen}}, blocks: <block>: <task>: <metric>:
        rows:         zero_shot, few_shot and each arm by its name, its headline checkpoints over its seeds
        curve:        <arm>: the checkpoints of its first seed by step, on the first eval.curve_limit examples
        best_on_test: <arm>: the best of that curve, chosen on the very examples it is shown for: no estimate
    }

`mean` is the metric's mean over n examples (the share right, where it is right or wrong; the corpus score of BLEU and
chrF). A metric is `right_or_wrong` where no answer of any model to the task in the block scores between the two: all
rows, references included, have one kind of interval. An unparsable answer counts as wrong, and so does a prompt that
was too long to be asked; both are counted, apart from each other.
With several seeds a row is their mean, its error holds the seeds' and the examples' share, its counts are means too,
and `runs` has each. `difference` is to plain fine-tuning, `difference_to_distilled` that of a further distilled arm to
the first; always to the arm named in `to`, on the same examples, pair by pair and seed by seed; references are never
paired. `p_holm` is adjusted over the columns (metrics of tasks) of the same student, row
and block; in a curve over its checkpoints.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.progress import progress
from pipeline.recipe import Recipe
from pipeline.tasks import Example, get_task
from stage3_eval.blocks import Block
from stage3_eval.compare import is_binary
from stage3_eval.conditions import ZERO_SHOT, asked, baselines
from stage3_eval.evaluate import Evaluated
from stage3_eval.metrics import describe
from stage3_eval.report.rows import (
    Column,
    adjust,
    best_of,
    cell_of,
    curve_of,
    differences_of,
    pair_of,
    reference_arm,
    row_of,
)
from stage3_eval.score import Scores
from stage3_eval.scorebook import ScoreBook

FORMAT = "logitbank results 2"


def results(
    recipe: Recipe, blocks: Sequence[Block], models: Sequence[Evaluated], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything a report shows, as plain JSON. models: students and references. Raises RunError where a prediction is
    missing.
    """
    book = ScoreBook(recipe.eval.metrics)
    metrics = {metric: None for block in blocks for task in block.tasks for metric in get_task(task).metrics}
    made: dict[str, dict[str, Any]] = {model.name: {} for model in models}
    total = len(models) * sum(len(block.tasks) for block in blocks)
    with progress("scores and their errors", total, "tables") as bar:
        for block, task in ((of, task) for of in blocks for task in of.tasks):
            answered = {}
            for model in models:
                answered[model.name] = _answered(recipe, book, model, block, task)
                bar.advance(note=f"{model.name}, {task}, {block.name}")
            columns = _columns(task, answered.values())
            for model in models:
                table = _student_table if model.name in recipe.students else _reference_table
                tables = made[model.name].setdefault(block.name, {})
                tables[task] = table(recipe, model, block, answered[model.name], columns)
    students = [model for model in models if model.name in recipe.students]
    for model in students:
        for tables in made[model.name].values():
            _adjust_over_columns(tables)
    return {
        "format": FORMAT,
        "recipe": recipe.name,
        "reference": reference_arm(recipe),
        "pair": pair_of(recipe),
        "select": recipe.eval.select,
        "curve_limit": recipe.eval.curve_limit,
        "shots": recipe.eval.shots,
        "metrics": describe(recipe.eval.metrics, metrics),
        "blocks": {
            block.name: {
                task: {"examples": len(examples), "contexts_cut": sum(e.truncated for e in examples)}
                for task, examples in block.tasks.items()
            }
            for block in blocks
        },
        "references": {
            model.name: {
                **recipe.eval.references[model.name].model_dump(mode="json"),
                "blocks": made[model.name],
            }
            for model in models
            if model.name in recipe.eval.references
        },
        "students": {model.name: {**_choice(recipe, model), "blocks": made[model.name]} for model in students},
        "provenance": dict(provenance),
    }


def _choice(recipe: Recipe, model: Evaluated) -> dict[str, Any]:
    """Which checkpoints the headline rows are of, and what they were chosen on."""
    chosen = "the best on the held-out training rows" if recipe.eval.select == "held_out" else "the last one there is"
    return {
        "headline": {run: {"step": step, "chosen": chosen} for run, step in model.headline.items()},
        "held_out": {
            run: {str(step): value for step, value in sorted(steps.items())} for run, steps in model.held_out.items()
        },
    }


@dataclass
class _Answered:
    """What a model answered of one task of a block, scored. A reference has the one row ZERO_SHOT.

    rows: name -> seed -> scores of all examples. steps: arm -> seed -> its headline checkpoint. curves: arm -> step ->
    scores of the curve's examples. short: those of the untouched model.
    """

    rows: dict[str, dict[str, Scores]]
    steps: dict[str, dict[str, int]] = field(default_factory=dict)
    curves: dict[str, dict[int, Scores]] = field(default_factory=dict)
    short: dict[str, Scores] = field(default_factory=dict)

    def all(self) -> list[Scores]:
        """Every one of them."""
        groups: list[Mapping[Any, Scores]] = [*self.rows.values(), *self.curves.values(), self.short]
        return [scores for group in groups for scores in group.values()]


def _answered(recipe: Recipe, book: ScoreBook, model: Evaluated, block: Block, task: str) -> _Answered:
    def scored(condition: str, on: Sequence[Example]) -> Scores:
        return book.of(model, condition, block.name, on)

    examples, curve = block.tasks[task], block.curve_tasks.get(task, ())
    if model.name not in recipe.students:
        return _Answered({ZERO_SHOT: {"": scored(ZERO_SHOT, examples)}})
    untouched = [c.name for c in baselines(recipe) if asked(c, block) and (c.name, block.name) in model.files]
    found = _Answered({name: {"": scored(name, examples)} for name in untouched})
    for run in model.runs:
        step, seed = model.headline[run.name], run.name.removeprefix(run.arm)
        found.steps.setdefault(run.arm, {})[seed] = step
        found.rows.setdefault(run.arm, {})[seed] = scored(run.checkpoints[step].name, examples)
        if run.is_first and curve:
            found.curves[run.arm] = {s: scored(run.checkpoints[s].name, curve) for s in sorted(run.checkpoints)}
    found.short = {name: scored(name, curve) for name in untouched} if curve else {}
    return found


def _columns(task: str, answered: Iterable[_Answered]) -> list[Column]:
    """The metrics of a task, each graded if any score of any model is."""
    scores = [scores for model in answered for scores in model.all()]
    return [
        Column(metric, not all(is_binary(s.measured[metric].values) for s in scores))
        for metric in get_task(task).metrics
    ]


def _reference_table(
    recipe: Recipe, model: Evaluated, block: Block, found: _Answered, columns: Sequence[Column]
) -> dict[str, Any]:
    return {column.metric: row_of(found.rows[ZERO_SHOT], column) for column in columns}


def _student_table(
    recipe: Recipe, model: Evaluated, block: Block, found: _Answered, columns: Sequence[Column]
) -> dict[str, Any]:
    """One task of a block: metric -> rows, curve, best on the block."""
    to = reference_arm(recipe)
    made = {}
    for column in columns if found.rows else ():
        plain = found.curves.get(to or "", {})
        curves = {arm: curve_of(of, plain, column, to, arm) for arm, of in found.curves.items()}
        made[column.metric] = {
            "right_or_wrong": not column.graded,
            "rows": {
                name: {
                    **row_of(runs, column, found.steps.get(name)),
                    **differences_of(recipe, found.rows, name, column),
                }
                for name, runs in found.rows.items()
            },
            "curve": curves,
            "curve_baselines": {name: cell_of(scores, column) for name, scores in found.short.items()},
            f"best_on_{block.name}": {arm: best_of(of, block.name, model.headline[arm]) for arm, of in curves.items()},
        }
    return made


def _adjust_over_columns(tables: Mapping[str, Any]) -> None:
    """Holm's adjustment of a block's differences, for each row over the columns: the metrics of all tasks."""
    names = {name: None for metrics in tables.values() for cells in metrics.values() for name in cells["rows"]}
    for name in names:
        rows = [cells["rows"].get(name, {}) for metrics in tables.values() for cells in metrics.values()]
        for kind in ("difference", "difference_to_distilled"):
            adjust(row.get(kind) for row in rows)
