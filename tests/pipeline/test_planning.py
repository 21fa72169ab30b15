"""What a probe's numbers mean for the whole: arithmetic, checked against the whole and by hand."""

import math
import random

import pytest
import toys

from pipeline.plan_text import told
from pipeline.planning import (
    Prices,
    Run,
    added,
    break_even,
    cache_bytes,
    counts,
    in_hours,
    in_money,
    plan_of,
    recommended_k,
    stage1_seconds,
    summed,
    total_of,
)
from pipeline.recipe import load_recipe


def test_the_error_covers_the_truth_as_often_as_it_says():
    """Of 400 samples of 50 from 300 skewed lengths, about 95 % lie within two standard errors."""
    draw = random.Random(0)
    population = [int(draw.lognormvariate(4, 0.5)) for _ in range(300)]
    truth = sum(population)
    totals = [total_of(draw.sample(population, 50), 300) for _ in range(400)]
    within = {z: sum(abs(t.value - truth) <= z * t.error for t in totals) / 400 for z in (2.0, 0.5)}
    assert 0.92 < within[2.0] < 0.98
    assert within[0.5] < 0.5  # the control: a narrower claim would be wrong


def test_what_was_counted_whole_has_no_error():
    assert (total_of([3, 4, 5], 3).value, total_of([3, 4, 5], 3).error) == (12, 0)
    assert total_of([3], 9).error == math.inf and "?" in str(total_of([3], 9))
    assert added([total_of([1, 3], 4), total_of([1, 3], 4)]).error == pytest.approx(4)


PROBE = {
    "tasks": {"a": 100, "b": 20},
    "sample": {
        "a": {"positions": [10, 12, 14, 12], "whole": [110, 112, 114, 112], "own": [20, 22, 24, 22]},
        "b": {"positions": [5, 5], "whole": [55, 55], "own": [10, 10]},
    },
    "quarantined": 0,
    "shard_examples": 50,
    "text_bytes": 600,
    "dry": False,
    "device": "CPU",
    "load_s": 7.0,
    "capture_s": 2.0,
    "encode_s": 0.5,
    "peak_bytes": 10**9,
    "column_bytes": {"slots": 580, "prompt": 60, "id_order": 10, "footer": 100},
    "beyond": {
        "temperature": 1.0,
        "ranks": [16, 20, 32, 64],
        "tasks": {
            "a": {"all": {"n": 48, "median": [0.01] * 4, "p90": [0.02, 0.009, 0.009, 0.001]}},
            "b": {"all": {"n": 10, "median": [0.01] * 4, "p90": [0.03, 0.02, 0.0101, 0.0099]}},
        },
    },
}


def test_totals_by_task_and_bytes_by_column():
    every = summed(counts(PROBE))
    assert (every.examples, every.n, every.positions.value, every.own.value) == (120, 6, 1300, 2400)
    # numbers by position (1300 of 58), text by example (120 of 6), the order of ids and the footer by shard (3)
    whole = {"slots": 13000, "prompt": 1200, "id_order": 30, "footer": 300}
    assert cache_bytes(PROBE, every) == pytest.approx(whole)
    assert stage1_seconds(PROBE, every) == pytest.approx(7 + 2.0 * 2400 / 108)
    slow = PROBE | {"encode_s": 3.0}
    assert stage1_seconds(slow, every) == pytest.approx(7 + 3.0 * 2400 / 108)


def test_quarantined_examples_stand_for_their_share():
    found = counts(PROBE | {"quarantined": 2})  # 6 of 8 usable
    assert found["a"].positions.value == 12 * 75 and found["b"].positions.value == 5 * 15
    bytes_of = cache_bytes(PROBE | {"quarantined": 2}, summed(found))
    assert bytes_of["prompt"] == pytest.approx(60 * 120 / 8)  # 8 were drawn for the text of 6
    assert bytes_of["slots"] == pytest.approx(580 * (12 * 75 + 5 * 15) / 58)


@pytest.mark.parametrize(
    ("cache", "cached", "online", "runs"),
    [(10, 1, 6, 3), (10, 1, 5, 3), (9, 1, 10, 2), (1, 1, 10, 1), (0, 1, 2, 1), (10, 5, 5, None), (10, 6, 5, None)],
)
def test_break_even_is_the_first_run_that_pays(cache, cached, online, runs):
    assert break_even(cache, cached, online).runs == runs
    costs = [(cache + r * cached, r * online) for r in range(1, 50)]
    assert next((r for r, (with_cache, without) in enumerate(costs, 1) if with_cache < without), None) == runs


def test_hours_and_money():
    run = Run("s/a", 0.5, 1000, 32, True)
    hours = in_hours(3600, [run], 0.05)
    assert (hours.cache, hours.cached_run, hours.online_run) == (1, 500 / 3600, pytest.approx(2100 / 3600))
    assert hours.runs == 3
    assert in_money(hours, 2.5, 0).runs == 3  # the price of an hour alone changes nothing
    assert in_money(hours, 2.5, 5.0).runs == 7  # keeping the cache does
    assert in_money(hours, 0.0, 5.0).runs is None


def test_the_recommended_k_is_enough_for_every_task():
    assert recommended_k(PROBE["beyond"]) == 64  # 32 fails task b by 0.0001, and 20 is the recipe's, not of the list
    tasks = {"a": PROBE["beyond"]["tasks"]["a"]}
    assert recommended_k(PROBE["beyond"] | {"tasks": tasks}) == 32
    ranks = {"ranks": [16, 20], "tasks": {"a": {"all": {"n": 9, "median": [0.1] * 2, "p90": [0.5, 0.0]}}}}
    assert recommended_k(ranks) is None


def plan_for(tmp_path, probe=PROBE, **overrides):
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path, **overrides)))
    found = {"step_s": dict.fromkeys(recipe.arms, 2.0), "load_s": 1.0, "peak_bytes": 5, "dropped": 0}
    return recipe, plan_of(recipe, probe, {} if probe["dry"] else {"toy": found}, Prices(2.5, 0.02, 1))


def test_a_plan_in_words(tmp_path):
    recipe, plan = plan_for(tmp_path, train={"repeats": 3})
    text = told(recipe, plan)
    assert plan.runs == 6 and plan.teacher_runs == 3
    assert plan.stage2_hours == pytest.approx((6 * 4 * 2.0 + 1) / 3600)
    assert "K = 64 (the recipe has 16; --set cache.top_k=64)" in text
    assert "logit_mse sees nothing beyond K" in text and "kl puts" not in text
    assert "online is taken at its best" in text and "+- is one standard error" in text


def test_a_plan_that_cannot_say_so_says_so(tmp_path):
    recipe, plan = plan_for(tmp_path, arms={"distill": None})
    assert "Break-even: never. No arm" in told(recipe, plan)
    recipe, plan = plan_for(tmp_path, PROBE | {"beyond": None})
    assert "Probability beyond K: not known" in told(recipe, plan)
    dry = {k: v for k, v in PROBE.items() if not k.endswith("_s") and k not in ("beyond", "column_bytes", "peak_bytes")}
    recipe, plan = plan_for(tmp_path, dry | {"dry": True})
    text = told(recipe, plan)
    assert plan.stage1_hours is plan.hours is None and "an estimate: 1.33 bytes a rank" in text
    assert "No model was run" in text and "stage 1:" not in text
