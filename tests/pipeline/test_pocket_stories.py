"""The stories: true to their facts, worded by chance, the same everywhere, no two splits with one in common."""

import hashlib
import random
import re
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.pocket import stories
from pipeline.pocket.pages import draw_page
from pipeline.pocket.stories import (
    FIRST_NAMES,
    KINDS,
    PLACES,
    SPLIT_SIZES,
    THINGS,
    draw_story,
    draw_talk,
    pretraining_stories,
    row_of,
    split_rows,
    split_stories,
    summaries,
)
from pipeline.tasks import NoOptions, get_task

SEEDS = st.integers(min_value=0, max_value=2**32)

FIRST_TEST_ROWS = {
    "qa": {
        "answers": ["the mill", "at the mill"],
        "context": "Anaïs was at the mill with Íñigo and bought an old drum there. It rained.",
        "question": "Where did Anaïs buy the drum?",
    },
    "summary": {
        "dialogue": "Mia: I found a tiny violin at the mill at 1:15.\nJosé: Bye!",
        "summary": "Mia found a violin at the mill and told José.",
    },
    "yesno": {
        "answer": True,
        "passage": "Eva found a golden piñata at the market at 10:15. “¡Qué día!” The sun was out.",
        "question": "Do we know the hour?",
    },
}
ROWS_DIGEST = "5fa7d69ddf4f8950"


def named(words: tuple[str, ...], text: str) -> set[str]:
    """Which of the words stand in the text, whole."""
    return {word for word in words if re.search(rf"(?<!\w){word}(?!\w)", text)}


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_a_story_tells_its_fact_and_no_other(seed: int) -> None:
    story = draw_story(random.Random(seed))
    fact = story.fact
    assert named(FIRST_NAMES, story.text) == {fact.first, fact.friend} - {""}
    assert named(THINGS, story.text) == {fact.thing}
    assert named(PLACES, story.text) == {fact.place}
    assert f"{fact.quality} {fact.thing}" in story.text and f" {fact.past} " in story.text
    assert (f" with {fact.friend}" in story.text) == bool(fact.friend)
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", story.text)
    assert re.findall(r"\d+:\d\d", story.text) == ([fact.time] if fact.time else [])
    assert "  " not in story.text


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_a_question_is_answered_by_the_story(seed: int) -> None:
    rng = random.Random(seed)
    row = row_of("qa", draw_story(rng), rng)
    assert len(set(row["answers"])) == 2
    for answer in row["answers"]:
        words = re.sub(r"^(at )?(the |an? )?| (did|was)$", "", answer)
        assert words in row["context"]
        assert words not in row["question"]


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_yes_is_what_the_story_says(seed: int) -> None:
    rng = random.Random(seed)
    row = row_of("yesno", draw_story(rng), rng)
    passage, question = row["passage"], row["question"]
    words = (*FIRST_NAMES, *THINGS, *PLACES)
    asked, told = named(words, question), named(words, passage)
    if question == "Did it rain?":
        expected = "It rained." in passage
    elif question == "Do we know the hour?":
        expected = re.search(r"\d:\d\d", passage) is not None
    elif question.endswith("alone?"):
        expected = len(named(FIRST_NAMES, passage)) == 1
    else:
        assert len(asked) == 2 and len(asked - told) <= 1
        expected = asked <= told
    assert row["answer"] == expected


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_a_summary_is_one_of_the_right_ones_and_these_say_what_was_said(seed: int) -> None:
    rng = random.Random(seed)
    talk = draw_talk(rng)
    row = row_of("summary", talk, rng)
    right = summaries(talk)
    assert row["summary"] in right
    assert len(set(right)) == len(right) == 12
    (told,) = [line for line in row["dialogue"].split("\n") if " I " in line]
    for summary in right:
        clause, _, rest = re.split(r"( and told |\. |\.$)", summary, maxsplit=1)
        assert named(FIRST_NAMES, clause) == {told.partition(":")[0]}
        assert named(FIRST_NAMES, rest) <= named(FIRST_NAMES, row["dialogue"]) - named(FIRST_NAMES, clause)
        assert named(THINGS, clause) == named(THINGS, told)
        assert named(PLACES, clause) <= named(PLACES, told)


def test_a_split_is_the_same_on_every_platform() -> None:
    first = {kind: next(iter(split_rows(kind, "test"))) for kind in KINDS}
    assert first == FIRST_TEST_ROWS
    rows = [str(row) for kind in KINDS for split in SPLIT_SIZES for row in split_rows(kind, split)]
    assert hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16] == ROWS_DIGEST


