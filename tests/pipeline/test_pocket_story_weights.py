"""The T5 and the GPT-2 in the repository: small, loadable, and one can do the tasks while the other cannot yet."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from pipeline.models import EMBEDDED_DIR
from pipeline.pocket.examples import measure_tasks
from pipeline.pocket.stories import KINDS
from pipeline.pocket.subwords import byte_tokenizer, piece_tokenizer

T5, GPT2 = EMBEDDED_DIR / "t5", EMBEDDED_DIR / "gpt2"


@pytest.fixture(scope="module")
def teacher() -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(T5).eval()


@pytest.fixture(scope="module")
def student() -> Any:
    return AutoModelForCausalLM.from_pretrained(GPT2).eval()


def test_both_folders_together_are_below_eight_megabytes() -> None:
    assert sum(path.stat().st_size for folder in (T5, GPT2) for path in folder.rglob("*")) < 8_000_000


def test_the_models_are_of_their_families_in_float32(teacher: Any, student: Any) -> None:
    assert (teacher.config.model_type, student.config.model_type) == ("t5", "gpt2")
    assert teacher.config.is_gated_act and not teacher.config.scale_decoder_outputs
    assert not torch.equal(teacher.lm_head.weight, teacher.shared.weight)
    for model in (teacher, student):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("folder", "build"), [(T5, piece_tokenizer), (GPT2, byte_tokenizer)])
def test_a_saved_tokenizer_is_the_one_the_code_builds(folder: Any, build: Any) -> None:
    saved, built = AutoTokenizer.from_pretrained(folder), build()
    assert saved.get_vocab() == built.get_vocab()
    text = "At the crêperie, Zoë sold a naïve flute at 10:30.\n\nWho did?"
    assert saved(text)["input_ids"] == built(text)["input_ids"]
    assert len(saved) == json.loads((folder / "config.json").read_text())["vocab_size"]


def test_the_two_share_fragments_but_no_word_and_no_number() -> None:
    pieces, byte_level = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (T5, GPT2))
    shared = pieces.keys() & byte_level.keys()
    assert not any(pieces[token] == byte_level[token] for token in shared)
    assert not any(token.startswith(("▁", "Ġ")) for token in shared)  # how either family begins a word


def test_the_teacher_can_do_the_tasks_and_the_untouched_student_cannot(teacher: Any, student: Any) -> None:
    can, cannot = (
        {row["task"]: row["right"] for row in measure_tasks(model, AutoTokenizer.from_pretrained(folder), 20)}
        for model, folder in ((teacher, T5), (student, GPT2))
    )
    assert list(can) == [f"pocket_{kind}" for kind in KINDS]
    assert min(can.values()) >= 0.7
    assert max(cannot.values()) <= 0.2
