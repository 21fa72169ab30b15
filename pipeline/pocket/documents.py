"""Pre-training documents: one to nine problems answered in one style, as token ids.

Called by `pipeline.pocket.pretrain`. The layout is the plain one that every stage uses, so that eight worked examples
and a question look to the model exactly like a document it was trained on:

    tok(prompt) + tok(" " + answer) + [eos] + tok(prompt) + ...

Prompts and answers are tokenised apart; there is no other separator.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.pocket.problems import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = {"bare": 0.56, "worked": 0.40, "sentence": 0.04}
"""Share of the documents answered in each style; a first answer without context follows these odds."""

MOST_PROBLEMS = 9
"""Eight examples and a question."""


def prompt_of(question: str) -> str:
    """The prompt of a problem; the answer follows after one space."""
    return f"Question: {question}\nAnswer:"


def answer_of(problem: Problem, style: str) -> str:
    """The problem's answer: `#### n`, the calculations and then `#### n`, or a sentence."""
    if style == "worked":
        return problem.worked
    return f"#### {problem.result}" if style == "bare" else f"The answer is {problem.result}."


@dataclass(frozen=True)
class Document:
    """Token ids, and for each id whether it belongs to an answer (its end-of-sequence included)."""

    ids: list[int]
    is_answer: list[bool]


def batch_of(
    tokenizer: PreTrainedTokenizerBase, problems: Iterator[Problem], styles: Sequence[str], size: int
) -> list[Document]:
    """One document of `size` problems for each of the styles named."""
    texts: list[str] = []
    for style in styles:
        for problem in itertools.islice(problems, size):
            texts += [prompt_of(problem.question), " " + answer_of(problem, style)]
    encoded = iter(tokenizer(texts)["input_ids"])
    documents: list[Document] = []
    for _ in styles:
        document = Document([], [])
        for prompt, answer in itertools.islice(zip(encoded, encoded, strict=True), size):
            document.ids.extend([*prompt, *answer, tokenizer.eos_token_id])
            document.is_answer.extend([False] * len(prompt) + [True] * (len(answer) + 1))
        documents.append(document)
    return documents


def drills(tokenizer: PreTrainedTokenizerBase, problems: Iterator[Problem], count: int, size: int) -> list[Document]:
    """`count` documents of calculations alone, those of `size` problems each: three times the arithmetic a token.

    What counts as answer is what can be known: the results, the full stops and the end-of-sequence.
    """
    equals, stop = (tokenizer.convert_tokens_to_ids(token) for token in (" =", "."))
    documents: list[Document] = []
    for _ in range(count):
        document = Document([], [])
        encoded = tokenizer([" " + " ".join(problem.steps) for problem in itertools.islice(problems, size)])
        for ids in encoded["input_ids"]:
            known = False
            for token in ids:
                document.is_answer.append(known)
                known = token == equals or (known and token != stop)
            document.ids.extend([*ids, tokenizer.eos_token_id])
            document.is_answer.append(True)
        documents.append(document)
    return documents
