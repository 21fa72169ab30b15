"""Who gets what, and what is tried again: the rules of every executor, without a cluster."""

import pytest

from pipeline.cluster import placement
from pipeline.errors import UserError
from pipeline.handout import DEATHS, SAME_IN_A_ROW, Handout, Outcome, failed


def oops(unit, kind="oops"):
    return Outcome(unit, "failed", f"{kind} at {unit}", kind)


def work_off(handout, outcome_of, workers=(0,), missing=frozenset(range(100))):
    """Let workers take turns until nothing is left; the units that each was given."""
    given = {worker: [] for worker in workers}
    while not handout.over(workers):
        for worker in workers:
            if (unit := handout.next(worker)) is not None:
                given[worker].append(unit)
                outcome = outcome_of(worker, unit)
                if outcome is None:
                    handout.lost(worker, "killed", missing)
                else:
                    alone = len(handout.given_up) >= len(workers) - 1
                    handout.settle(worker, outcome, alone)
    return given


def test_each_unit_is_handed_out_once_and_in_order():
    handout = Handout(range(7))
    given = work_off(handout, lambda worker, unit: Outcome(unit, "done"), (0, 1))
    assert given == {0: [0, 2, 4, 6], 1: [1, 3, 5]}
    assert sorted(handout.done) == list(range(7)) and not handout.failures and not handout.untried


def test_a_failed_unit_is_kept_with_its_reason_and_the_others_go_on():
    handout = Handout(range(6))
    work_off(handout, lambda worker, unit: oops(unit) if unit in (1, 4) else Outcome(unit, "done"))
    assert handout.failures == {1: "oops at 1", 4: "oops at 4"} and handout.done == [0, 2, 3, 5]
    assert handout.report("shard {}".format) == ["shard 1 failed: oops at 1", "shard 4 failed: oops at 4"]


def test_the_same_error_in_a_row_stops_a_lone_worker_early():
    handout = Handout(range(10_000))
    given = work_off(handout, lambda worker, unit: oops(unit) if unit >= 2 else Outcome(unit, "done"))
    assert given[0] == [0, 1, *range(2, 2 + SAME_IN_A_ROW)]
    assert len(handout.untried) == 10_000 - 2 - SAME_IN_A_ROW and list(handout.failures) == [2, 3, 4]
    assert "not tried: shard 5, shard 6" in handout.report("shard {}".format)[-1]


def test_different_errors_in_a_row_do_not():
    handout = Handout(range(12))
    work_off(handout, lambda worker, unit: oops(unit, f"kind {unit % 2}"))
    assert len(handout.failures) == 12 and not handout.given_up


def test_what_a_broken_worker_fails_at_is_done_by_another():
    """A GPU that has gone bad fails at once, and would otherwise take the whole queue."""
    handout = Handout(range(20))
    given = work_off(handout, lambda worker, unit: oops(unit) if worker == 1 else Outcome(unit, "done"), (0, 1))
    assert len(given[1]) == SAME_IN_A_ROW and list(handout.given_up) == [1]
    assert sorted(handout.done) == list(range(20)) and not handout.failures


def test_units_that_fail_everywhere_fail_however_many_workers_try():
    handout = Handout(range(20))
    work_off(handout, lambda worker, unit: oops(unit) if unit < 3 else Outcome(unit, "done"), (0, 1))
    assert sorted(handout.done) == list(range(3, 20)) and list(handout.failures) == [0, 1, 2]


def test_a_dead_workers_unit_comes_next_and_only_that():
    handout = Handout(range(4))
    assert [handout.next(0), handout.next(1)] == [0, 1]
    handout.lost(0, "killed", {0, 1, 2, 3})
    assert handout.ours == {0} and handout.waiting == [0, 2, 3]
    assert handout.next(1) == 0


def test_a_dead_workers_unit_that_was_committed_is_not_done_again():
    handout = Handout(range(4))
    handout.next(0)
    handout.lost(0, "killed", {1, 2, 3})
    assert handout.done == [0] and handout.waiting == [1, 2, 3]


def test_a_unit_that_kills_every_worker_is_left_out():
    handout = Handout(range(4))
    given = work_off(handout, lambda worker, unit: None if unit == 2 else Outcome(unit, "done"), (0, 1))
    assert handout.failures == {2: f"{DEATHS} workers died at it, the last one of: killed"}
    assert sum(units.count(2) for units in given.values()) == DEATHS and sorted(handout.done) == [0, 1, 3]


