"""Little stories of who did what where: the text of the second pocket experiment, with questions and summaries.

Called by `pipeline.tasks.pocket_qa`, `pocket_yesno` and `pocket_summary` (the splits), by `pipeline.pocket.pages` (what
the embedded GPT-2 has read) and by `pipeline.pocket.subwords` (the two tokenizers).

    It rained. At the café, Zoë bought a red kite with Jürgen at 9:45.
    Who bought the kite?    Zoë did   (or: Zoë)

As where people write the answers, the wording of an answer is chance: the name alone or in a sentence, the place with
or without its preposition. All acceptable wordings come with a question, in the manner of SQuAD, and one of them,
drawn by chance, is the one to learn from.

Only `random.Random.random()` is drawn on (the one method whose sequence Python promises to keep), so a split is the
same on every platform. No two stories of all splits and tasks tell the same fact, and pre-training sees none of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    "{first} {past} {some} {quality} {thing}{along} at the {place}{at}.",
    "At the {place}, {first} {past} {some} {quality} {thing}{along}{at}.",
    "{first} was at the {place}{along} and {past} {some} {quality} {thing} there{at}.",
)
RAIN = "It rained."
ASIDES = (RAIN, "The sun was out.", "“¡Qué día!”", "Nobody was in a hurry.", "It was a long day…")
TOLD = (
    "I {past} {some} {quality} {thing} at the {place}{at}.",
    "At the {place}, I {past} {some} {quality} {thing}{at}!",
)
OPENINGS = ("How are you?", "¡Hola!", "Any news?", "What did you do?")
REPLIES = ("Nice!", "Oh, really?", "¡Qué bien!", "À bientôt!", "Bye!")
ENDINGS = (".", " and told {friend}.", ". {friend} was glad.")

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
    """Who did what with which thing, where, with whom and when ("9:45"); the last two are empty where nobody says."""

    first: str
    friend: str
    base: str
    past: str
    quality: str
    thing: str
    place: str
    time: str

    def fill(self, template: str) -> str:
        """The template with this fact's words in its fields."""
        return template.format(
            first=self.first, friend=self.friend, base=self.base, past=self.past, quality=self.quality,
            some="an" if self.quality[0] in "aeiou" else "a", thing=self.thing, place=self.place, time=self.time,
            along=f" with {self.friend}" if self.friend else "", at=f" at {self.time}" if self.time else "",
        )  # fmt: skip


@dataclass(frozen=True)
class Story:
    """A fact and its telling."""

    fact: Fact
    text: str


@dataclass(frozen=True)
class Question:
    """A question about a story. `answers` are the acceptable ones; the first is the one to learn from."""

    text: str
    answers: tuple[str, ...]


def draw_fact(rng: random.Random, friend_share: float) -> Fact:
    """A fact; every other one has a time, and so many of them a friend."""
    first, friend = draw_distinct(rng, FIRST_NAMES, 2)
    base, past = pick(rng, VERBS)
    time = ""
    if rng.random() < 0.5:
        time = f"{1 + int(rng.random() * 12)}:{pick(rng, ('00', '15', '30', '45'))}"
    if rng.random() >= friend_share:
        friend = ""
    return Fact(first, friend, base, past, pick(rng, QUALITIES), pick(rng, THINGS), pick(rng, PLACES), time)


def draw_story(rng: random.Random) -> Story:
    """A fact told, with an aside or two around it."""
    fact = draw_fact(rng, friend_share=0.5)
    sentences = [fact.fill(pick(rng, SENTENCES))]
    for aside in draw_distinct(rng, ASIDES, 1 + int(rng.random() * 2)):
        sentences.insert(int(rng.random() * (len(sentences) + 1)), aside)
    return Story(fact, " ".join(sentences))


def draw_talk(rng: random.Random) -> Story:
    """A fact, told by the one who did it to a friend, one turn a line; either of them speaks first."""
    fact = draw_fact(rng, friend_share=1.0)
    told = f"{fact.first}: {fact.fill(pick(rng, TOLD))}"
    if rng.random() < 0.5:
        return Story(fact, f"{told}\n{fact.friend}: {pick(rng, REPLIES)}")
    return Story(fact, f"{fact.friend}: {pick(rng, OPENINGS)}\n{told} {pick(rng, REPLIES)}")


