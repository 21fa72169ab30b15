"""Arithmetic word problems: the text that the pocket model is pre-trained on, tuned on and tested on.

Called by `pipeline.tasks.pocket_math` (the splits) and `pipeline.pocket.documents` (the pre-training stream).

A problem is a short story about one growing and shrinking pile, two or three calculations long:

    Tom has 6 boxes of 14 pens. He loses 27. Ana brings 45 more. How many pens has Tom now?
    14 * 6 = 84 pens. 84 - 27 = 57. 57 + 45 = 102 pens. The answer is 102.
    #### 102

Only `random.Random.random()` is drawn on (the one method whose sequence Python promises to keep), so a split is
the same on every platform. Two problems of different splits never share their chain of calculations, which is
stronger than not sharing their text: the story determines the chain.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

NAMES = ("Tom", "Ben", "Leo", "Sam", "Ana", "Mia", "Zoe", "Eva")
PRONOUNS = {name: "He" if index < 4 else "She" for index, name in enumerate(NAMES)}
OBJECTS = ("pens", "cards", "shells", "coins", "nuts", "books", "stamps", "apples")
CONTAINERS = ("boxes", "bags", "packs")

LENGTHS = (2, 3, 3)
"""How many calculations a problem takes; doubled entries are twice as frequent."""

LARGEST = 199
"""No number of a story or of its calculations is larger."""

SPLIT_SEEDS = {"test": 101, "validation": 102, "train": 103}
SPLIT_SIZES = {"test": 3000, "validation": 2000, "train": 2000}
PRETRAINING_SEED_OFFSET = 1_000_000
"""Seeds of the pre-training stream start here; those of the splits lie below."""

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One word problem: its story and question, what is counted, its calculations ("6 * 14 = 84."), its result."""

    question: str
    thing: str
    steps: tuple[str, ...]
    result: int

    @property
    def worked(self) -> str:
        """The worked answer: the calculations in some wording, then `#### n` on a line of its own.

        As in text that people write, the wording is chance: sums and products have either order, half the results name
        what is counted, half the answers end in a sentence. It is a function of the question that no reader could
        guess, so it is the same everywhere, and a student can learn it by heart only.
        """
        chance = random.Random(self.question)
        written = [_worded(step, self.thing, chance) for step in self.steps]
        if chance.random() < 0.5:
            written.append(f"The answer is {self.result}.")
        return " ".join(written) + f"\n#### {self.result}"


def _worded(step: str, thing: str, chance: random.Random) -> str:
    """One calculation in one of its wordings."""
    left, operator, right, equals, value = step.removesuffix(".").split(" ")
    if operator in "+*" and chance.random() < 0.5:
        left, right = right, left
    unit = f" {thing}" if chance.random() < 0.5 else ""
    return f"{left} {operator} {right} {equals} {value}{unit}."


