"""Pre-training of the embedded models on generated text, on a CPU: the loop, whatever the model.

Called by `python -m pipeline.pocket`; see `pipeline.pocket.__main__` for how to run it. What is trained and what it
reads is a course's business: `pipeline.pocket.decoder`, `pipeline.pocket.t5` and `pipeline.pocket.gpt2` have one each.

One optimizer step takes the gradients of one batch, or of several, each in a thread of its own: two single-threaded
backward passes side by side waste less of a shared two-core machine than one pass whose every operation waits for both
cores.

Shape legend: B examples of a batch, L tokens, N positions that count, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.pocket.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Settings:
    """What a pre-training run depends on. Exactly one of `steps` and `minutes` is set and ends it."""

    seed: int = 0
    steps: int | None = None
    minutes: float | None = None
    lr: float = 3e-3
    warmup_steps: int = 100
    decay_share: float = 0.5  # the learning rate is constant, then falls to zero over this last share of the run
    short_share: float = 0.4  # documents of 1 to 2, then 1 to 4 problems during this first share (decoder only)
    weight_decay: float = 0.1
    question_weight: float = 0.1  # loss weight of tokens that are mostly chance; an answer's is 1
    batch_tokens: int = 900  # of one batch, roughly
    hidden: int = 128
    layers: int = 4
    intermediate: int = 384
    heads: int = 4


def going_on(settings: Settings) -> Settings:
    """The settings for a model that can do things already: gentler, and with nothing made easy at the start."""
    return replace(settings, lr=settings.lr / 2, short_share=0.0, decay_share=0.6)


@dataclass(frozen=True)
class Batch:
    """Padded examples: what the model is called with, and the ids that its outputs should predict."""

    inputs: dict[str, Tensor]
    target_BL: Tensor
    is_answer_BL: Tensor
    weight_BL: Tensor  # float32; 0 at padding
    tokens: int


class Course(Protocol):
    """What one of the embedded models is and learns from."""

    batch_names: tuple[str, ...]
    """Of the batches of a step, for the log."""
    tokenizer: PreTrainedTokenizerBase

    def build(self) -> Any:
        """A fresh model in float32."""

    def draw(self, progress: float) -> list[Batch]:
        """The batches of the next step, `progress` (0 to 1) into the run."""

    def measure(self, model: Any, n: int) -> list[dict[str, Any]]:
        """What the model can do on `n` validation items of each kind."""


def collate(documents: Sequence[Document], pad_id: int, question_weight: float) -> Batch:
    """Documents for a decoder, padded on the right to one length, each token predicted from those before.

    No mask is needed: attention is causal, and what padding predicts weighs nothing.
    """
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
    tokens = sum(len(document.ids) for document in documents)
    return Batch({"input_ids": ids_BL[:, :-1]}, ids_BL[:, 1:], is_answer_BL[:, 1:], weight_BL[:, 1:], tokens)


def schedule(progress: float, step: int, settings: Settings) -> float:
    """Learning rate at `progress` (0 to 1) of the run: warm-up, plateau, straight line to zero."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.lr * warm * min(1.0, max(0.0, 1.0 - progress) / settings.decay_share)


def gradients(model: Any, batch: Batch, total_weight: Tensor) -> tuple[tuple[Tensor, ...], float]:
    """Gradients of this batch's share of the step's loss, and the mean loss of its answer tokens in nats."""
    torch.set_num_threads(1)
    counts_BL = batch.weight_BL > 0
    logits_NV = model(**batch.inputs, use_cache=False).logits[counts_BL]
    losses_N = nn.functional.cross_entropy(logits_NV, batch.target_BL[counts_BL], reduction="none")
    loss = (losses_N * batch.weight_BL[counts_BL]).sum() / total_weight
    answer_loss = losses_N.detach()[batch.is_answer_BL[counts_BL]].mean().item()
    return torch.autograd.grad(loss, list(model.parameters())), answer_loss


def save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that `from_pretrained` and `AutoTokenizer` load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def adamw(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """The optimizer: weight decay for matrices, none for gains and biases."""
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    gains = [parameter for parameter in parameters if parameter.dim() == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(0.9, 0.98),
        fused=True,
    )


def pretrain(
    settings: Settings, course: Course, out: Path, log: Callable[[str], None], start: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Train a model, saving it to `out` every half minute; Ctrl-C ends the run early with what it has.

    start: a model to go on with, in place of a fresh one.

    Returns the model and what was done: the settings, steps, tokens, minutes, last losses.
    """
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)
    model = (start or course.build()).train()
    parameters = list(model.parameters())
    optimizer = adamw(parameters, settings)
    names, tokenizer = course.batch_names, course.tokenizer
    log(f"{sum(parameter.numel() for parameter in parameters):,} parameters, {len(tokenizer)} tokens in the vocabulary")

    step = tokens = 0
    losses = [0.0] * len(names)
    began = last_log = time.monotonic()
    with ThreadPoolExecutor(len(names)) as pool:
        try:
            while True:
                seconds = time.monotonic() - began
                progress = step / settings.steps if settings.steps else seconds / (60 * (settings.minutes or 1.0))
                if progress >= 1:
                    break
                batches = course.draw(progress)
                total_weight = torch.stack([batch.weight_BL.sum() for batch in batches]).sum()
                shares = list(pool.map(lambda batch: gradients(model, batch, total_weight), batches))  # noqa: B023
                for parameter, *parts in zip(parameters, *(share[0] for share in shares), strict=True):
                    parameter.grad = sum(parts[1:], start=parts[0])
                norm = nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
                lr = schedule(progress, step, settings)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()

                step += 1
                tokens += sum(batch.tokens for batch in batches)
                keep = 0.97 if step > 1 else 0.0
                losses = [keep * old + (1 - keep) * share[1] for old, share in zip(losses, shares, strict=True)]
                if time.monotonic() - last_log > 30:
                    last_log = time.monotonic()
                    eta = (last_log - began) * (1 - progress) / max(progress, 1e-6)
                    worded = "  ".join(f"{name} {loss:.3f}" for name, loss in zip(names, losses, strict=True))
                    log(
                        f"step {step}  {worded}  lr {lr:.1e}  norm {norm:.2f}  {tokens / 1e6:.2f} M tokens  "
                        f"{tokens / (last_log - began):.0f} tok/s  ETA {eta / 60:.1f} min"
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
        "answer_loss_nats": {name: round(loss, 4) for name, loss in zip(names, losses, strict=True)},
    }
