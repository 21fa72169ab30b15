"""The rows of `results.json`: a score or a difference with its error, of one training or over its seeds.

Called by `results`, whose text says what the fields mean. Pure: from the scores of examples to plain JSON.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.recipe import Recipe
from stage3_eval.compare import Difference, Estimate, difference, estimate, holm, over_seeds, p_over_seeds
from stage3_eval.score import Scores

Runs = Mapping[str, Scores]  # seed of a row ("" the first, "~1", ...) -> its scores; of a baseline "" alone


class Column(NamedTuple):
    """One metric of a task in a block, as all its rows have it: graded where any of them scores between right and
    wrong. So all intervals and tests of a column are of one kind.
    """

    metric: str
    graded: bool


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


def row_of(runs: Runs, column: Column, steps: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A row of a table: of one run, or over the seeds. steps: seed -> the checkpoint that stands for it."""
    found = {seed: estimate(scores.measured[column.metric], column.graded) for seed, scores in runs.items()}
    cells = {seed: _cell(scores, column.metric, found[seed]) for seed, scores in runs.items()}
    if steps is not None:
        cells = {seed: {"checkpoint": steps[seed], **cell} for seed, cell in cells.items()}
    first = next(iter(cells.values()))
    if len(cells) == 1:
        return {"checkpoint": None, "seeds": 1 if steps else 0, **first}
    over = over_seeds(list(found.values()))
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


def cell_of(scores: Scores, column: Column) -> dict[str, Any]:
    """One run on its examples."""
    return _cell(scores, column.metric, estimate(scores.measured[column.metric], column.graded))


def _cell(scores: Scores, metric: str, found: Estimate) -> dict[str, Any]:
    measured = scores.measured[metric]
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


def differences_of(recipe: Recipe, rows: Mapping[str, Runs], name: str, column: Column) -> dict[str, Any]:
    """What a row is compared with: plain fine-tuning and, of a further distilled arm, the first one."""

    def to(other: str | None) -> dict[str, Any] | None:
        others = rows.get(other, {}) if other is not None and other != name else {}
        return difference_of(by_seed(rows[name], others, untouched=name not in recipe.arms), column, other)

    made = {"difference": to(reference_arm(recipe))}
    pair = pair_of(recipe)
    if pair is not None and name in recipe.arms and name not in pair and recipe.arms[name].needs_teacher:
        made["difference_to_distilled"] = to(pair[1])
    return made


def by_seed(runs: Runs, others: Runs, untouched: bool) -> list[tuple[Scores, Scores]]:
    """A row's scores beside those of another row's same seed; a baseline, which has no seeds, beside each of them."""
    return [(runs["" if untouched else seed], other) for seed, other in others.items() if untouched or seed in runs]


def difference_of(pairs: Sequence[tuple[Scores, Scores]], column: Column, to: str | None) -> dict[str, Any] | None:
    """One row minus another, pair by pair and seed by seed; None where there is nothing to compare with."""
    assert all(scores.ids == other.ids for scores, other in pairs)
    metric, graded = column
    found = [difference(scores.measured[metric], other.measured[metric], graded) for scores, other in pairs]
    if not found:
        return None
    if len(found) == 1:
        return {"to": to, "seeds": 1, **_compared(found[0])}
    over = over_seeds(found)
    return {
        "to": to,
        "seeds": len(found),
        "n": found[0].n,
        "mean": over.mean,
        "standard_error": over.standard_error,
        "interval": [max(over.low, -1.0), min(over.high, 1.0)],
        "p": p_over_seeds(found),
        "test": "the interval over seeds and examples, inverted",
        "runs": [_compared(d) for d in found],
    }


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


def curve_of(
    steps: Mapping[int, Scores], others: Mapping[int, Scores], column: Column, to: str | None, arm: str
) -> list[dict[str, Any]]:
    """An arm's checkpoints, each against the reference's at the same step, p-values adjusted over the checkpoints."""
    rows = []
    for step, scores in steps.items():
        pairs = [(scores, others[step])] if step in others and arm != to else []
        rows.append({"step": step, **cell_of(scores, column), "difference": difference_of(pairs, column, to)})
    adjust(row["difference"] for row in rows)
    return rows


def adjust(differences: Iterable[dict[str, Any] | None]) -> None:
    """Holm's adjustment of differences that are looked at together."""
    compared = [found for found in differences if found is not None]
    for found, p in zip(compared, holm([found["p"] for found in compared]), strict=True):
        found["p_holm"] = p


def best_of(rows: Sequence[Mapping[str, Any]], block: str, headline: int) -> dict[str, Any]:
    """The best of a curve, labelled as what it is. headline: the step that stands for the arm."""
    best = max(rows, key=lambda row: row["mean"])
    return {
        "step": best["step"],
        "n": best["n"],
        "mean": best["mean"],
        "is_headline": best["step"] == headline,
        "note": f"chosen on the {block} examples themselves, as publications do; biased upwards, not a result",
    }
