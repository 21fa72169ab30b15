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
        "answers": ["a golden key", "a key"],
        "context": "Anaïs bought a naïve drum at the library. At the harbour, Íñigo lost a golden key at 7:45.",
        "question": "What did Íñigo lose?",
    },
    "summary": {
        "dialogue": "Mia: I sold a grey drum at the café. Any news?\n"
        "José: At the harbour, I hid a red piñata at 4:45! À bientôt, Mia!",
        "summary": "Mia sold a drum, while José hid a red piñata.",
    },
    "yesno": {
        "answer": True,
        "passage": "It was a long day… At the crêperie, Eva painted a red drum. Renée bought an old kite at the "
        "library at 8:15.",
        "question": "Was Renée at the library?",
    },
}
ROWS_DIGEST = "1c0a99d417e91b09"


def sentences(text: str) -> list[str]:
    """The sentences of a story; times such as 9:45 hold no full stop."""
    return re.split(r"(?<=[.!?…”])\s", text)


def named(words: tuple[str, ...], text: str) -> set[str]:
    """Which of the words stand in the text, whole."""
    return {word for word in words if re.search(rf"(?<!\w){word}(?!\w)", text)}


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_a_sentence_names_one_person_one_thing_and_one_place(seed: int) -> None:
    story = draw_story(random.Random(seed))
    telling = [sentence for sentence in sentences(story.text) if named(FIRST_NAMES, sentence)]
    assert len(telling) == len(story.facts) == 2
    for sentence, fact in zip(telling, story.facts, strict=True):
        assert named(FIRST_NAMES, sentence) == {fact.first}
        assert named(THINGS, sentence) == {fact.thing}
        assert named(PLACES, sentence) == {fact.place}
        assert f"{fact.first} {fact.past}" in sentence and f"{fact.quality} {fact.thing}" in sentence
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence)
        assert re.findall(r"\d+:\d\d", sentence) == ([fact.time] if fact.time else [])


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_a_question_is_answered_by_the_sentence_that_it_is_about(seed: int) -> None:
    rng = random.Random(seed)
    row = row_of("qa", draw_story(rng), rng)
    asked = named((*FIRST_NAMES, *THINGS), row["question"])
    (sentence,) = [part for part in sentences(row["context"]) if asked <= named((*FIRST_NAMES, *THINGS), part)]
    assert len(set(row["answers"])) == 2
    for answer in row["answers"]:
        assert (
            answer.removeprefix("at ").removeprefix("the ").removeprefix("a ").removeprefix("an ").removesuffix(" did")
            in sentence
        )


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_yes_means_one_sentence_and_no_means_two(seed: int) -> None:
    rng = random.Random(seed)
    row = row_of("yesno", draw_story(rng), rng)
    asked = named((*FIRST_NAMES, *THINGS, *PLACES), row["question"])
    assert len(asked) == 2
    together = any(asked <= named((*FIRST_NAMES, *THINGS, *PLACES), part) for part in sentences(row["passage"]))
    assert together == row["answer"]
    assert asked <= named((*FIRST_NAMES, *THINGS, *PLACES), row["passage"])


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_a_summary_is_one_of_the_right_ones_and_these_say_what_was_said(seed: int) -> None:
    rng = random.Random(seed)
    talk = draw_talk(rng)
    row = row_of("summary", talk, rng)
    right = summaries(talk)
    assert row["summary"] in right
    assert len(set(right)) == len(right) == 48
    lines = row["dialogue"].split("\n")
    for summary in right:
        for line, clause in zip(lines, re.split(r" and |\. |, while ", summary), strict=False):
            speaker, said = line.split(": ", 1)
            assert named(FIRST_NAMES, clause) == {speaker}
            assert named(THINGS, clause) == named(THINGS, said)
            assert named(PLACES, clause) <= named(PLACES, said)


def test_a_split_is_the_same_on_every_platform() -> None:
    first = {kind: next(iter(split_rows(kind, "test"))) for kind in KINDS}
    assert first == FIRST_TEST_ROWS
    rows = [str(row) for kind in KINDS for split in SPLIT_SIZES for row in split_rows(kind, split)]
    assert hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16] == ROWS_DIGEST


def test_splits_have_their_sizes_and_share_no_story() -> None:
    everything = [story for kind in KINDS for split in SPLIT_SIZES for story in split_stories(kind, split)]
    assert len(everything) == len(KINDS) * sum(SPLIT_SIZES.values())
    assert len({story.facts for story in everything}) == len(everything)
    assert len({story.text for story in everything}) == len(everything)


def test_pretraining_never_sees_a_story_of_a_split() -> None:
    reserved = {story.facts for kind in KINDS for split in SPLIT_SIZES for story in split_stories(kind, split)}
    for kind in KINDS:
        seen = [story.facts for story in islice(pretraining_stories(kind, random.Random(0)), 5_000)]
        assert reserved.isdisjoint(seen)
        assert len(set(seen)) > 4_990


def test_pretraining_leaves_out_what_would_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter does something: with the stream's own stories reserved, the stream goes round them."""
    monkeypatch.setattr(stories, "held_out", frozenset)
    plain = list(islice(pretraining_stories("qa", random.Random(7)), 50))
    monkeypatch.setattr(stories, "held_out", lambda: frozenset(story.facts for story in plain[::2]))
    assert list(islice(pretraining_stories("qa", random.Random(7)), 25)) == plain[1::2]


def test_which_wording_comes_first_is_chance_and_so_is_yes() -> None:
    rows = list(split_rows("qa", "train"))
    longer = sum(len(row["answers"][0]) > len(row["answers"][1]) for row in rows) / len(rows)
    assert longer == pytest.approx(0.5, abs=0.05)
    labels = [row["answer"] for row in split_rows("yesno", "train")]
    assert sum(labels) / len(labels) == pytest.approx(0.5, abs=0.05)
    joints = [
        sum(joint in row["summary"] for row in split_rows("summary", "train")) for joint in (" and ", ". ", ", wh")
    ]
    assert [count / 1000 for count in joints] == pytest.approx([1 / 3] * 3, abs=0.05)


def test_the_tasks_say_what_the_rows_say() -> None:
    row = FIRST_TEST_ROWS["qa"]
    example = get_task("pocket_qa").to_example(row, 0, NoOptions())
    assert example.prompt == f"Read this and answer the question.\n\n{row['context']}\n\n{row['question']}"
    assert (example.answer, example.golds) == (row["answers"][0], tuple(row["answers"]))
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
@given(SEEDS)
def test_a_page_tells_the_truth(seed: int) -> None:
    """What a remark names together stands in one sentence of the story, unless the remark denies it."""
    rng = random.Random(seed)
    page = draw_page(rng, draw_story(rng))
    told = [named((*FIRST_NAMES, *THINGS, *PLACES), part) for part in sentences(page.story)]
    for remark in page.remarks:
        words = named((*FIRST_NAMES, *THINGS, *PLACES), remark)
        denies = re.search(r"\bnot\b|\bNo\b|\bFalse\b", remark) is not None
        assert any(words <= names for names in told) != denies
