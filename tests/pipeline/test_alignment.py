"""Aligned positions have read the same text: by hand on small offsets, and on real tokenizers by what they decode.

The oracle of the real ones never looks at an offset: it decodes the tokens before a position and compares texts.
"""

import itertools
import json
import os
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.alignment import NONE, align, consumed
from pipeline.models import ModelSource, load_tokenizer
from pipeline.prompts import PromptBuilder

DATA = os.environ.get("LOGITBANK_DATA")
with_data = pytest.mark.skipif(
    not DATA, reason="needs the real tokenizers and rows: set LOGITBANK_DATA to the folder that has them"
)
TOKENIZERS = ("t5", "gpt2", "gpt-neox-20b", "smollm2", "qwen")
PAIRS = list(itertools.permutations(TOKENIZERS, 2))
COMPOSES = {"gpt-neox-20b", "qwen"}  # byte-level after NFC; gpt2 and smollm2 keep every byte


def offsets(ends: list[int], length: int | None = None) -> Any:
    """Tokens that lie end to end, and end-of-sequence."""
    length = ends[-1] if length is None else length
    return np.array([*zip([0, *ends[:-1]], ends, strict=True), (length, length)], np.int32)


def test_the_example_in_the_docstring() -> None:
    teacher, student = offsets([1, 2, 5]), offsets([2, 3, 5])
    assert align("boundary", teacher, student).tolist() == [0, 2, NONE, 3]
    assert align("index", teacher, student).tolist() == [0, 1, 2, 3]
    assert align("boundary", student, teacher).tolist() == [0, NONE, 1, 3]


def test_index_is_the_first_of_both() -> None:
    assert align("index", offsets([1, 2]), offsets([1, 2, 3, 4])).tolist() == [0, 1, 2, NONE, NONE]
    assert align("index", offsets([1, 2, 3, 4]), offsets([4])).tolist() == [0, 1]


def test_inside_a_character_there_is_no_boundary() -> None:
    """An emoji of three tokens, then a letter: position 3 has read the emoji, 1 and 2 have read parts of it."""
    split = np.array([(0, 1), (0, 1), (0, 1), (1, 2), (2, 2)])
    whole = offsets([1, 2])
    assert consumed(split).tolist() == [0, NONE, NONE, 1, 2]
    assert align("boundary", split, whole).tolist() == [0, 3, 4]
    assert align("boundary", whole, split).tolist() == [0, NONE, NONE, 1, 2]
    assert align("boundary", split, split).tolist() == [0, NONE, NONE, 3, 4]  # the bytes may differ
    assert align("boundary", split, split, same_tokens=True).tolist() == [0, 1, 2, 3, 4]  # here they cannot


def test_a_space_before_the_answer_has_read_nothing() -> None:
    """The separating space as a token of its own is clipped to (0, 0): position 0 keeps the first row to itself."""
    spaced = np.array([(0, 0), (0, 2), (2, 3), (3, 3)])
    assert align("boundary", offsets([2, 3]), spaced).tolist() == [0, NONE, 1, 2]


def test_end_of_sequence_has_read_all() -> None:
    """A teacher that drops the last character (a line break) still ends where the student ends, and only there."""
    assert align("boundary", offsets([2], length=3), offsets([2, 3])).tolist() == [0, NONE, 1]
    only_end = np.array([(3, 3)])  # a teacher that sees nothing of the answer
    assert align("boundary", only_end, offsets([2, 3])).tolist() == [0, NONE, 0]
    assert align("boundary", offsets([2, 3]), only_end).tolist() == [2]


@settings(deadline=None)
@given(st.data())
def test_pairs_are_those_of_a_search(data: Any) -> None:
    """Every pair and no other: against the definition, looked up one by one. Pairs never cross."""
    length = data.draw(st.integers(1, 12))
    ends = st.lists(st.integers(0, length), max_size=8).map(sorted)
    teacher, student = ([*data.draw(ends), length] for _ in range(2))  # the end of each token, end-of-sequence last

    def read(of: list[int], t: int) -> int | None:
        if t == 0:
            return 0
        if t == len(of) - 1:
            return length
        return of[t - 1] if 0 < of[t - 1] < of[t] else None

    expected = []
    for s in range(len(student)):
        same = [t for t in range(len(teacher)) if read(teacher, t) == read(student, s) is not None]
        expected.append(same[-1] if same else NONE)
    if len(teacher) > 1 and len(student) > 1:
        found = align("boundary", *(np.array([[0, end] for end in of], np.int32) for of in (teacher, student)))
        assert found.tolist() == expected
        assert (np.diff(found[found != NONE]) > 0).all()


@cache
def prompts(name: str) -> PromptBuilder:
    tokenizer = load_tokenizer(ModelSource(str(Path(str(DATA)) / "tokenizers" / name), None))
    return PromptBuilder(tokenizer, seq2seq=name == "t5")


class Side:
    """What one tokenizer makes of an answer; `read[t]`: the text its tokens before position t say, None if partial."""

    def __init__(self, name: str, answer: str) -> None:
        self.name = name
        encoded = prompts(name).encode("?", answer)
        self.ids = encoded.answer_ids
        self.offsets = np.array(encoded.answer_offsets)
        self.read = [self._text(self.ids[:t]) for t in range(len(self.ids))]

    def _text(self, ids: list[int]) -> str | None:
        text: str = prompts(self.name).tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if self.name == "t5":
            return text.strip()
        if prompts(self.name).chat is False:
            text = text[1:]  # the separating space
        return None if "\N{REPLACEMENT CHARACTER}" in text else text


