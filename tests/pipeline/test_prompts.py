"""The one prompt builder: layouts, places, offsets, switches and the token that ends an answer."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ModelError
from pipeline.prompts import OFFSETS, PromptBuilder
from pipeline.tasks import Example

SHOTS = (Example("s/1", "gsm8k", "1 + 1?", "Two.\n#### 2"), Example("s/2", "gsm8k", "2 + 3?", "Five.\n#### 5"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return PromptBuilder(toys.tiny_tokenizer(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return PromptBuilder(toys.tiny_tokenizer(tmp_path_factory.mktemp("chat"), chat=True), thinking=False)


def test_plain_layout_is_prompt_space_answer_eos(plain):
    tokenizer = plain.tokenizer
    encoded = plain.encode("Why?", "Because.", SHOTS[:1])
    parts = ["1 + 1?", " Two.\n#### 2", "<|eos|>", "Why?", " Because.", "<|eos|>"]
    assert encoded.input_ids == [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
    assert tokenizer.decode(encoded.input_ids[encoded.answer_start :]) == " Because.<|eos|>"


def test_chat_layout_ends_every_answer_with_the_turns_end(chat):
    encoded = chat.encode("Why?", "Because.", SHOTS)
    text = chat.tokenizer.decode(encoded.input_ids)
    assert text == (
        "<|start|>user\n1 + 1?<|end|>\n<|start|>assistant\nTwo.\n#### 2<|end|>\n"
        "<|start|>user\n2 + 3?<|end|>\n<|start|>assistant\nFive.\n#### 5<|end|>\n"
        "<|start|>user\nWhy?<|end|>\n<|start|>assistant\n<think>\n\n</think>\n\nBecause.<|end|>"
    )
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_id) == "<|end|>"
    assert chat.tokenizer.eos_token == "<|eos|>"  # another token, which ends no turn


@pytest.fixture(scope="module")
def seq2seq(plain):
    return PromptBuilder(plain.tokenizer, seq2seq=True)


def test_seq2seq_layout_is_prompts_for_the_encoder_and_the_answer_for_the_decoder(seq2seq):
    tokenizer = seq2seq.tokenizer
    encoded = seq2seq.encode("Why?", "Because.", SHOTS[:1])
    parts = ["1 + 1?", "Two.\n#### 2", "<|eos|>", "Why?", "<|eos|>"]
    assert encoded.encoder_ids == [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
    assert encoded.encoder_ids == seq2seq.prompt_ids("Why?", SHOTS[:1])
    assert tokenizer.decode(encoded.input_ids) == "<|pad|>Because.<|eos|>"
    assert encoded.answer_start == 1 and tokenizer.decode(encoded.answer_ids) == "Because.<|eos|>"
    assert seq2seq.encode("", "").encoder_ids == [seq2seq.end_id] and seq2seq.encode("", "").answer_offsets == [(0, 0)]


def test_the_layout_and_the_meaning_of_offsets_are_part_of_the_identity(plain, seq2seq):
    of_both = {"chat_template": None, "thinking": None, "offsets": OFFSETS, "end_of_sequence": "<|eos|>"}
    assert plain.describe() == of_both | {"layout": "plain"}
    assert seq2seq.describe() == of_both | {"layout": "seq2seq", "decoder_start": "<|pad|>"}
    assert plain.encode("Why?", "So.").encoder_ids == []


def test_an_encoder_decoder_needs_a_token_to_start_with(tmp_path):
    tokenizer = toys.tiny_tokenizer(tmp_path)
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="no pad_token for the decoder to start with"):
        PromptBuilder(tokenizer, seq2seq=True)


def test_answer_ids_do_not_depend_on_what_stands_before(plain, chat, seq2seq):
    for builder in (plain, chat, seq2seq):
        alone = builder.encode("Why?", "Because.\n#### 7")
        behind = builder.encode("Why?", "Because.\n#### 7", SHOTS)
        assert alone.answer_ids == behind.answer_ids
        assert alone.answer_offsets == behind.answer_offsets
        assert behind.input_ids[-len(alone.answer_ids) :] == alone.answer_ids


@settings(max_examples=60, deadline=None)
@given(answer=st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=40))
def test_offsets_cover_the_answer_and_end_with_its_length(plain, chat, seq2seq, answer):
    for builder in (plain, chat, seq2seq):
        encoded = builder.encode("?", answer)
        offsets = encoded.answer_offsets
        assert len(offsets) == len(encoded.answer_ids)
        assert offsets[-1] == (len(answer), len(answer))
        assert all(0 <= start <= end <= len(answer) for start, end in offsets)
        assert all(a[1] <= b[1] for a, b in pairwise(offsets))
        assert max(end for _, end in offsets) == len(answer)


def test_a_split_character_has_one_boundary(plain):
    encoded = plain.encode("?", "é😀")  # bytes the toy vocabulary has no merge for
    ends = [end for _, end in encoded.answer_offsets]
    assert ends.count(2) > 1  # the emoji's bytes share their end; only the last of them is a boundary


TEXTS = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(["<|end|>", "<|start|>user", "\n", " "])


@settings(max_examples=60, deadline=None)
@given(prompts=st.lists(TEXTS, min_size=2, max_size=4), shots=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_worked_examples_that_are_remembered_change_no_token(plain, chat, prompts, shots):
    """The first prompt behind some worked examples is read whole; from the second on, they are not read again."""
    shots = [Example(f"s/{i}", "gsm8k", *texts) for i, texts in enumerate(shots)]
    for builder in (plain, chat):
        for prompt in prompts:
            builder._shots.clear()
            whole = builder.prompt_ids(prompt, shots)
            assert [builder.prompt_ids(prompt, shots) for _ in range(2)] == [whole] * 2


def test_worked_examples_are_read_once(plain, chat, monkeypatch):
    for builder, marker in ((plain, "1 + 1?"), (chat, "<|start|>user\n1 + 1?")):
        builder._shots.clear()
        read = []
        tokens = builder._tokens
        monkeypatch.setattr(
            builder, "_tokens", lambda text, tokens=tokens, read=read: read.append(text) or tokens(text)
        )
        for i in range(3):
            builder.prompt_ids(f"What is {i}?", SHOTS)
        before = len(read)
        builder.prompt_ids("And now?", SHOTS)
        assert len(read) == before + 1 and "And now?" in read[-1] and not any(marker in text for text in read[before:])


def test_worked_examples_are_read_whole_where_nothing_special_parts_them(tmp_path):
    """A template without special tokens: what follows could merge with what stands before."""
    tokenizer = toys.tiny_tokenizer(tmp_path, chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    builder = PromptBuilder(tokenizer)
    for _ in range(3):
        ids = builder.prompt_ids("Why?", SHOTS)
    assert ids == builder._tokens("".join(f"{s.prompt}{s.answer}" for s in SHOTS) + "Why?")
    assert builder._read_before(SHOTS)[0] is None


def test_text_stops_at_the_end_and_drops_special_tokens(plain):
    ids = plain.encode("?", "It is 4.").answer_ids
    assert plain.text([*ids, *ids]) == "It is 4."


def test_a_template_that_ignores_the_switch_is_refused_when_asked_for(tmp_path):
    tokenizer = toys.tiny_tokenizer(tmp_path, chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("enable_thinking", "other_switch")
    with pytest.raises(ModelError, match=r"ignores enable_thinking.*teacher\.thinking=null"):
        PromptBuilder(tokenizer, thinking=False)
    assert PromptBuilder(tokenizer, thinking=None).thinking is None
    assert PromptBuilder(tokenizer, thinking=False, require_switch=False).thinking is None


def test_no_template_no_switch(plain):
    with pytest.raises(ModelError, match="no chat template"):
        PromptBuilder(plain.tokenizer, thinking=False)


def test_thinking_changes_the_prompt_and_only_the_prompt(tmp_path):
    tokenizer = toys.tiny_tokenizer(tmp_path, chat=True)
    off, on = (PromptBuilder(tokenizer, thinking=switch) for switch in (False, True))
    assert off.prompt_ids("Why?") != on.prompt_ids("Why?")
    assert off.encode("Why?", "So.").answer_ids == on.encode("Why?", "So.").answer_ids


def test_without_an_end_of_sequence_there_is_nothing_to_learn(plain, tmp_path):
    tokenizer = toys.tiny_tokenizer(tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence"):
        PromptBuilder(tokenizer)


def _data(name):
    folder = os.environ.get("LOGITBANK_DATA")
    if not folder:
        pytest.skip("LOGITBANK_DATA is not set: no real tokenizers here")
    return Path(folder) / "tokenizers" / name


def test_qwen_closes_turns_with_im_end_although_eos_is_endoftext():
    from pipeline.models import ModelSource, load_tokenizer

    tokenizer = load_tokenizer(ModelSource(str(_data("qwen")), None))
    builder = PromptBuilder(tokenizer)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens(builder.end_id) == "<|im_end|>"
    with pytest.raises(ModelError, match="ignores enable_thinking"):
        PromptBuilder(tokenizer, thinking=False)
    encoded = builder.encode("What is 6 times 7?", "#### 42", SHOTS)
    assert tokenizer.decode(encoded.input_ids).endswith("<|im_start|>assistant\n#### 42<|im_end|>")


@pytest.mark.parametrize(
    ("name", "answer", "tokens"),
    [
        # T5's lone ▁ is given the first letter of its word: they share an end, and the letter is the boundary
        ("t5", "a  ok", [("▁", 0, 1), ("a", 0, 1), ("▁", 3, 5), ("ok", 3, 5)]),
        ("t5", "two\r\n\tlines", [("▁two", 0, 3), ("▁lines", 6, 11)]),
        # composed letters and what a normalizer drops belong to the token before, a part of a character is no boundary
        ("t5", "cafe\u0301 x", [("▁café", 0, 5), ("▁", 6, 7), ("x", 6, 7)]),
        ("t5", "ﬁne ½x", [("▁fine", 0, 3), ("▁1", 4, 5), ("<unk>", 4, 5), ("2", 4, 5), ("x", 5, 6)]),
        ("qwen", "e\u0301!", [("Ã©", 0, 2), ("!", 2, 3)]),
        # GPT-NeoX's own offsets leave out the white space at both ends of a token
        ("gpt-neox-20b", "a b\n \n  c", [("Ġa", 0, 1), ("Ġb", 1, 3), ("ĊĠĊ", 3, 6), ("  ", 6, 8), ("c", 8, 9)]),
        ("gpt2", "é😀", [("ĠÃ©", 0, 1), ("ðŁĺ", 1, 2), ("Ģ", 1, 2)]),
    ],
)
def test_an_offsets_end_says_how_much_of_the_answer_is_consumed(name, answer, tokens):
    from pipeline.models import ModelSource, load_tokenizer

    builder = PromptBuilder(load_tokenizer(ModelSource(str(_data(name)), None)), seq2seq=name == "t5")
    encoded = builder.encode("?", answer)
    texts = builder.tokenizer.convert_ids_to_tokens(encoded.answer_ids)
    found = [(text, *span) for text, span in zip(texts, encoded.answer_offsets, strict=True)]
    assert found[:-1] == tokens
    assert found[-1][1:] == (len(answer), len(answer))


def test_offsets_never_go_backwards_on_real_rows_and_every_letter_has_a_token():
    """T5 on all texts of all tasks' first rows: the tokenizer that changes a text most."""
    from pipeline.models import ModelSource, load_tokenizer

    builder = PromptBuilder(load_tokenizer(ModelSource(str(_data("t5")), None)), seq2seq=True)
    texts = [
        value
        for path in sorted(_data("t5").parent.parent.glob("*/train.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()[:150]
        for value in json.loads(line).values()
        if isinstance(value, str) and value.strip()
    ]
    assert len(texts) > 3000
    for text in texts:
        offsets = builder.encode("", text).answer_offsets
        assert all(0 <= start <= end <= len(text) for start, end in offsets)
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(offsets))
        assert not "".join(text[a[1] : b[0]] for a, b in pairwise([(0, 0), *offsets])).strip(), text
