"""Pre-training of the pocket model: a Qwen3 decoder of 0.8 M parameters, on generated documents, on a CPU.

Called by `python -m pipeline.pocket`; see `pipeline.pocket.__main__` for how to run it.

One optimizer step takes two batches of about equally many tokens, one answered with worked steps and one without, each
in a thread of its own: two single-threaded backward passes side by side waste less of a shared two-core machine than
one pass whose every operation waits for both cores. Documents are short at first (arithmetic is learned there as well,
and cheaper) and have up to nine problems later. Equal tokens at unequal length make about three documents in five
bare, which are the odds of a first answer without context.

Shape legend: B documents of a batch, L tokens, N positions that count, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.pocket.documents import MOST_PROBLEMS, Document, batch_of, drills
from pipeline.pocket.problems import Problem, pretraining_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

WINDOW = 768
"""Tokens the model is trained to read: nine worked problems fit; beyond the trained length everything collapses."""

SENTENCE_SHARE = 0.07
"""Share of the documents without steps that answer in a sentence instead of `#### n`."""


@dataclass(frozen=True)
class Settings:
    """What a pre-training run depends on. Exactly one of `steps` and `minutes` is set and ends it."""

    seed: int = 0
    steps: int | None = None
    minutes: float | None = None
    lr: float = 3e-3
    warmup_steps: int = 100
    decay_share: float = 0.5  # the learning rate is constant, then falls to zero over this last share of the run
    short_share: float = 0.4  # documents of 1 to 2, then 1 to 4 problems during this first share of the run
    weight_decay: float = 0.1
    question_weight: float = 0.1  # loss weight of a question's tokens (mostly chance); an answer's is 1
    batch_tokens: int = 900  # of either of the two batches of a step, roughly
    hidden: int = 128
    layers: int = 4
    intermediate: int = 384


def going_on(settings: Settings) -> Settings:
    """The settings for a model that can read and calculate already: gentler, and at full length from the start."""
    return replace(settings, lr=1.5e-3, short_share=0.0, decay_share=0.6)


def build_model(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Qwen3ForCausalLM:
    """A fresh Qwen3 decoder in float32 with tied embeddings, heads of 32, two query heads a key/value head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = settings.hidden // 32
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        intermediate_size=settings.intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def schedule(progress: float, step: int, settings: Settings) -> float:
    """Learning rate at `progress` (0 to 1) of the run: warm-up, plateau, straight line to zero."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.lr * warm * min(1.0, max(0.0, 1.0 - progress) / settings.decay_share)


def longest_document(progress: float, settings: Settings) -> int:
    """Most problems a document may have at this point of the run."""
    if progress < settings.short_share / 2:
        return 2
    return 4 if progress < settings.short_share else MOST_PROBLEMS


def draw_worked(
    tokenizer: PreTrainedTokenizerBase, problems: Iterator[Problem], rng: random.Random, longest: int, tokens: int
) -> list[Document]:
    """About `tokens` tokens of worked documents, all with the same number of problems."""
    size = 1 + int(rng.random() * longest)
    return batch_of(tokenizer, problems, ["worked"] * max(1, round(tokens / (70 * size))), size)


def draw_others(
    tokenizer: PreTrainedTokenizerBase, problems: Iterator[Problem], rng: random.Random, longest: int, tokens: int
) -> list[Document]:
    """About `tokens` tokens of drills, or of documents without steps; the latter are short for the most part."""
    if rng.random() < (0.8 if longest < MOST_PROBLEMS else 0.4):
        return drills(tokenizer, problems, max(1, round(tokens / 75)), 3)
    size = 1 + int(rng.random() ** 2 * longest)
    count = max(1, round(tokens / (40 * size)))
    styles = ["sentence" if rng.random() < SENTENCE_SHARE else "bare" for _ in range(count)]
    return batch_of(tokenizer, problems, styles, size)


@dataclass(frozen=True)
class Batch:
    """Right-padded documents. No mask is needed: attention is causal, and what padding predicts weighs nothing."""

    ids_BL: Tensor
    is_answer_BL: Tensor
    weight_BL: Tensor  # float32; 0 at padding
    tokens: int


def collate(documents: Sequence[Document], pad_id: int, question_weight: float) -> Batch:
    """Pad documents to one length."""
    length = max(len(document.ids) for document in documents)
    ids_BL = torch.full((len(documents), length), pad_id)
    is_answer_BL = torch.zeros((len(documents), length), dtype=torch.bool)
    weight_BL = torch.zeros((len(documents), length))
    for row, document in enumerate(documents):
        end = len(document.ids)
        ids_BL[row, :end] = torch.tensor(document.ids)
        is_answer_BL[row, :end] = torch.tensor(document.is_answer)
        weight_BL[row, :end] = question_weight
    weight_BL[is_answer_BL] = 1.0
    return Batch(ids_BL, is_answer_BL, weight_BL, sum(len(document.ids) for document in documents))


def gradients(model: Qwen3ForCausalLM, batch: Batch, total_weight: Tensor) -> tuple[tuple[Tensor, ...], float]:
    """Gradients of this batch's share of the step's loss, and the mean loss of its answer tokens in nats."""
    torch.set_num_threads(1)
    hidden_BLD = model.model(input_ids=batch.ids_BL[:, :-1], use_cache=False).last_hidden_state
    weight_BL = batch.weight_BL[:, 1:]
    counts_BL = weight_BL > 0
    logits_NV = model.lm_head(hidden_BLD[counts_BL])
    losses_N = nn.functional.cross_entropy(logits_NV, batch.ids_BL[:, 1:][counts_BL], reduction="none")
    loss = (losses_N * weight_BL[counts_BL]).sum() / total_weight
    answer_loss = losses_N.detach()[batch.is_answer_BL[:, 1:][counts_BL]].mean().item()
    return torch.autograd.grad(loss, list(model.parameters())), answer_loss


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that `from_pretrained` and `AutoTokenizer` load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretrain(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    log: Callable[[str], None],
    start: Qwen3ForCausalLM | None = None,
) -> tuple[Qwen3ForCausalLM, dict[str, Any]]:
    """Train a model, saving it to `out` every half minute; Ctrl-C ends the run early with what it has.

    start: a model to go on with, in place of a fresh one.

    Returns the model and what was done: the settings, steps, tokens, seconds, last losses.
    """
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)
    model = (start or build_model(tokenizer, settings)).train()
    model.config.max_position_embeddings = WINDOW
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    gains = [parameter for parameter in parameters if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    rng = random.Random(settings.seed)
    problems = pretraining_problems(settings.seed)
    log(f"{sum(parameter.numel() for parameter in parameters):,} parameters, {len(tokenizer)} tokens in the vocabulary")

    step = tokens = 0
    losses = [0.0, 0.0]
    began = last_log = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        try:
            while True:
                seconds = time.monotonic() - began
                progress = step / settings.steps if settings.steps else seconds / (60 * (settings.minutes or 1.0))
                if progress >= 1:
                    break
                longest = longest_document(progress, settings)
                batches = [
                    collate(documents, tokenizer.pad_token_id, settings.question_weight)
                    for documents in (
                        draw(tokenizer, problems, rng, longest, settings.batch_tokens)
                        for draw in (draw_worked, draw_others)
                    )
                ]
                total_weight = torch.stack([batch.weight_BL[:, 1:].sum() for batch in batches]).sum()
                halves = list(pool.map(lambda batch: gradients(model, batch, total_weight), batches))  # noqa: B023
                for parameter, *parts in zip(parameters, *(half[0] for half in halves), strict=True):
                    parameter.grad = parts[0] + parts[1]
                norm = nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
                lr = schedule(progress, step, settings)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()

                step += 1
                tokens += sum(batch.tokens for batch in batches)
                keep = 0.97 if step > 1 else 0.0
                losses = [keep * old + (1 - keep) * half[1] for old, half in zip(losses, halves, strict=True)]
                if time.monotonic() - last_log > 30:
                    last_log = time.monotonic()
                    eta = (last_log - began) * (1 - progress) / max(progress, 1e-6)
                    log(
                        f"step {step}  worked {losses[0]:.3f}  bare {losses[1]:.3f}  lr {lr:.1e}  norm {norm:.2f}  "
                        f"{tokens / 1e6:.2f} M tokens  {tokens / (last_log - began):.0f} tok/s  ETA {eta / 60:.1f} min"
                    )
                    save(model, tokenizer, out)
        except KeyboardInterrupt:
            log(f"stopped by hand at step {step}")
    model.eval()
    save(model, tokenizer, out)
    return model, {
        "settings": asdict(settings),
        "steps": step,
        "tokens": tokens,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "answer_loss_nats": {"worked": round(losses[0], 4), "bare": round(losses[1], 4)},
    }
