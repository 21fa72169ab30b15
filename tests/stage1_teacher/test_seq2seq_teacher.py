"""The encoder-decoder teacher: batches, padding and its own float32 head change nothing of what the model says.

The reference is the model itself, whole, one unpadded example at a time.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.models import ModelSource, check_seq2seq_head, head_scale, load_seq2seq_lm
from pipeline.prompts import PromptBuilder
from pipeline.recipe import Recipe, load_recipe
from stage1_teacher.teacher import Seq2SeqTeacher, TeacherInput, vocabulary_size

CPU = torch.device("cpu")
SHAPES = {"flan": False, "t5": True}  # the head tied, and hidden states scaled before it


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("seq2seq")
    return {name: toys.tiny_t5(folder / name, hidden=64, tie_word_embeddings=tied) for name, tied in SHAPES.items()}


@pytest.fixture(scope="module")
def inputs() -> list[TeacherInput]:
    """Encoder and decoder lengths that do not go together: the longest prompt has the shortest answer."""
    draw = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 320, (count,), generator=draw).tolist()

    return [TeacherInput([0, *ids(answer)], 0, ids(prompt)) for prompt, answer in ((40, 1), (9, 14), (23, 6), (1, 9))]


def load(folder: Path, dtype: str = "float32", quantization: str = "none") -> Any:
    return load_seq2seq_lm(ModelSource(str(folder), None), dtype, quantization, CPU)


def batched(teacher: Seq2SeqTeacher, inputs: list[TeacherInput]) -> Tensor:
    return torch.cat(list(teacher.answer_logits(inputs, [])))


def plain_forward(model: Any, item: TeacherInput) -> Tensor:
    """The model's own logits: row t is read where the decoder has read the start and t answer tokens."""
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([item.encoder_ids]),
            decoder_input_ids=torch.tensor([item.input_ids[:-1]]),
            use_cache=False,
        )
    logits_NV: Tensor = out.logits[0].float()
    return logits_NV


def rms(difference: Tensor) -> float:
    """Root mean square over all logits."""
    return difference.square().mean().sqrt().item()


def bfloat16_bound(expected: Tensor) -> float:
    """8 bits of the largest logit: what the model's own head rounds away, and the body's sums in another order."""
    return 2**-8 * expected.abs().max().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_of_unequal_lengths_says_what_the_model_says(folders, inputs, shape, dtype):
    model = load(folders[shape], dtype)
    assert (head_scale(model) == 64**-0.5) == (shape == "t5")
    assert torch.equal(model.lm_head.weight, model.shared.weight) == (shape == "t5")
    expected = torch.cat([plain_forward(model, item) for item in inputs])
    found = batched(Seq2SeqTeacher(model), inputs)
    assert found.dtype == torch.float32 and len(found) == sum(item.rows for item in inputs) == 30
    if dtype == "float32":
        assert (found - expected).abs().max() <= 2e-5
    assert rms(found - expected) <= bfloat16_bound(expected)
    assert rms(found.roll(1, 0) - expected) > 10 * bfloat16_bound(expected)  # the control: rows shifted by one


def test_what_the_padding_says_changes_nothing_and_unmasked_it_would(folders, inputs, monkeypatch):
    teacher = Seq2SeqTeacher(load(folders["flan"]))
    expected = batched(teacher, inputs)

    def padded_with_7(sequences: list[list[int]], device: Any) -> Tensor:
        longest = max(map(len, sequences))
        return torch.tensor([[*ids, *[7] * (longest - len(ids))] for ids in sequences])

    monkeypatch.setattr("stage1_teacher.teacher._right_padded", padded_with_7)
    assert torch.equal(batched(teacher, inputs), expected)

    stretched = [replace(item, encoder_ids=[*item.encoder_ids, *[0] * (40 - len(item.encoder_ids))]) for item in inputs]
    assert (batched(teacher, stretched) - expected).abs().max() > 0.1  # a control: padding that is read


