"""The model of a student: chunks and micro-batches change nothing, and every arm begins from the same adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cache_schema.reader import CacheReader
from pipeline.errors import ModelError
from pipeline.fingerprint import Experiment
from pipeline.models import locate
from pipeline.recipe import load_recipe
from pipeline.sections import Arm, Lora
from pipeline.sections import Student as StudentRecipe
from stage2_student import losses
from stage2_student.batches import Batch, Collator
from stage2_student.student import Student
from stage2_student.train import flat_gradients

ALL_LOSSES = Arm(ce=1.0, logit_mse=0.5, kl=0.7, uld=0.9)
WEIGHTS = {"ce": 1.0, "logit_mse": 0.5, "kl": 0.7, "uld": 0.9}
CPU = torch.device("cpu")


def made(tmp_path: Path, **lora: Any) -> tuple[Student, Collator]:
    """A student whose adapter has moved a little, so that gradients reach both of its matrices."""
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path)))
    experiment = Experiment(recipe)
    reader = CacheReader.open(toys.fill_cache(recipe))
    settings = StudentRecipe(model=str(tmp_path / "model"), dtype="float32", lora=Lora(r=4, alpha=8, **lora))
    student = Student(experiment.teacher_source, settings, 0, CPU)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student, Collator(reader, experiment.teacher_prompts, student.vocab_size, ALL_LOSSES, "boundary")


def plain_gradients(student: Student, batch: Batch) -> tuple[list[float], list[Tensor]]:
    """The same losses the obvious way: the model's own full logits, one graph, one backward."""
    logits_BLV = student.model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
    logits_NV, teacher = logits_BLV.flatten(0, 1)[batch.read_at_N], batch.teacher
    assert teacher is not None
    ranks, ids_NK, usable = teacher.logits_NK, teacher.ids_NK, int(teacher.usable_N.sum())
    rest = (teacher.logsumexp_N, teacher.log_tail_N, teacher.usable_N, 1.0)
    assert ids_NK is not None
    means = [
        losses.cross_entropy(logits_NV, batch.labels_N) / len(batch.labels_N),
        losses.logit_mse(logits_NV, ranks, ids_NK, teacher.usable_N) / usable,
        losses.kl(logits_NV, ranks, ids_NK, *rest) / usable,
        losses.uld(logits_NV, ranks, *rest) / usable,
    ]
    total = sum(weight * mean for weight, mean in zip(WEIGHTS.values(), means, strict=True))
    return [mean.item() for mean in means], list(torch.autograd.grad(total, list(student.parameters.values())))


@pytest.mark.parametrize("chunk_positions", [1, 7, 10_000])
def test_chunks_change_nothing(tmp_path: Path, chunk_positions: int) -> None:
    student, collator = made(tmp_path)
    (batch,) = collator.read([0, 3, 5], 3)
    expected, expected_gradients = plain_gradients(student, batch)
    flat_gradients(student.parameters.values())
    found = student.backward(batch, WEIGHTS, batch.counts(), 1.0, chunk_positions * student.vocab_size)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    for parameter, gradient in zip(student.parameters.values(), expected_gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    """Answers of different lengths, one in a micro-batch of its own: a mean of means would be off."""
    student, collator = made(tmp_path)
    (whole,) = collator.read([0, 3, 5], 3)
    flat = flat_gradients(student.parameters.values())
    expected = student.backward(whole, WEIGHTS, whole.counts(), 1.0)
    once = flat.clone()
    flat.zero_()
    parts = [student.backward(batch, WEIGHTS, whole.counts(), 1.0) for batch in collator.read([0, 3, 5], 2)]
    assert torch.stack(parts).sum(0).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    torch.testing.assert_close(flat, once, rtol=1e-4, atol=1e-6)


def test_gradients_are_views_of_one_vector(tmp_path: Path) -> None:
    student, collator = made(tmp_path)
    flat = flat_gradients(student.parameters.values())
    (batch,) = collator.read([0], 1)
    student.backward(batch, WEIGHTS, batch.counts(), 1.0)
    assert flat.numel() == student.parameter_count
    assert torch.equal(flat, torch.cat([p.grad.flatten() for p in student.parameters.values()]))
    assert flat.abs().max() > 0


def test_every_arm_begins_as_the_base_model(tmp_path: Path) -> None:
    """From the same adapter, whatever was trained before; with another seed, from another."""
    student, _ = made(tmp_path)
    base = locate(str(tmp_path / "model"))
    settings = StudentRecipe(model=str(tmp_path / "model"), dtype="float32", lora=Lora(r=4, alpha=8))
    drawn = {}
    for seed in (0, 1):
        student.reset(seed)
        drawn[seed] = {name: p.detach().clone() for name, p in student.parameters.items()}
        for name, parameter in Student(base, settings, seed, CPU).parameters.items():
            assert torch.equal(drawn[seed][name], parameter)
            assert (parameter == 0).all() == ("lora_B" in name)
    assert all(torch.equal(drawn[0][n], drawn[1][n]) == ("lora_B" in n) for n in drawn[0])
    ids = torch.arange(12)[None]
    with student.model.disable_adapter():
        untouched = student.model(input_ids=ids).logits
    assert torch.equal(student.model(input_ids=ids).logits, untouched)


def test_only_the_adapter_is_trained_and_it_is_float32(tmp_path: Path) -> None:
    toys.tiny_tokenizer(tmp_path)
    toys.tiny_qwen3(tmp_path)
    student = Student(locate(str(tmp_path)), StudentRecipe(model=str(tmp_path), dtype="bfloat16"), 0, CPU)
    assert {p.dtype for p in student.parameters.values()} == {torch.float32}
    assert student.head.weight.dtype == torch.bfloat16 and not student.head.weight.requires_grad
    assert all("lora_" in name for name in student.parameters)


def test_dropout_is_the_adapters_alone(tmp_path: Path) -> None:
    """Another seed, another adapter gradient; the base model stays in evaluation mode."""
    student, collator = made(tmp_path, dropout=0.5)
    flat = flat_gradients(student.parameters.values())
    (batch,) = collator.read([0], 1)
    found = []
    for seed in (1, 1, 2):
        flat.zero_()
        torch.manual_seed(seed)
        student.backward(batch, WEIGHTS, batch.counts(), 1.0)
        found.append(flat.clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    training = {name for name, module in student.model.named_modules() if module.training}
    assert training and all("lora_dropout" in name for name in training)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_porj"], "unknown module 'v_porj'. Did you mean 'v_proj'?"),
        ("lm_head", "lm_head is the output head, which stays frozen"),
    ],
)
def test_adapter_targets_are_checked(tmp_path: Path, targets: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message.replace("?", r"\?")):
        made(tmp_path, targets=targets)


def test_named_targets(tmp_path: Path) -> None:
    student, _ = made(tmp_path, targets=["q_proj", "v_proj"])
    assert {name.split(".")[-4] for name in student.parameters} == {"q_proj", "v_proj"}
    assert len(student.parameters) == 2 * 2 * 2
