"""The comparison of a sweep, from scores made up here: every number can be counted by hand."""

import pytest

from stage3_eval.compare import Measured, holm, mcnemar
from stage3_eval.report.sweep import ALL, ArmRow, StudentRows, compared, document, together
from stage3_eval.score import Scores


def scores(right, n=20, metric="acc"):
    """The first `right` of n examples are right."""
    values = tuple(float(i < right) for i in range(n))
    return Scores(tuple(f"e{i}" for i in range(n)), {metric: Measured(values)}, 0, 3 * n)


def arm(point, right, *, name="distill", blocks=("test",), trained=None, held_out=None, seeds=("",)):
    """right: block -> how many of 20 are right, or one number for all."""
    counts = right if isinstance(right, dict) else dict.fromkeys(blocks, right)
    tables = {block: {"task": {seed: scores(n + i) for i, seed in enumerate(seeds)}} for block, n in counts.items()}
    known_by = {block: dict.fromkeys(seeds, trained or f"{point}-{name}") for block in counts}
    return ArmRow(point, name, tables, dict.fromkeys(seeds, 4), known_by, held_out)


def rows_of(found, block="test"):
    return {(row["point"], row["arm"]): row for row in found["students"]["s"][block]["tables"]["task"]["rows"]}


def test_differences_are_paired_and_adjusted_over_all_of_them():
    found = compared({"s": StudentRows([arm("a", 8), arm("b", 14), arm("c", 16), arm("d", 8)])}, "a")
    rows = rows_of(found)
    assert rows["a", "distill"]["difference"] is None
    better = [6, 8, 0]
    plain = [mcnemar(count, 0) for count in better]
    assert [rows[p, "distill"]["difference"]["p"] for p in "bcd"] == plain
    assert [rows[p, "distill"]["difference"]["p_holm"] for p in "bcd"] == holm(plain) != plain
    assert rows["b", "distill"]["difference"]["mean"] == pytest.approx(0.3)
    assert (rows["b", "distill"]["difference"]["better"], found["compared"]) == (6, 3)


def test_what_was_trained_once_is_compared_once():
    """sft at c and d is one training: it takes one place in the adjustment, and both rows show the same."""
    sft = [
        arm(p, n, name="sft", trained=t) for p, n, t in (("a", 8, "x"), ("b", 8, "x"), ("c", 13, "y"), ("d", 13, "y"))
    ]
    found = compared({"s": StudentRows([*sft, arm("a", 8), arm("b", 14)])}, "a")
    rows = rows_of(found)
    assert rows["b", "sft"]["same"] and rows["b", "sft"]["difference"] is None
    assert not rows["a", "sft"]["same"]
    adjusted = holm([mcnemar(5, 0), mcnemar(6, 0)])
    assert [rows[p, "sft"]["difference"]["p_holm"] for p in "cd"] == [adjusted[0]] * 2
    assert rows["b", "distill"]["difference"]["p_holm"] == adjusted[1]
    assert found["compared"] == 2
    assert found["students"]["s"]["test"]["best"]["among"] == 4


def test_one_training_of_two_arms_is_two_comparisons_where_they_are_with_two_trainings():
    """At b both arms are trained alike, at a they are not: each difference has its own p-value."""
    at_a = [arm("a", 8, name="weak", trained="x"), arm("a", 13, name="strong", trained="y")]
    found = compared({"s": StudentRows([*at_a, *(arm("b", 15, name=n, trained="z") for n in ("weak", "strong"))])}, "a")
    plain = [mcnemar(7, 0), mcnemar(2, 0)]
    differences = [rows_of(found)["b", name]["difference"] for name in ("weak", "strong")]
    assert [of["p"] for of in differences] == plain
    assert [of["p_holm"] for of in differences] == holm(plain)
    assert found["compared"] == 2


def test_an_arm_is_compared_with_the_same_arm_only():
    found = compared({"s": StudentRows([arm("a", 8, name="sft"), arm("b", 14)])}, "a")
    assert rows_of(found)["b", "distill"]["difference"] is None and found["compared"] == 0


def test_seeds_are_paired_with_seeds():
    rows = rows_of(compared({"s": StudentRows([arm("a", 8, seeds=("", "~1")), arm("b", 12, seeds=("", "~1"))])}, "a"))
    assert rows["b", "distill"]["seeds"] == 2
    assert [run["better"] for run in rows["b", "distill"]["difference"]["runs"]] == [4, 4]


@pytest.mark.parametrize(
    ("rows", "point", "chosen_on", "fair"),
    [
        ([arm("a", 8), arm("b", 14)], "b", "test", False),
        ([arm("a", 14), arm("b", 14)], "a", "test", False),  # of equals the first
        ([arm("a", {"validation": 9, "test": 8}), arm("b", {"validation": 7, "test": 14})], "a", "validation", True),
        ([arm("a", 8, held_out=0.7), arm("b", 14, held_out=0.6)], "a", "held_out", True),
    ],
)
def test_the_best_says_what_it_was_chosen_on(rows, point, chosen_on, fair):
    found = compared({"s": StudentRows(rows)}, "a")
    best = found["students"]["s"]["test"]["best"]
    assert (best["point"], best["chosen_on"], best["fair"]) == (point, chosen_on, fair)
    text = document({"recipe": "r", "against": "a", "points": [], **found})
    assert ("biased upwards" in text) == (chosen_on != "held_out")  # of the validation split's own best as well
    assert ("where it was not chosen" in text) == fair


def test_several_tasks_are_also_one_score_of_all_examples():
    both = together({"small": scores(2, n=5), "large": scores(20, n=20)})
    assert both.n == 25 and sum(both.measured[ALL].values) == 22 and len(set(both.ids)) == 25
    assert both.tokens == 75


def test_what_is_missing_is_listed():
    found = compared({"s": StudentRows([arm("a", 8)])}, "a")
    points = [{"point": "b", "missing": {"s/distill": "it has no answers"}}]
    assert "- b: s/distill: it has no answers" in document({"recipe": "r", "against": "a", "points": points, **found})
