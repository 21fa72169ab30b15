"""Documents and their tokenizer: lossless, exact offsets, and laid out as every stage lays out worked examples."""

import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pipeline.pocket.documents import MOST_PROBLEMS, STYLES, answer_of, batch_of, prompt_of
from pipeline.pocket.problems import SPLIT_SIZES, pretraining_problems, split_problems
from pipeline.pocket.tokenizer import build_tokenizer, vocabulary
from pipeline.prompts import PromptBuilder
from pipeline.tasks import Example

PROBLEMS = [problem for split in SPLIT_SIZES for problem in split_problems(split)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_the_vocabulary_is_small_and_without_twins() -> None:
    tokens = vocabulary()
    assert len(tokens) == len(set(tokens))
    assert 65 <= len(tokens) <= 100


@given(st.sampled_from(PROBLEMS), st.sampled_from(sorted(STYLES)))
def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, problem: object, style: str) -> None:
    for text in (prompt_of(problem.question), " " + answer_of(problem, style)):
        encoded = tokenizer(text, return_offsets_mapping=True)
        assert tokenizer.decode(encoded["input_ids"]) == text
        assert tokenizer.unk_token_id not in encoded["input_ids"]
        pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
        assert pieces == tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        assert "".join(pieces) == text


@given(st.text(max_size=60))
def test_any_text_is_covered_by_its_offsets(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Characters the model never saw become <unk>; nothing is lost from the offsets, nothing raises."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert "".join(text[start:end] for start, end in encoded["offset_mapping"]) == text


def test_unknown_words_are_one_unknown_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(" Tom has 4 dragons.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [" Tom", " has", " 4", "<unk>", "."]


def test_a_digit_is_a_token_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 207")["input_ids"]) == [" 2", "0", "7"]


def test_the_tokenizer_adds_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("")["input_ids"] == []
    assert tokenizer.chat_template is None
    assert tokenizer.bos_token is None
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == ("<pad>", "<eos>", "<unk>")


@pytest.mark.parametrize("style", sorted(STYLES))
@pytest.mark.parametrize("size", [1, 3, MOST_PROBLEMS])
def test_a_document_is_what_the_prompt_builder_makes_of_its_problems(
    tokenizer: PreTrainedTokenizerFast, style: str, size: int
) -> None:
    """Worked examples in a prompt must look like a document of pre-training, token for token."""
    drawn = list(islice(pretraining_problems(3), size))
    (document,) = batch_of(tokenizer, iter(drawn), [style], size)
    examples = [Example(str(i), "t", prompt_of(p.question), answer_of(p, style)) for i, p in enumerate(drawn)]
    encoded = PromptBuilder(tokenizer).encode(examples[-1].prompt, examples[-1].answer, examples[:-1])
    assert document.ids == encoded.input_ids
    assert document.ids.count(tokenizer.eos_token_id) == size
    assert document.is_answer[encoded.answer_start :] == [True] * len(encoded.answer_ids)
    assert not document.is_answer[encoded.answer_start - 1]


def test_one_style_a_document(tokenizer: PreTrainedTokenizerFast) -> None:
    styles = ["bare", "worked", "sentence"]
    for style, document in zip(styles, batch_of(tokenizer, pretraining_problems(0), styles, 4), strict=True):
        text = tokenizer.decode(document.ids)
        assert document.ids.count(tokenizer.eos_token_id) == 4
        assert len(re.findall(r"\d = \d|\d+ = ", text)) > 0 if style == "worked" else " = " not in text
        assert text.count("####") == (0 if style == "sentence" else 4)
        assert "The answer is" in text if style == "sentence" else style == "worked" or "The answer is" not in text
