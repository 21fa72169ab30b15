"""Little stories of who did what where: the text of the second pocket experiment, with questions and summaries.

Called by `pipeline.tasks.pocket_qa`, `pocket_yesno` and `pocket_summary` (the splits), by `pipeline.pocket.pages` (what
the embedded GPT-2 has read) and by `pipeline.pocket.subwords` (the two tokenizers).

    At the café, Zoë bought a red kite at 9:45. Jürgen lost an old drum at the park.
    Who bought the kite?    Zoë did   (or: Zoë)

As where people write the answers, the wording of an answer is chance: the name alone or in a sentence, the place with
or without its preposition. All acceptable wordings come with a question, in the manner of SQuAD, and one of them,
drawn by chance, is the one to learn from.

Only `random.Random.random()` is drawn on (the one method whose sequence Python promises to keep), so a split is the
same on every platform. No two stories of all splits and tasks have the same facts, and pre-training sees none of them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

FIRST_NAMES = (
    "Zoë", "José", "Renée", "Íñigo", "Anaïs", "Søren", "Chloé", "Jürgen", "Tom", "Mia", "Ben", "Noor", "Leo", "Eva",
    "Sam", "Ruth",
)  # fmt: skip
PLACES = ("café", "market", "château", "library", "harbour", "park", "school", "station", "crêperie", "mill")
THINGS = (
    "kite", "piñata", "drum", "map", "lamp", "scarf", "flute", "clock", "mirror", "basket", "violin", "key", "coat",
    "jalapeño plant",
)  # fmt: skip
QUALITIES = ("red", "blue", "green", "old", "tiny", "golden", "grey", "naïve")
VERBS = (
    ("buy", "bought"),
    ("find", "found"),
    ("lose", "lost"),
    ("sell", "sold"),
    ("paint", "painted"),
    ("hide", "hid"),
)

SENTENCES = (
    "{first} {past} {some} {quality} {thing} at the {place}{at}.",
    "At the {place}, {first} {past} {some} {quality} {thing}{at}.",
)
ASIDES = ("It rained.", "The sun was out.", "“¡Qué día!”", "Nobody was in a hurry.", "It was a long day…")
TOLD = (
    "I {past} {some} {quality} {thing} at the {place}{at}.",
    "At the {place}, I {past} {some} {quality} {thing}{at}!",
)
CHAT = ("How are you, {friend}?", "¡Hola, {friend}!", "Any news?", "And you?")
REPLIES = ("Nice!", "Oh, really?", "¡Qué bien!", "À bientôt, {friend}!", "Bye!")
JOINTS = (" and ", ". ", ", while ")

KINDS = ("qa", "yesno", "summary")
SPLIT_SIZES = {"test": 1000, "validation": 1000, "train": 1000}
"""Stories of a split for each kind of task."""

T = TypeVar("T")


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.random() * len(options))]


def draw_distinct(rng: random.Random, options: Sequence[T], count: int) -> list[T]:
    """`count` different options, in chance order."""
    left = list(options)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]


@dataclass(frozen=True)
class Fact:
    """Who did what with which thing, where, and when ("9:45"; empty where the story does not say)."""

    first: str
    base: str
    past: str
    quality: str
    thing: str
    place: str
    time: str

    def fill(self, template: str) -> str:
        """The template with this fact's words in its fields."""
        return template.format(
            first=self.first, base=self.base, past=self.past,
            some="an" if self.quality[0] in "aeiou" else "a", quality=self.quality, thing=self.thing,
            place=self.place, time=self.time, at=f" at {self.time}" if self.time else "",
        )  # fmt: skip


@dataclass(frozen=True)
class Story:
    """Two facts that share no person, thing or place, and their telling."""

    facts: tuple[Fact, ...]
    text: str


@dataclass(frozen=True)
class Question:
    """A question about a story. `answers` are the acceptable ones; the first is the one to learn from."""

    text: str
    answers: tuple[str, ...]


def draw_facts(rng: random.Random) -> tuple[Fact, ...]:
    """Two facts; every other one has a time."""
    firsts, things, places = (draw_distinct(rng, words, 2) for words in (FIRST_NAMES, THINGS, PLACES))
    facts = []
    for first, thing, place in zip(firsts, things, places, strict=True):
        base, past = pick(rng, VERBS)
        time = ""
        if rng.random() < 0.5:
            time = f"{1 + int(rng.random() * 12)}:{pick(rng, ('00', '15', '30', '45'))}"
        facts.append(Fact(first, base, past, pick(rng, QUALITIES), thing, place, time))
    return tuple(facts)


