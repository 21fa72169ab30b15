"""From scored conditions to `results.json`: every number with its n, its error and its test. Pure; called by `report`.

    students: <student>: {headline: {<arm>: {step, chosen}}, splits: <split>: <task>: <metric>:
        conditions:   zero_shot, few_shot and each arm by its name (its headline checkpoint), on all examples
        curve:        <arm>: its checkpoints by step, on the first curve_limit examples
        best_on_test: <arm>: the best of that curve, chosen on the very examples it is shown for: no estimate
    }

`accuracy` is the mean of the metric over n examples: the share right, where a metric is right or wrong. An unparsable
answer counts as wrong; a difference is always to the arm named in `to`, on the same examples, pair by pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.recipe import Recipe
from pipeline.tasks import Example
from stage3_eval.compare import difference, estimate, holm
from stage3_eval.conditions import Arm, baselines
from stage3_eval.evaluate import Evaluated, by_task
from stage3_eval.score import Scores, score

FORMAT = "logitbank results 1"


def reference_arm(recipe: Recipe) -> str | None:
    """The arm that others are compared with: `sft`, else the first one that reads no teacher."""
    if "sft" in recipe.arms:
        return "sft"
    return next((name for name, arm in recipe.arms.items() if not arm.needs_teacher), None)


def results(recipe: Recipe, students: Sequence[Evaluated], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Everything a report shows, as plain JSON. Raises RunError where a prediction is missing."""
    return {
        "format": FORMAT,
        "recipe": recipe.name,
        "reference": reference_arm(recipe),
        "select": recipe.eval.select,
        "curve_limit": recipe.eval.curve_limit,
        "students": {evaluated.student: _student(recipe, evaluated) for evaluated in students},
        "provenance": dict(provenance),
    }


def _student(recipe: Recipe, evaluated: Evaluated) -> dict[str, Any]:
    chosen = "the best on the held-out training rows" if recipe.eval.select == "held_out" else "the last one there is"
    return {
        "headline": {arm: {"step": step, "chosen": chosen} for arm, step in evaluated.headline.items()},
        "held_out_accuracy": {
            arm: {str(step): value for step, value in sorted(steps.items())}
            for arm, steps in evaluated.held_out.items()
        },
        "splits": {
            split: {
                task: _task(recipe, evaluated, split, examples, by_task(evaluated.curve[split]).get(task, []))
                for task, examples in by_task(evaluated.examples[split]).items()
            }
            for split in recipe.eval.splits
        },
    }


def _task(
    recipe: Recipe, evaluated: Evaluated, split: str, examples: Sequence[Example], curve: Sequence[Example]
) -> dict[str, Any]:
    """One split of one task: metric -> conditions, curve, best on the split."""

    def scored(condition: str, on: Sequence[Example]) -> Scores:
        return score(on, evaluated.answers[condition, split], f"{evaluated.student}/{condition} on {split}")

    names = {c.name: c.name for c in baselines(recipe) if (c.name, split) in evaluated.answers}
    names |= {arm.name: f"{arm.name}@{evaluated.headline[arm.name]}" for arm in evaluated.arms}
    headline = {name: scored(condition, examples) for name, condition in names.items()}
    short = {name: scored(condition, curve) for name, condition in names.items() if name not in recipe.arms}
    curves = {
        arm.name: {step: scored(arm.checkpoints[step].name, curve) for step in sorted(arm.checkpoints)}
        for arm in evaluated.arms
    }
    to = reference_arm(recipe)
    made = {}
    for metric in next(iter(headline.values())).values if headline else ():
        conditions = {
            name: {
                "checkpoint": evaluated.headline.get(name),
                **_cell(scores, metric),
                "difference": _difference(scores, headline.get(to or ""), metric, to) if name != to else None,
            }
            for name, scores in headline.items()
        }
        curve_rows = {arm: _curve(steps, curves.get(to or "", {}), metric, to, arm) for arm, steps in curves.items()}
        made[metric] = {
            "conditions": conditions,
            "curve": curve_rows,
            "curve_baselines": {name: _cell(scores, metric) for name, scores in short.items()},
            f"best_on_{split}": {arm: _best(rows, evaluated.headline[arm], split) for arm, rows in curve_rows.items()},
        }
    return made


def _cell(scores: Scores, metric: str) -> dict[str, Any]:
    found = estimate(scores.values[metric])
    return {
        "n": found.n,
        "accuracy": found.mean,
        "standard_error": found.standard_error,
        "interval": [found.low, found.high],
        "unparsable": scores.unparsable[metric],
        "unfinished": scores.unfinished,
        "tokens_per_answer": scores.tokens / scores.n,
    }


def _difference(scores: Scores, other: Scores | None, metric: str, to: str | None) -> dict[str, Any] | None:
    """This minus the other on the same examples; None where there is nothing to compare with."""
    if other is None:
        return None
    assert scores.ids == other.ids
    found = asdict(difference(scores.values[metric], other.values[metric]))
    low, high = found.pop("low"), found.pop("high")
    return {"to": to, **found, "interval": [low, high]}


def _curve(
    steps: Mapping[int, Scores], others: Mapping[int, Scores], metric: str, to: str | None, arm: str
) -> list[dict[str, Any]]:
    """An arm's checkpoints, each against the reference's at the same step, p-values adjusted over the checkpoints."""
    rows = [
        {
            "step": step,
            **_cell(scores, metric),
            "difference": _difference(scores, others.get(step), metric, to) if arm != to else None,
        }
        for step, scores in steps.items()
    ]
    compared = [row["difference"] for row in rows if row["difference"] is not None]
    for found, p in zip(compared, holm([found["p"] for found in compared]), strict=True):
        found["p_holm"] = p
    return rows


def _best(rows: Sequence[Mapping[str, Any]], headline: int, split: str) -> dict[str, Any]:
    best = max(rows, key=lambda row: row["accuracy"])
    return {
        "step": best["step"],
        "n": best["n"],
        "accuracy": best["accuracy"],
        "is_headline": best["step"] == headline,
        "note": f"chosen on the {split} examples themselves, as publications do; biased upwards, not a result",
    }


def arm_provenance(arms: Sequence[Arm]) -> dict[str, Any]:
    """What each arm says it was trained with."""
    return {arm.name: dict(arm.trained_with) for arm in arms}