def test_a_unit_that_has_seen_a_death_is_worked_at_alone():
    """The one that was being written when a worker died of the next one shall not be lost with it again."""
    handout = Handout(range(5))
    assert [handout.next(0), handout.suspect(0), handout.next(0)] == [0, False, 1]
    handout.lost(0, "killed", set(range(5)))
    assert [handout.suspect(0), handout.next(0), handout.suspect(0)] == [False, 0, True]
    handout.settle(0, Outcome(0, "done"))
    assert [handout.suspect(0), handout.next(0), handout.suspect(0)] == [False, 1, True]
    handout.settle(0, Outcome(1, "done"))
    assert [handout.next(0), handout.suspect(0), handout.next(0)] == [2, False, 3]


def test_a_worker_that_only_dies_is_not_started_for_ever():
    handout = Handout(range(50))
    given = work_off(handout, lambda worker, unit: None if worker == 1 else Outcome(unit, "done"), (0, 1))
    assert len(given[1]) == DEATHS and "died 3 times" in handout.given_up[1]
    assert sorted(handout.done) == list(range(50))


def test_what_others_have_claimed_is_offered_again_until_they_have_done_it():
    handout = Handout(range(3))
    answers = iter(["taken", "done", "taken"])
    for _ in range(3):
        unit = handout.next(0)
        handout.settle(0, Outcome(unit, next(answers)))
    assert handout.taken == [0, 2] and handout.next(0) is None and not handout.over([0])
    handout.offer_again({2})
    assert handout.waiting == [2] and handout.done == [1, 0]


def test_sizes_of_what_is_done_are_summed_once():
    handout, asked = Handout(range(4)), []

    def size(unit):
        asked.append(unit)
        return 10 * unit

    sums = []
    for _ in range(4):
        handout.settle(0, Outcome(handout.next(0), "done"))
        sums += [handout.size_done(size), handout.size_done(size)]
    assert sums == [0, 0, 10, 10, 30, 30, 60, 60] and asked == [0, 1, 2, 3]


def test_a_reason_names_class_place_and_notes():
    try:
        error = RuntimeError("cannot do 17 of 3")
        error.add_note("in the batch of train/7")
        raise error
    except RuntimeError as caught:
        outcome = failed(3, caught)
    assert outcome.reason.startswith("RuntimeError: cannot do 17 of 3 (at test_handout.py:")
    assert outcome.reason.endswith("; in the batch of train/7")
    assert outcome.kind == failed(4, RuntimeError("cannot do 9 of 88")).kind != failed(4, ValueError("x")).kind
    assert failed(3, UserError("say it")).reason == "say it"


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "gpus", "expected"),
    [
        ([{"CPU": 16.0, "GPU": 8.0}] * 2, "auto", None, 1, (16, {"num_cpus": 1, "num_gpus": 1})),
        ([{"CPU": 16.0, "GPU": 8.0}] * 2, "auto", None, 4, (4, {"num_cpus": 1, "num_gpus": 4})),
        ([{"CPU": 16.0, "GPU": 8.0}] * 2, "auto", None, None, (2, {"num_cpus": 1, "num_gpus": 8})),
        ([{"CPU": 16.0, "GPU": 8.0}, {"CPU": 4.0}], "cuda", 3, 1, (3, {"num_cpus": 1, "num_gpus": 1})),
        ([{"CPU": 16.0, "GPU": 8.0}] * 2, "cpu", None, 1, (2, {"num_cpus": 16})),
        ([{"CPU": 16.0}, {"CPU": 4.0}], "auto", None, 1, (2, {"num_cpus": 4})),
        ([{"CPU": 2.0}], "auto", 2, 1, (2, {"num_cpus": 1})),
        ([{"CPU": 2.0}], "auto", 5, 1, (5, {"num_cpus": 1})),
    ],
)
def test_workers_are_one_a_gpu_or_one_a_machine(nodes, device, workers, gpus, expected):
    assert placement(nodes, device, workers, gpus) == expected


def test_what_others_have_done_is_not_handed_out():
    """One listing says so; what is claimed elsewhere and not done stays where it is."""
    handout = Handout(range(6))
    assert handout.next(0) == 0
    handout.settle(0, Outcome(0, "taken"))
    handout.narrow({0, 3, 5})
    assert (handout.done, handout.taken, handout.waiting) == ([1, 2, 4], [0], [3, 5])
