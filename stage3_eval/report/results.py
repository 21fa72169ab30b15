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
chrF). An unparsable answer counts as wrong, and so does a prompt that was too long to be asked; both are counted.
With several seeds a row is their mean, its error holds the seeds' and the examples' share, its counts are means too,
and `runs` has each. `difference` is to plain fine-tuning, `difference_to_distilled` that of a further distilled arm to
the first; always to the arm named in `to`, on the same examples, pair by pair and seed by seed; references are never
paired. `p_holm` is adjusted over the columns (metrics of tasks) of the same student, row
and block; in a curve over its checkpoints.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.progress import progress
from pipeline.recipe import Recipe
from pipeline.tasks import Example, get_task
from stage3_eval.blocks import Block
from stage3_eval.compare import Z_95, Difference, difference, estimate, holm, is_binary, over_seeds, p_over_seeds
from stage3_eval.conditions import ZERO_SHOT, asked, baselines
from stage3_eval.evaluate import Evaluated
from stage3_eval.metrics import describe
from stage3_eval.score import Scores
from stage3_eval.scorebook import ScoreBook

FORMAT = "logitbank results 2"
Runs = Mapping[str, Scores]  # seed of a row ("" the first, "~1", ...) -> its scores; of a baseline "" alone


def reference_arm(recipe: Recipe) -> str | None:
    """The arm that others are compared with: `sft`, else the first one that reads no teacher."""
    if "sft" in recipe.arms:
        return "sft"
    return next((name for name, arm in recipe.arms.items() if not arm.needs_teacher), None)


def pair_of(recipe: Recipe) -> tuple[str, str] | None:
    """The arms an experiment is about: plain fine-tuning, and the first arm that reads the teacher."""
    plain = reference_arm(recipe)
    distilled = next((name for name, arm in recipe.arms.items() if arm.needs_teacher), None)
    return (plain, distilled) if plain is not None and distilled is not None else None


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
        for model in models:
            for block in blocks:
                tables = made[model.name][block.name] = {}
                for task in block.tasks:
                    table = _student_table if model.name in recipe.students else _reference_table
                    tables[task] = table(recipe, book, model, block, task)
                    bar.advance(note=f"{model.name}, {task}, {block.name}")
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


def _reference_table(recipe: Recipe, book: ScoreBook, model: Evaluated, block: Block, task: str) -> dict[str, Any]:
    scores = book.of(model, ZERO_SHOT, block.name, block.tasks[task])
    return {metric: _row({"": scores}, metric) for metric in scores.measured}


def _student_table(recipe: Recipe, book: ScoreBook, model: Evaluated, block: Block, task: str) -> dict[str, Any]:
    """One task of a block: metric -> rows, curve, best on the block."""

    def scored(condition: str, on: Sequence[Example]) -> Scores:
        return book.of(model, condition, block.name, on)

    examples, curve = block.tasks[task], block.curve_tasks.get(task, ())
    untouched = [c.name for c in baselines(recipe) if asked(c, block) and (c.name, block.name) in model.files]
    rows: dict[str, dict[str, Scores]] = {name: {"": scored(name, examples)} for name in untouched}
    steps: dict[str, dict[str, int]] = {}
    curves: dict[str, dict[int, Scores]] = {}
    for run in model.runs:
        step, seed = model.headline[run.name], run.name.removeprefix(run.arm)
        steps.setdefault(run.arm, {})[seed] = step
        rows.setdefault(run.arm, {})[seed] = scored(run.checkpoints[step].name, examples)
        if run.is_first and curve:
            curves[run.arm] = {s: scored(run.checkpoints[s].name, curve) for s in sorted(run.checkpoints)}
    short = {name: scored(name, curve) for name in untouched} if curve else {}

    to = reference_arm(recipe)
    made = {}
    for metric in get_task(task).metrics if rows else ():
        curve_rows = {arm: _curve(of, curves.get(to or "", {}), metric, to, arm) for arm, of in curves.items()}
        made[metric] = {
            "right_or_wrong": all(
                is_binary(s.measured[metric].values) for runs in rows.values() for s in runs.values()
            ),
            "rows": {
                name: {**_row(runs, metric, steps.get(name)), **_differences(recipe, rows, name, metric)}
                for name, runs in rows.items()
            },
            "curve": curve_rows,
            "curve_baselines": {name: _cell(scores, metric) for name, scores in short.items()},
            f"best_on_{block.name}": {
                arm: _best(of, block.name, model.headline[arm]) for arm, of in curve_rows.items()
            },
        }
    return made