class _Story:
    """A story under construction: its sentences, calculations and pile; `ok` ends when a number leaves 1..LARGEST."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.name = self.pick(NAMES)
        self.friend, self.other = self.two_others()
        self.thing = self.pick(OBJECTS)
        self.sentences: list[str] = []
        self.steps: list[str] = []
        self.pile = 0
        self.ok = True

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]

    def two_others(self) -> tuple[str, str]:
        """Two more names: a friend who gives and takes, and another person to compare with at the end."""
        friend = self.pick([name for name in NAMES if name != self.name])
        return friend, self.pick([name for name in NAMES if name not in (self.name, friend)])

    def between(self, low: int, high: int) -> int:
        """A uniform whole number, both ends included."""
        return low + int(self.rng.random() * (high - low + 1))

    def calculate(self, left: int, operator: str, right: int) -> int:
        """Append one calculation and return its result."""
        if operator == "/":
            value, exact = divmod(left, right)
            self.ok = self.ok and exact == 0
        else:
            value = {"+": left + right, "-": left - right, "*": left * right}[operator]
        self.ok = self.ok and 1 <= value <= LARGEST
        self.steps.append(f"{left} {operator} {right} = {value}.")
        return value

    def say(self, *variants: str, **numbers: int) -> None:
        """Append one of the sentences, its fields filled in."""
        self.sentences.append(
            self.pick(variants).format(
                name=self.name, he=PRONOUNS[self.name], friend=self.friend, other=self.other,
                thing=self.thing, packs=self.pick(CONTAINERS), **numbers,
            )
        )  # fmt: skip


def _start_plain(story: _Story) -> None:
    story.pile = story.between(21, 99)
    story.say("{name} has {n} {thing}.", "{name} starts with {n} {thing}.", n=story.pile)


def _start_packs(story: _Story) -> None:
    count, each = story.between(2, 6), story.between(4, 19)
    story.pile = story.calculate(count, "*", each)
    story.say("{name} has {k} {packs} of {m} {thing}.", "{name} gets {m} {thing} a day for {k} days.", k=count, m=each)


def _add(story: _Story) -> None:
    more = story.between(11, 79)
    story.pile = story.calculate(story.pile, "+", more)
    story.say("{he} finds {n} more.", "{he} buys {n} more.", "{friend} brings {n} more.", n=more)


def _take(story: _Story) -> None:
    fewer = story.between(11, 79)
    story.pile = story.calculate(story.pile, "-", fewer)
    story.say("{he} loses {n}.", "{he} sells {n}.", "{he} gives {n} to {friend}.", n=fewer)


def _add_packs(story: _Story) -> None:
    count, each = story.between(2, 6), story.between(4, 19)
    story.pile = story.calculate(story.pile, "+", story.calculate(count, "*", each))
    story.say("{he} buys {k} {packs} of {m}.", "{friend} brings {k} {packs} of {m}.", k=count, m=each)


def _take_packs(story: _Story) -> None:
    count, each = story.between(2, 6), story.between(4, 19)
    story.pile = story.calculate(story.pile, "-", story.calculate(count, "*", each))
    story.say("{he} sells {k} {packs} of {m}.", "{he} gives {m} to each of {k} friends.", k=count, m=each)


def _ask_pile(story: _Story) -> None:
    story.say("How many {thing} has {name} now?", "How many {thing} are left?")


def _ask_times(story: _Story) -> None:
    factor = story.between(2, 4)
    story.pile = story.calculate(story.pile, "*", factor)
    story.say("{other} has {k} times as many. How many {thing} has {other}?", k=factor)


def _ask_share(story: _Story) -> None:
    piles = story.between(2, 6)
    story.pile = story.calculate(story.pile, "/", piles)
    story.say("{he} makes {k} equal piles. How many {thing} in each?", k=piles)


def _ask_together(story: _Story) -> None:
    gap = story.between(5, 30)
    sign, word = story.pick((("+", "more"), ("-", "fewer")))
    story.pile = story.calculate(story.pile, "+", story.calculate(story.pile, sign, gap))
    story.say(f"{{other}} has {{n}} {word}. How many {{thing}} have they together?", n=gap)


STARTS = ((_start_plain, 0), (_start_packs, 1))
MIDDLES = ((_add, 1), (_take, 1), (_add_packs, 2), (_take_packs, 2))
ENDS = ((_ask_pile, 0), (_ask_pile, 0), (_ask_times, 1), (_ask_share, 1), (_ask_together, 2))
"""Each part of a story with the calculations it costs; doubled entries are twice as frequent."""


def draw_problem(rng: random.Random) -> Problem:
    """One problem, drawn until every number fits."""
    while True:
        story = _Story(rng)
        length = story.pick(LENGTHS)
        start, used = story.pick(STARTS)
        end, reserved = story.pick(ENDS)
        start(story)
        used += reserved
        while used < length and story.ok:
            middle, cost = story.pick(MIDDLES)
            if used + cost <= length:
                middle(story)
                used += cost
        end(story)
        if story.ok:
            return Problem(" ".join(story.sentences), story.thing, tuple(story.steps), story.pile)


@cache
def _splits() -> dict[str, tuple[Problem, ...]]:
    taken: set[tuple[str, ...]] = set()
    splits: dict[str, tuple[Problem, ...]] = {}
    for split, seed in SPLIT_SEEDS.items():
        rng = random.Random(seed)
        problems: list[Problem] = []
        while len(problems) < SPLIT_SIZES[split]:
            problem = draw_problem(rng)
            if problem.steps not in taken:
                taken.add(problem.steps)
                problems.append(problem)
        splits[split] = tuple(problems)
    return splits


def split_problems(split: str) -> tuple[Problem, ...]:
    """All problems of `train`, `validation` or `test`; no two, in one split or in two, share their calculations."""
    return _splits()[split]


@cache
def held_out() -> frozenset[tuple[str, ...]]:
    """The calculations of every problem of every split: what pre-training must not see."""
    return frozenset(problem.steps for problems in _splits().values() for problem in problems)


def pretraining_problems(seed: int) -> Iterator[Problem]:
    """An endless stream of problems for pre-training, those of the splits left out."""
    rng = random.Random(PRETRAINING_SEED_OFFSET + seed)
    reserved = held_out()
    while True:
        problem = draw_problem(rng)
        if problem.steps not in reserved:
            yield problem