def draw_story(rng: random.Random) -> Story:
    """Two facts told one after the other, often with an aside."""
    facts = draw_facts(rng)
    sentences = [fact.fill(pick(rng, SENTENCES)) for fact in facts]
    if rng.random() < 0.6:
        sentences.insert(int(rng.random() * (len(sentences) + 1)), pick(rng, ASIDES))
    return Story(facts, " ".join(sentences))


def draw_talk(rng: random.Random) -> Story:
    """Two facts, told by two people to each other, one turn a line."""
    facts = draw_facts(rng)
    one, other = (fact.first for fact in facts)
    turns = [fact.fill(pick(rng, TOLD)) for fact in facts]
    opening, reply = pick(rng, CHAT).format(friend=other), pick(rng, REPLIES).format(friend=one)
    return Story(facts, f"{one}: {turns[0]} {opening}\n{other}: {turns[1]} {reply}")


def draw_text(kind: str, rng: random.Random) -> Story:
    """What a question of one of KINDS is about: a talk for `summary`, else a story."""
    return draw_talk(rng) if kind == "summary" else draw_story(rng)


def draw_question(rng: random.Random, story: Story) -> Question:
    """Who, what, where or when, about one of the facts; one of two wordings of the answer comes first, by chance."""
    fact = pick(rng, story.facts)
    kinds = [
        ("Who {past} the {thing}?", ("{first}", "{first} did")),
        ("What did {first} {base}?", ("{some} {quality} {thing}", "a {thing}")),
        ("Where did {first} {base} the {thing}?", ("the {place}", "at the {place}")),
    ]
    if fact.time:
        kinds.append(("When did {first} {base} the {thing}?", ("{time}", "at {time}")))
    question, wordings = pick(rng, kinds)
    answers = [fact.fill(wording) for wording in wordings]
    if rng.random() < 0.5:
        answers.reverse()
    return Question(fact.fill(question), tuple(answers))


def draw_claim(rng: random.Random, story: Story) -> tuple[str, bool]:
    """A yes-or-no question, and whether yes is right; what is false is false by a word from the other fact."""
    fact, other = draw_distinct(rng, story.facts, 2)
    true = rng.random() < 0.5
    about = fact if true else other
    question = pick(rng, ("Did {name} {base} the {thing}?", "Was {name} at the {place}?"))
    return question.format(name=fact.first, base=fact.base, thing=about.thing, place=about.place), true


def summaries(story: Story) -> tuple[str, ...]:
    """All summaries that are right: one sentence or two of what both did, each with or without quality and place."""
    clauses = [
        [
            fact.fill(f"{{first}} {{past}} {thing}{place}")
            for thing in ("{some} {quality} {thing}", "a {thing}")
            for place in ("", " at the {place}")
        ]
        for fact in story.facts
    ]
    return tuple(joint.join(pair) + "." for joint in JOINTS for pair in itertools.product(*clauses))


@cache
def _splits() -> dict[tuple[str, str], tuple[Story, ...]]:
    taken: set[tuple[Fact, ...]] = set()
    splits: dict[tuple[str, str], tuple[Story, ...]] = {}
    for kind in KINDS:
        for split, size in SPLIT_SIZES.items():
            rng = random.Random(f"{kind} {split}")
            stories: list[Story] = []
            while len(stories) < size:
                story = draw_text(kind, rng)
                if story.facts not in taken:
                    taken.add(story.facts)
                    stories.append(story)
            splits[kind, split] = tuple(stories)
    return splits


def split_stories(kind: str, split: str) -> tuple[Story, ...]:
    """All stories of `train`, `validation` or `test` for one of KINDS; no two of all these have the same facts."""
    return _splits()[kind, split]


@cache
def held_out() -> frozenset[tuple[Fact, ...]]:
    """The facts of every story of every split: what pre-training must not see."""
    return frozenset(story.facts for stories in _splits().values() for story in stories)


def pretraining_stories(kind: str, rng: random.Random) -> Iterator[Story]:
    """An endless stream of texts for questions of one of KINDS, those of the splits left out."""
    reserved = held_out()
    while True:
        story = draw_text(kind, rng)
        if story.facts not in reserved:
            yield story


def row_of(kind: str, story: Story, rng: random.Random) -> dict[str, Any]:
    """The raw row of one of KINDS about a story: what the task of that kind turns into an example."""
    if kind == "qa":
        question = draw_question(rng, story)
        return {"context": story.text, "question": question.text, "answers": list(question.answers)}
    if kind == "yesno":
        text, true = draw_claim(rng, story)
        return {"passage": story.text, "question": text, "answer": true}
    return {"dialogue": story.text, "summary": pick(rng, summaries(story))}


def split_rows(kind: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a split, one a story; what is asked and how it is worded is drawn by the story's own text."""
    for story in split_stories(kind, split):
        yield row_of(kind, story, random.Random(story.text))