def _row(runs: Runs, metric: str, steps: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A row of a table: of one run, or over the seeds. steps: seed -> the checkpoint that stands for it."""
    cells = {seed: _cell(scores, metric) for seed, scores in runs.items()}
    if steps is not None:
        cells = {seed: {"checkpoint": steps[seed], **cell} for seed, cell in cells.items()}
    first = next(iter(cells.values()))
    if len(cells) == 1:
        return {"checkpoint": None, "seeds": 1 if steps else 0, **first}
    over = over_seeds([c["mean"] for c in cells.values()], [_error(c["interval"]) for c in cells.values()])
    counted = ("unparsable", "unfinished", "too_long", "tokens_per_answer")
    return {
        "checkpoint": first["checkpoint"] if len({c["checkpoint"] for c in cells.values()}) == 1 else None,
        "seeds": len(cells),
        "n": first["n"],
        "mean": over.mean,
        "standard_error": over.standard_error,
        "interval": [max(over.low, 0.0), min(over.high, 1.0)],
        **{key: sum(c[key] for c in cells.values()) / len(cells) for key in counted},
        "runs": list(cells.values()),
    }


def _cell(scores: Scores, metric: str) -> dict[str, Any]:
    """One run on its examples."""
    measured = scores.measured[metric]
    found = estimate(measured)
    return {
        "n": found.n,
        "mean": found.mean,
        "standard_error": found.standard_error,
        "interval": [found.low, found.high],
        "unparsable": measured.unparsable,
        "unfinished": scores.unfinished,
        "too_long": scores.too_long,
        "tokens_per_answer": scores.tokens / scores.n,
        **({"note": measured.note} if measured.note else {}),
    }


def _differences(recipe: Recipe, rows: Mapping[str, Runs], name: str, metric: str) -> dict[str, Any]:
    """What a row is compared with: see the module's text."""

    def to(other: str | None) -> dict[str, Any] | None:
        others = rows.get(other, {}) if other is not None and other != name else {}
        return _difference(_by_seed(rows[name], others, untouched=name not in recipe.arms), metric, other)

    made = {"difference": to(reference_arm(recipe))}
    pair = pair_of(recipe)
    if pair is not None and name in recipe.arms and name not in pair and recipe.arms[name].needs_teacher:
        made["difference_to_distilled"] = to(pair[1])
    return made


def _by_seed(runs: Runs, others: Runs, untouched: bool) -> list[tuple[Scores, Scores]]:
    """A row's scores beside those of another row's same seed; a baseline, which has no seeds, beside each of them."""
    return [(runs["" if untouched else seed], other) for seed, other in others.items() if untouched or seed in runs]


def _difference(pairs: Sequence[tuple[Scores, Scores]], metric: str, to: str | None) -> dict[str, Any] | None:
    """One row minus another, pair by pair and seed by seed; None where there is nothing to compare with."""
    assert all(scores.ids == other.ids for scores, other in pairs)
    found = [difference(scores.measured[metric], other.measured[metric]) for scores, other in pairs]
    if not found:
        return None
    if len(found) == 1:
        return {"to": to, "seeds": 1, **_compared(found[0])}
    means, errors = [d.mean for d in found], [_error((d.low, d.high)) for d in found]
    over = over_seeds(means, errors)
    return {
        "to": to,
        "seeds": len(found),
        "n": found[0].n,
        "mean": over.mean,
        "standard_error": over.standard_error,
        "interval": [max(over.low, -1.0), min(over.high, 1.0)],
        "p": p_over_seeds(means, errors),
        "test": "the interval over seeds and examples, inverted",
        "runs": [_compared(d) for d in found],
    }


def _error(interval: Sequence[float]) -> float:
    """What an interval stands for in `over_seeds`: unlike the standard error it does not vanish at 0 and 100 %."""
    return (interval[1] - interval[0]) / (2 * Z_95)


def _compared(found: Difference) -> dict[str, Any]:
    return {
        "n": found.n,
        "mean": found.mean,
        "standard_error": found.standard_error,
        "interval": [found.low, found.high],
        "p": found.p,
        "better": found.better,
        "worse": found.worse,
        "test": found.test,
    }


def _curve(
    steps: Mapping[int, Scores], others: Mapping[int, Scores], metric: str, to: str | None, arm: str
) -> list[dict[str, Any]]:
    """An arm's checkpoints, each against the reference's at the same step, p-values adjusted over the checkpoints."""
    rows = []
    for step, scores in steps.items():
        pairs = [(scores, others[step])] if step in others and arm != to else []
        rows.append({"step": step, **_cell(scores, metric), "difference": _difference(pairs, metric, to)})
    _adjust(row["difference"] for row in rows)
    return rows


def _adjust_over_columns(tables: Mapping[str, Any]) -> None:
    """Holm's adjustment of a block's differences, for each row over the columns: the metrics of all tasks."""
    names = {name: None for metrics in tables.values() for cells in metrics.values() for name in cells["rows"]}
    for name in names:
        rows = [cells["rows"].get(name, {}) for metrics in tables.values() for cells in metrics.values()]
        for kind in ("difference", "difference_to_distilled"):
            _adjust(row.get(kind) for row in rows)


def _adjust(differences: Iterable[dict[str, Any] | None]) -> None:
    compared = [found for found in differences if found is not None]
    for found, p in zip(compared, holm([found["p"] for found in compared]), strict=True):
        found["p_holm"] = p


def _best(rows: Sequence[Mapping[str, Any]], block: str, headline: int) -> dict[str, Any]:
    best = max(rows, key=lambda row: row["mean"])
    return {
        "step": best["step"],
        "n": best["n"],
        "mean": best["mean"],
        "is_headline": best["step"] == headline,
        "note": f"chosen on the {block} examples themselves, as publications do; biased upwards, not a result",
    }
