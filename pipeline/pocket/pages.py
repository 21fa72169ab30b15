"""What the embedded GPT-2 has read before any experiment: stories, and people who talk about them.

Called by `pipeline.pocket.pretrain`. A page is a story and then remarks on it, one a line:

    It rained. At the café, Zoë bought a red kite with Jürgen at 9:45.
    — Who bought the kite?
    — Zoë did.
    Zoë was not at the park, but at the café.
    The kite was red.

So it knows this world and can find a word in a story, as GPT-2 has read the Web; but no page has our prompts, short
answers or summaries. The remarks are answers in the sense of training: they weigh more than the story, whose words are
chance.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pipeline.pocket.stories import Story, draw_other, pick

REMARKS = (
    "It was {first} who {past} the {thing}.",
    "The {thing} was {quality}.",
    "The {quality} {thing}: {first} {past} it at the {place}.",
    "{first} was at the {place}.",
    "— Who {past} the {thing}?\n— {first} did.",
    "— Where was {first}?\n— You could see {first} at the {place}.",
    "— What was at the {place}?\n— The {quality} {thing}.",
    "— Was {first} at the {place}?\n— Yes, {first} was.",
    "— {first} {past} the {thing}, true?\n— True!",
)
SHARED = ("{friend} was there too, with {first}.", "— With whom was {first}?\n— With {friend}.")
TIMED = ("It was {time} when {first} {past} the {thing}.", "— The {thing}, when was that?\n— {time}, they say.")
DENIALS = (
    "{first} was not at the {wrong_place}, but at the {place}.",
    "It was the {thing} that {first} {past}, not the {wrong_thing}.",
    "— Was {first} at the {wrong_place}?\n— No, at the {place}.",
    "— {first} {past} the {wrong_thing}, true?\n— False! It was the {thing}.",
    "— Was {wrong_first} at the {place}?\n— No, {first} was.",
)


@dataclass(frozen=True)
class Page:
    """A story's text and the remarks on it, each with its line break in front."""

    story: str
    remarks: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole page."""
        return self.story + "".join(self.remarks)


def draw_page(rng: random.Random, story: Story) -> Page:
    """A page on the story, of four to six remarks."""
    fact = story.fact
    remarks = []
    for _ in range(4 + int(rng.random() * 3)):
        wrong = draw_other(rng, fact)
        options = [
            REMARKS,
            REMARKS,
            DENIALS,
            *([TIMED] if fact.time else []),
            *([SHARED] if f" with {fact.friend}" in story.text else []),
        ]
        template = pick(rng, pick(rng, options))
        template = template.replace("{wrong_place}", wrong.place).replace("{wrong_thing}", wrong.thing)
        remarks.append("\n" + fact.fill(template.replace("{wrong_first}", wrong.first)))
    return Page(story.text, tuple(remarks))