def draw_text(kind: str, rng: random.Random) -> Story:
    """What a question of one of KINDS is about: a talk for `summary`, else a story."""
    return draw_talk(rng) if kind == "summary" else draw_story(rng)


def draw_question(rng: random.Random, story: Story) -> Question:
    """Who, what, where, when or with whom; one of two wordings of the answer comes first, by chance."""
    fact = story.fact
    kinds = [
        ("Who {past} the {thing}?", ("{first}", "{first} did")),
        ("What did {first} {base}?", ("{some} {quality} {thing}", "a {thing}")),
        ("Where did {first} {base} the {thing}?", ("the {place}", "at the {place}")),
    ]
    if fact.time:
        kinds.append(("When did {first} {base} the {thing}?", ("{time}", "at {time}")))
    if fact.friend:
        kinds.append(("Who was with {first}?", ("{friend}", "{friend} was")))
    question, wordings = pick(rng, kinds)
    answers = [fact.fill(wording) for wording in wordings]
    if rng.random() < 0.5:
        answers.reverse()
    return Question(fact.fill(question), tuple(answers))


def draw_other(rng: random.Random, fact: Fact) -> Fact:
    """The fact with another person, thing and place."""
    first, thing, place = (
        pick(rng, [word for word in words if word not in (fact.first, fact.friend, fact.thing, fact.place)])
        for words in (FIRST_NAMES, THINGS, PLACES)
    )
    return replace(fact, first=first, thing=thing, place=place)


def draw_claim(rng: random.Random, story: Story) -> tuple[str, bool]:
    """A yes-or-no question and whether yes is right: was anyone there, did it rain, is there an hour, is a word right.

    Where the word is not, it is one that the story does not have.
    """
    fact, other = story.fact, draw_other(rng, story.fact)
    true = rng.random() < 0.5
    question, wrong = pick(
        rng,
        (
            ("Did {first} {base} the {thing}?", replace(fact, thing=other.thing)),
            ("Was {first} at the {place}?", replace(fact, place=other.place)),
            ("Was {first} at the {place}?", replace(fact, first=other.first)),
        ),
    )
    claims = (
        (fact.fill("Was {first} alone?"), not fact.friend),
        ("Did it rain?", RAIN in story.text),
        ("Do we know the hour?", bool(fact.time)),
        ((fact if true else wrong).fill(question), true),
    )
    return pick(rng, claims)


def summaries(story: Story) -> tuple[str, ...]:
    """All summaries of a talk that are right: with or without the quality, the place, and a word on the friend."""
    return tuple(
        story.fact.fill(f"{{first}} {{past}} {thing}{place}{ending}")
        for thing in ("{some} {quality} {thing}", "a {thing}")
        for place in ("", " at the {place}")
        for ending in ENDINGS
    )


@cache
def _splits() -> dict[tuple[str, str], tuple[Story, ...]]:
    taken: set[Fact] = set()
    splits: dict[tuple[str, str], tuple[Story, ...]] = {}
    for kind in KINDS:
        for split, size in SPLIT_SIZES.items():
            rng = random.Random(f"{kind} {split}")
            stories: list[Story] = []
            while len(stories) < size:
                story = draw_text(kind, rng)
                if story.fact not in taken:
                    taken.add(story.fact)
                    stories.append(story)
            splits[kind, split] = tuple(stories)
    return splits


def split_stories(kind: str, split: str) -> tuple[Story, ...]:
    """All stories of `train`, `validation` or `test` for one of KINDS; no two of all these tell the same fact."""
    return _splits()[kind, split]


@cache
def held_out() -> frozenset[Fact]:
    """The fact of every story of every split: what pre-training must not see."""
    return frozenset(story.fact for stories in _splits().values() for story in stories)


def pretraining_stories(kind: str, rng: random.Random) -> Iterator[Story]:
    """An endless stream of texts for questions of one of KINDS, those of the splits left out."""
    reserved = held_out()
    while True:
        story = draw_text(kind, rng)
        if story.fact not in reserved:
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
