"""The word problems: right, readable, the same everywhere, and never shared between splits and pre-training."""

import hashlib
import random
import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.pocket import problems
from pipeline.pocket.problems import LARGEST, SPLIT_SIZES, draw_problem, pretraining_problems, split_problems

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")


@given(st.integers(min_value=0, max_value=2**32))
def test_every_calculation_is_right_and_leads_to_the_next(seed: int) -> None:
    problem = draw_problem(random.Random(seed))
    known = {int(number) for number in re.findall(r"\d+", problem.question)}
    for step in problem.steps:
        match = STEP.fullmatch(step)
        assert match
        left, operator, right, value = int(match[1]), match[2], int(match[3]), int(match[4])
        assert {left, right} <= known, f"{step} uses a number that nobody gave: {problem.question}"
        expected = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[operator]
        assert value == expected
        assert 1 <= value <= LARGEST
        known.add(value)
    assert problem.result == value
    assert problem.worked.endswith(f"\n#### {value}")
    assert len(problem.steps) in problems.LENGTHS


def test_a_split_is_the_same_on_every_platform() -> None:
    test = split_problems("test")
    assert test[0].question == (
        "Ana gets 8 apples a day for 3 days. She sells 2 packs of 7. How many apples has Ana now?"
    )
    assert test[0].worked == "8 * 3 = 24 apples. 2 * 7 = 14 apples. 24 - 14 = 10 apples. The answer is 10.\n#### 10"
    digest = hashlib.sha256("\n".join(p.question + p.worked for p in test).encode()).hexdigest()
    assert digest[:16] == "86b8cd2748e11315"


def test_splits_have_their_sizes_and_share_nothing() -> None:
    assert SPLIT_SIZES["test"] >= 2000
    assert SPLIT_SIZES["train"] >= 1000
    everything = [problem for split in SPLIT_SIZES for problem in split_problems(split)]
    assert {split: len(split_problems(split)) for split in SPLIT_SIZES} == SPLIT_SIZES
    assert len({problem.question for problem in everything}) == len(everything)
    assert len({problem.steps for problem in everything}) == len(everything)


def test_pretraining_never_sees_a_problem_of_a_split() -> None:
    reserved = {problem.question for split in SPLIT_SIZES for problem in split_problems(split)}
    seen = [problem.question for problem in islice(pretraining_problems(0), 20_000)]
    assert reserved.isdisjoint(seen)
    assert len(set(seen)) > 19_000


def test_pretraining_leaves_out_what_would_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter does something: with the stream's own problems reserved, the stream goes round them."""
    monkeypatch.setattr(problems, "held_out", frozenset)
    plain = list(islice(pretraining_problems(7), 50))
    monkeypatch.setattr(problems, "held_out", lambda: frozenset(problem.steps for problem in plain[::2]))
    filtered = list(islice(pretraining_problems(7), 25))
    assert filtered == plain[1::2]


def test_stories_vary() -> None:
    train = split_problems("train")
    openings = {re.sub(r"\d+", "n", problem.question) for problem in train}
    assert len(openings) > 1500
    assert len({len(problem.steps) for problem in train}) >= 2


def test_the_wording_is_chance_and_the_numbers_are_not() -> None:
    """Either order of a sum or a product, a unit or none, a closing sentence or none: each about half of the time."""
    worded = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)( \w+)?\.")
    swapped, commuting, units, written = 0, 0, 0, 0
    for problem in split_problems("train"):
        body = problem.worked.partition("\n")[0].removesuffix(f" The answer is {problem.result}.")
        matches = list(worded.finditer(body))
        assert " ".join(match[0] for match in matches) == body
        for match, step in zip(matches, problem.steps, strict=True):
            plain = STEP.fullmatch(step)
            assert plain
            assert (match[2], match[4]) == (plain[2], plain[4])
            assert {match[1], match[3]} == {plain[1], plain[3]}
            assert match[5] in (None, f" {problem.thing}")
            if match[2] in "+*" and plain[1] != plain[3]:
                commuting += 1
                swapped += match[1] != plain[1]
            else:
                assert match[1] == plain[1]
            units += match[5] is not None
            written += 1
    assert swapped / commuting == pytest.approx(0.5, abs=0.04)
    assert units / written == pytest.approx(0.5, abs=0.04)
    closing = sum("The answer is" in problem.worked for problem in split_problems("train"))
    assert closing / len(split_problems("train")) == pytest.approx(0.5, abs=0.04)