def t5_reads(text: str) -> str:
    """T5's version of a text: white space folded, letters composed, what it never met unknown."""
    tokenizer = prompts("t5").tokenizer
    decoded: str = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    return decoded.strip()


def check(answer: str) -> None:
    """All ordered pairs of tokenizers on one answer."""
    sides = {name: Side(name, answer) for name in TOKENIZERS}
    for teacher, student in ((sides[a], sides[b]) for a, b in PAIRS):
        found = align("boundary", teacher.offsets, student.offsets)
        where = f"{teacher.name} for {student.name}: {answer!r}"
        last = len(student.ids) - 1
        assert (found[0] == 0 or last == 0) and found[last] == len(teacher.ids) - 1, where
        assert (np.diff(found[found != NONE]) > 0).all() or len(teacher.ids) == 1, where
        inner = {s: t for s, t in enumerate(found.tolist()) if t != NONE and 0 < s < last}
        if "t5" in (teacher.name, student.name):
            for s, t in inner.items():
                lossless, lossy = student.read[s], teacher.read[t]
                if student.name == "t5":
                    lossless, lossy = lossy, lossless
                assert lossless and t5_reads(_uncomposed(lossless, answer)) == lossy, (where, s, t)
            continue
        nfc = bool(COMPOSES & {teacher.name, student.name})
        ours, theirs = ([_form(text, nfc) for text in side.read] for side in (student, teacher))
        for s, t in inner.items():
            assert ours[s] and ours[s] == theirs[t], (where, s, t)
            assert _form(answer, nfc).startswith(str(ours[s])), (where, s, t)
        # None is missed: every text that both have read at some place, unless it cuts off an accent.
        place = {text: t for t, text in enumerate(theirs) if text}
        common = {s: place[text] for s, text in enumerate(ours) if 0 < s < last and text in place}
        assert inner == {s: t for s, t in common.items() if not _accent_follows(ours[s], answer, nfc)}, where


def _uncomposed(text: str, answer: str) -> str:
    """The beginning of the answer of which `text` is the composed form."""
    ends = range(len(answer) + 1)
    return text if answer.startswith(text) else next(answer[:c] for c in ends if _form(answer[:c], True) == text)


def _form(text: str | None, nfc: bool) -> str:
    """Composed where one of the two sides composes; "" where there is no whole text."""
    return (unicodedata.normalize("NFC", text) if nfc else text) if text else ""


def _accent_follows(text: str, answer: str, nfc: bool) -> bool:
    """A combining mark belongs to the letter before it: composed or not, no position lies between them."""
    rest = _form(answer, nfc)[len(text) :]
    return bool(rest) and unicodedata.combining(rest[0]) > 0


def real_answers(per_task: int) -> Iterator[tuple[str, str]]:
    """(task, text) of all tasks: answers, and contexts where answers are single words."""
    fields = {
        "anli": ("premise", "hypothesis", "reason"),
        "boolq": ("passage",),
        "common_gen": ("target",),
        "cosmos_qa": ("answer0", "answer1", "context"),
        "eng_spa": ("translation",),
        "gsm8k": ("answer",),
        "mbpp": ("code",),
        "paws": ("sentence1",),
        "samsum": ("summary", "dialogue"),
        "squad": ("answers", "context"),
        "xsum": ("summary",),
    }
    for task, names in fields.items():
        lines = (Path(str(DATA)) / task / "train.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines[:: max(1, len(lines) // per_task)]:
            row = json.loads(line)
            for name in names:
                value = row[name]
                text = value["es"] if name == "translation" else value["text"][0] if name == "answers" else value
                if text.strip():
                    yield task, text


@with_data
@pytest.mark.parametrize("per_task", [5, pytest.param(120, marks=pytest.mark.slow)])
def test_aligned_positions_have_read_the_same_text(per_task: int) -> None:
    """Real texts of all tasks, Spanish and code with its `\\r\\n` and tabs among them, between all real tokenizers."""
    texts = list(real_answers(per_task))
    assert len({task for task, _ in texts}) == 11
    for _, text in texts:
        check(text)


# What is left out, none of it in a real answer: bytes that SmolLM2 has no token for and drops, so that it does not read
# the text; control characters, after which the offsets that `tokenizers` gives for T5 are shifted by those it drops.
UNREAD = set(b"\x04\x06\x13\x14\x16\x1d\xf1\xf2\xf5\xf6")
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], include_characters="\t\n\r").filter(
    lambda c: not UNREAD & set(c.encode())
)
AWKWARD = "ab é\u0301\u0323½ﬁ\n\t \r😀한\u1112\u1161\u11ab~{\u200b\u00a0。"


@with_data
@settings(max_examples=150, deadline=None)
@given(st.text(CHARACTERS, min_size=1, max_size=12) | st.text(AWKWARD, min_size=1, max_size=12))
def test_of_any_text(answer: str) -> None:
    if answer.strip():  # an empty answer is quarantined
        check(answer)


@with_data
def test_the_same_tokenizer_aligns_completely() -> None:
    """Half an emoji included, once the ids are known to be the same."""
    for name in TOKENIZERS:
        side = Side(name, "¿Qué? 🧉 é\u0301 {\r\n\tx = [1]\n}")
        everywhere = list(range(len(side.ids)))
        assert align("boundary", side.offsets, side.offsets, same_tokens=True).tolist() == everywhere
        by_offsets = align("boundary", side.offsets, side.offsets)
        assert [t for t in by_offsets if t != NONE] == [t for t in everywhere if by_offsets[t] != NONE]
        assert (by_offsets == NONE).any()  # each of them splits something here