def test_splits_have_their_sizes_and_share_no_story() -> None:
    everything = [story for kind in KINDS for split in SPLIT_SIZES for story in split_stories(kind, split)]
    assert len(everything) == len(KINDS) * sum(SPLIT_SIZES.values())
    assert len({story.fact for story in everything}) == len(everything)


def test_pretraining_never_sees_a_story_of_a_split() -> None:
    reserved = {story.fact for kind in KINDS for split in SPLIT_SIZES for story in split_stories(kind, split)}
    for kind in KINDS:
        seen = [story.fact for story in islice(pretraining_stories(kind, random.Random(0)), 5_000)]
        assert reserved.isdisjoint(seen)
        assert len(set(seen)) > 4_500


def test_pretraining_leaves_out_what_would_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter does something: with the stream's own stories reserved, the stream goes round them."""
    monkeypatch.setattr(stories, "held_out", frozenset)
    plain = list(islice(pretraining_stories("qa", random.Random(7)), 50))
    monkeypatch.setattr(stories, "held_out", lambda: frozenset(story.fact for story in plain[::2]))
    assert list(islice(pretraining_stories("qa", random.Random(7)), 25)) == plain[1::2]


def test_which_wording_comes_first_is_chance_and_so_is_yes() -> None:
    rows = list(split_rows("qa", "train"))
    longer = sum(len(row["answers"][0]) > len(row["answers"][1]) for row in rows) / len(rows)
    assert longer == pytest.approx(0.5, abs=0.05)
    labels = [row["answer"] for row in split_rows("yesno", "train")]
    assert sum(labels) / len(labels) == pytest.approx(0.4, abs=0.05)
    ends = [sum(words in row["summary"] for row in split_rows("summary", "train")) for words in ("told", "glad")]
    assert [count / 1000 for count in ends] == pytest.approx([1 / 3] * 2, abs=0.05)


def test_the_tasks_say_what_the_rows_say() -> None:
    row = FIRST_TEST_ROWS["qa"]
    example = get_task("pocket_qa").to_example(row, 0, NoOptions())
    assert example.prompt == f"Read this and answer the question.\n\n{row['context']}\n\n{row['question']}"
    assert (example.answer, example.golds) == (row["answers"][0], tuple(row["answers"]))
    unseen = get_task("pocket_unseen")
    row = next(iter(unseen.source("test", NoOptions())))
    assert (row["context"], row["question"]) == (FIRST_TEST_ROWS["qa"]["context"], "What kind of drum was it?")
    assert unseen.to_example(row, 0, NoOptions()).golds == ("old",)
    row = FIRST_TEST_ROWS["yesno"]
    example = get_task("pocket_yesno").to_example(row, 3, NoOptions())
    assert example.prompt == f"{row['passage']}\n\n{row['question']} Answer yes or no."
    assert (example.id, example.answer, example.labels) == ("pocket-yesno-00003", "yes", ("no", "yes"))
    row = FIRST_TEST_ROWS["summary"]
    example = get_task("pocket_summary").to_example(row, 0, NoOptions())
    assert (example.prompt, example.answer) == (f"{row['dialogue']}\n\nSummarize this dialogue.", row["summary"])


def test_no_page_has_a_prompt_of_a_task() -> None:
    """The student has read this world, not our questions: what it learns of them it learns in the experiment."""
    rng = random.Random(0)
    pages = "\n".join(draw_page(rng, draw_story(rng)).text for _ in range(2000))
    for words in ("Read this", "answer", "yes or no", "Summarize", "Who did", "What did", "Where did", "When did"):
        assert words not in pages


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.booleans())
def test_a_page_tells_the_truth(seed: int, talk: bool) -> None:
    """What a remark names stands in the story, but for one word where the remark denies."""
    rng = random.Random(seed)
    page = draw_page(rng, draw_talk(rng) if talk else draw_story(rng))
    words = (*FIRST_NAMES, *THINGS, *PLACES)
    for remark in page.remarks:
        denies = re.search(r"\bnot\b|\bNo\b|\bFalse\b", remark) is not None
        assert len(named(words, remark) - named(words, page.story)) == int(denies)
        assert named(FIRST_NAMES, remark) or named(THINGS, remark)
