"""The student: a frozen base model with a LoRA adapter, taken apart into body and head. Called by `train`.

Shapes: B examples, L padded input tokens, H hidden size, N answer positions of the batch, V vocabulary.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from pipeline.errors import ModelError, unknown_name
from pipeline.models import ModelSource, body_and_head, check_head, load_causal_lm, window_of
from pipeline.sections import Student as StudentRecipe
from stage2_student import losses
from stage2_student.batches import Batch
from stage2_student.order import seed_of

# Logits that exist at once. On a CPU, at vocabulary 151,936, 2**23 (55 positions, 32 MiB) take half the time of 2**25,
# whose buffers leave the cache. A GPU reads the head's weight once a chunk, so its chunks are larger.
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**26}


class Student:
    """The model of one student on one device, with the adapter of one arm on it at a time (`reset`).

    Raises ModelError for a model that cannot be taken apart, or adapter targets that do not exist or name the head.
    """

    def __init__(self, source: ModelSource, recipe: StudentRecipe, seed: int, device: torch.device) -> None:
        self._recipe = recipe
        base = load_causal_lm(source, recipe.dtype, "none", device)
        self.window = window_of(base.config)
        self.vocab_size = int(base.get_output_embeddings().weight.shape[0])
        self._adapt(base, seed)
        check_head(self.model)

    def reset(self, seed: int) -> None:
        """A new adapter in place of the last: where every arm of this seed begins, in every process.

        It is drawn from `seed`, but for B, which is zero: the student is the base model.
        """
        self._adapt(self.model.unload(), seed)

    def _adapt(self, base: Any, seed: int) -> None:
        self.model = _with_adapter(base, self._recipe, seed_of("adapter", seed))
        self.body, self.head = body_and_head(self.model)
        self.model.eval()  # the base's own dropout stays off; the adapter's is the recipe's
        for module in self.model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout.train()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def parameter_count(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def hidden_at_answers(self, batch: Batch) -> Tensor:
        """hidden_NH in the model's dtype: row n is where the student predicts `labels_N[n]`."""
        hidden_BLH: Tensor = self.body(
            input_ids=batch.input_ids_BL,
            attention_mask=batch.attention_mask_BL,
            position_ids=batch.position_ids_BL,
            use_cache=False,
        ).last_hidden_state
        return hidden_BLH.flatten(0, 1).index_select(0, batch.read_at_N)

    def backward(
        self,
        batch: Batch,
        weights: Mapping[str, float],
        valid: Mapping[str, int],
        temperature: float,
        chunk_logits: int | None = None,
    ) -> Tensor:
        """Add this micro-batch's gradients to the adapter's; its part of each component's mean, in `weights` order.

        weights: loss component -> weight. valid: component -> valid positions in the whole step, over micro-batches
        and processes; each component is divided by its own.

        Full-vocabulary logits exist for a chunk of positions at a time: head, losses and the way back to the hidden
        states run chunk by chunk (the head is frozen, so nothing else needs them), then the body's backward runs once.
        That computes the head once less than recomputing it with torch.utils.checkpoint would.
        """
        hidden_NH = self.hidden_at_answers(batch)
        rows = max(1, (chunk_logits or CHUNK_LOGITS[hidden_NH.device.type]) // self.vocab_size)
        sums = torch.zeros(len(weights), device=hidden_NH.device)
        gradient_NH = torch.empty_like(hidden_NH)
        for start in range(0, len(hidden_NH), rows):
            chunk = slice(start, start + rows)
            leaf_NH = hidden_NH[chunk].detach().requires_grad_()
            logits_NV = self.head(leaf_NH).float()
            parts = torch.stack([_sum(c, logits_NV, batch, chunk, temperature) / max(1, valid[c]) for c in weights])
            (parts * parts.new_tensor(list(weights.values()))).sum().backward()
            sums += parts.detach()
            assert leaf_NH.grad is not None
            gradient_NH[chunk] = leaf_NH.grad
        hidden_NH.backward(gradient_NH)
        return sums


def _sum(component: str, logits_NV: Tensor, batch: Batch, chunk: slice, temperature: float) -> Tensor:
    """One loss component over a chunk of the batch's answer positions."""
    if component == "ce":
        return losses.cross_entropy(logits_NV, batch.labels_N[chunk])
    teacher = batch.teacher
    assert teacher is not None, "the collator of this arm was told to read text alone"
    usable_N, logits_NK, logsumexp_N = (t[chunk] for t in (teacher.usable_N, teacher.logits_NK, teacher.logsumexp_N))
    tail_N = None if teacher.log_tail_N is None else teacher.log_tail_N[chunk]
    if component == "uld":
        return losses.uld(logits_NV, logits_NK, logsumexp_N, tail_N, usable_N, temperature)
    assert teacher.ids_NK is not None, "the collator of this arm was told to leave the ids out"
    ids_NK = teacher.ids_NK[chunk]
    if component == "logit_mse":
        return losses.logit_mse(logits_NV, logits_NK, ids_NK, usable_N)
    assert component == "kl", component
    if teacher.weights_NK is not None:
        weights_NK = teacher.weights_NK[chunk]
        return losses.sampled_kl(logits_NV, logits_NK, ids_NK, weights_NK, logsumexp_N, usable_N, temperature)
    return losses.kl(logits_NV, logits_NK, ids_NK, logsumexp_N, tail_N, usable_N, temperature)


def _with_adapter(base: Any, recipe: StudentRecipe, seed: int) -> Any:
    """The base with a LoRA adapter in float32 on it, drawn from `seed`."""
    from peft import LoraConfig, get_peft_model

    lora = recipe.lora
    linear = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if lora.targets == "all-linear" else _checked_targets(base, lora.targets, linear),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),  # GPT-2 stores weights transposed
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # peft asks for it
        torch.manual_seed(seed)
        return get_peft_model(base, config)  # peft draws the adapter on the CPU, then moves it


def _checked_targets(base: Any, targets: str | list[str], linear: Mapping[str, torch.nn.Module]) -> list[str]:
    """The adapter's module names; each exists and is not the head. (peft passes over a name that matches nothing.)"""
    names = [targets] if isinstance(targets, str) else targets
    head = base.get_output_embeddings()
    for name in names:
        modules = [m for n, m in base.named_modules() if n == name or n.endswith(f".{name}")]
        if not modules:
            known = {n.rpartition(".")[2] for n, m in linear.items() if m is not head}
            raise ModelError("lora.targets: " + unknown_name("module", name, known))
        if any(m is head for m in modules):
            raise ModelError(f"lora.targets: {name} is the output head, which stays frozen; leave it out")
    return names
