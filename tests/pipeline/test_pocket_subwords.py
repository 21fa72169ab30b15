"""The two tokenizers of the story models: each in its family's manner, and unlike each other."""

import random
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.pocket.examples import draw_example, validation_examples
from pipeline.pocket.pages import draw_page
from pipeline.pocket.stories import KINDS, draw_text
from pipeline.pocket.subwords import byte_tokenizer, piece_tokenizer
from pipeline.prompts import PromptBuilder

SEEDS = st.integers(min_value=0, max_value=2**32)


@pytest.fixture(scope="module")
def pieces() -> Any:
    return piece_tokenizer()


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return byte_tokenizer()


def test_both_are_built_the_same_every_time(pieces: Any, byte_level: Any) -> None:
    for build, built, size in ((piece_tokenizer, pieces, 453), (byte_tokenizer, byte_level, 440)):
        assert build().backend_tokenizer.to_str() == built.backend_tokenizer.to_str()
        assert len(built) == size


def test_special_tokens_are_their_families(pieces: Any, byte_level: Any) -> None:
    assert [pieces.pad_token_id, pieces.eos_token_id, pieces.unk_token_id] == [0, 1, 2]
    assert pieces.convert_ids_to_tokens(pieces("Zoë did.")["input_ids"]) == ["▁Zoë", "▁did", ".", "</s>"]
    assert (byte_level.eos_token, byte_level.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert byte_level("")["input_ids"] == []


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=40))
def test_bytes_lose_nothing(byte_level: Any, text: str) -> None:
    ids = byte_level(text, add_special_tokens=False)["input_ids"]
    assert byte_level.decode(ids, clean_up_tokenization_spaces=False) == text


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.sampled_from(KINDS))
def test_pieces_fold_white_space_and_no_more_than_nfkc(pieces: Any, seed: int, kind: str) -> None:
    rng = random.Random(seed)
    story = draw_text(kind, rng)
    example = draw_example(kind, story, rng)
    for text in (example.prompt, example.answer, draw_page(rng, story).text):
        ids = pieces(text, add_special_tokens=False)["input_ids"]
        assert pieces.unk_token_id not in ids
        assert pieces.decode(ids) == " ".join(unicodedata.normalize("NFKC", text).split())


def test_what_pieces_never_met_is_unknown(pieces: Any) -> None:
    tokens = pieces.tokenize("a {kite} ~")
    assert tokens.count("<unk>") == 3


def test_a_byte_token_may_end_within_a_character(byte_level: Any) -> None:
    tokens = byte_level.tokenize(" É")
    assert tokens[-2:] == ["Ã", "ī"]  # the two bytes of É, as the family writes them


def test_one_answer_has_two_lengths(pieces: Any, byte_level: Any) -> None:
    """Otherwise pairing positions by number would be pairing them by text, and there were nothing to compare."""
    builders = PromptBuilder(pieces, seq2seq=True), PromptBuilder(byte_level)
    for kind, least in (("qa", 0.4), ("summary", 0.9)):
        examples = validation_examples(kind, 200)
        counts = [[len(b.encode(e.prompt, e.answer).answer_ids) for b in builders] for e in examples]
        assert sum(n != m for n, m in counts) / len(counts) > least


def test_no_prompt_outgrows_the_students_window(byte_level: Any) -> None:
    from pipeline.pocket.gpt2 import WINDOW

    builder = PromptBuilder(byte_level)
    for kind in KINDS:
        lengths = [len(builder.encode(e.prompt, e.answer).input_ids) for e in validation_examples(kind, 1000)]
        assert max(lengths) < WINDOW