def test_rows_come_in_chunks_and_the_head_sees_no_other(folders, inputs):
    teacher = Seq2SeqTeacher(load(folders["flan"]))
    whole = batched(teacher, inputs)
    teacher.rows_per_chunk = 8
    chunks = list(teacher.answer_logits(inputs, []))
    assert [len(chunk) for chunk in chunks] == [8, 8, 8, 6]
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_is_repeatable_and_what_the_quantised_model_says(folders, inputs, dtype):
    models = [load(folders["flan"], dtype, "nf4") for _ in range(2)]
    first, again = (batched(Seq2SeqTeacher(model), inputs) for model in models)
    assert torch.equal(first, again)
    expected = torch.cat([plain_forward(models[0], item) for item in inputs])
    assert rms(first - expected) <= bfloat16_bound(expected)  # 4-bit kernels may compute in bfloat16 anyway
    exact = batched(Seq2SeqTeacher(load(folders["flan"], dtype)), inputs)
    assert rms(first - exact) > 2 * bfloat16_bound(expected)  # 4 bits are not 16


def test_what_stays_out_of_nf4(folders):
    """By transformers' rule for T5; `wo` is float32 under float16 only, so a bfloat16 teacher has it in bfloat16."""
    model = load(folders["flan"], "bfloat16", "nf4")
    kinds = {name.rpartition(".")[2]: module for name, module in model.named_modules() if hasattr(module, "weight")}
    assert {name for name, module in kinds.items() if module.weight.dtype == torch.uint8} == set("qkvo") | {
        "wi_0",
        "wi_1",
    }
    assert kinds["wo"].weight.dtype == kinds["lm_head"].weight.dtype == torch.bfloat16
    assert all(module.weight.quant_state.nested for module in kinds.values() if hasattr(module.weight, "quant_state"))


def test_a_family_that_rescales_its_logits_is_refused(folders, monkeypatch):
    model = load(folders["t5"])
    check_seq2seq_head(model)
    monkeypatch.setattr("pipeline.models.head_scale", lambda model: 1.0)  # as if the family were not known to scale
    with pytest.raises(ModelError, match="cannot be taken apart"):
        Seq2SeqTeacher(model)


def recipe_for(tmp_path: Path, **teacher: Any) -> Recipe:
    return load_recipe(
        str(
            toys.tiny_recipe(
                tmp_path,
                teacher={"shots": 0} | teacher,
                arms={"distill": None},
                eval={"baselines": ["zero_shot"]},
            )
        )
    )


@pytest.mark.parametrize(
    ("made", "kind", "dtype", "words"),
    [
        (
            "t5",
            "causal",
            "bfloat16",
            r"is an encoder-decoder \(t5\), but teacher.kind is causal; --set teacher.kind=seq",
        ),
        ("qwen3", "seq2seq", "bfloat16", r"is a decoder .*\(qwen3\), but teacher.kind is seq2seq; --set .*kind=causal"),
        ("t5", "seq2seq", "float16", r"FLAN-T5-XL and other large T5s overflow; --set teacher.dtype=bfloat16"),
        ("bart", "seq2seq", "bfloat16", r"\(bart\): its decoder starts with token 0; expected its .* pad_token, 1, as"),
    ],
)
def test_what_the_config_alone_can_tell_is_refused_before_a_weight_is_read(tmp_path, made, kind, dtype, words):
    model = tmp_path / "model"
    tokenizer = toys.tiny_tokenizer(model)  # <|eos|> is 0, <|pad|> 1
    configs = {
        "t5": {"model_type": "t5", "decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 0},
        "qwen3": {"model_type": "qwen3"},
        "bart": {"model_type": "bart", "decoder_start_token_id": 0, "pad_token_id": 1, "eos_token_id": 0},
    }
    (model / "config.json").write_text(json.dumps(configs[made] | {"vocab_size": 320}), encoding="utf-8")
    prompts = PromptBuilder(tokenizer, seq2seq=kind == "seq2seq")
    with pytest.raises(ModelError, match=words):
        vocabulary_size(recipe_for(tmp_path, kind=kind, dtype=dtype), prompts)
    fitting = {"qwen3": "causal", "t5": "seq2seq"}
    if made in fitting:
        prompts = PromptBuilder(tokenizer, seq2seq=fitting[made] == "seq2seq")
        assert vocabulary_size(recipe_for(tmp_path, kind=fitting[made], dtype="bfloat16"), prompts) == 320
