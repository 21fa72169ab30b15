"""The training loop: students, their arms, their steps. Called by `__main__`; reads top to bottom.

A step trains on one global batch, cut into a slice a process and micro-batches within it. Nothing of that cut reaches
the result but the rounding of sums: every loss component is a sum divided by *its own* number of valid positions in the
whole global batch, and the processes' gradients are added, not averaged. So accelerate supplies the device, the
process group and one sum over it; its wrappers for models, optimizers and schedulers are not used.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from cache_schema.manifest import fingerprint_of
from cache_schema.reader import CacheReader
from pipeline.errors import RunError
from pipeline.models import device_of, provenance
from pipeline.progress import progress
from pipeline.recipe import Recipe
from pipeline.run_dir import RunDir
from pipeline.sections import Arm, Train
from stage2_student import checkpoint, coverage
from stage2_student.arms import ArmPlan, alignment_of, claimed
from stage2_student.batches import Batch, Collator, Usable, usable_rows
from stage2_student.metrics import MetricsLog
from stage2_student.order import batch_indices, rank_slice, seed_of
from stage2_student.student import Student

COMPONENTS = ("ce", "logit_mse", "kl", "uld")


def train(recipe: Recipe, reader: CacheReader, arms: Sequence[ArmPlan]) -> None:
    """Train these arms to the last step, each from its newest checkpoint. Arms of one student share the base model."""
    accelerator = Accelerator(cpu=device_of(recipe).type == "cpu")
    ranks, main = accelerator.num_processes, accelerator.is_main_process
    for _, group in groupby(arms, key=lambda arm: arm.student.name):
        of_student = list(group)
        plan = of_student[0].student
        student = Student(plan.source, recipe.students[plan.name], of_student[0].run.seed, accelerator.device)
        with progress(f"{plan.name} lengths", len(reader), "examples") if main else nullcontext() as bar:
            usable = usable_rows(reader, plan.prompts, student.window, bar.advance if bar is not None else None)
        accelerator.print(
            f"{plan.name}: an adapter of {student.parameter_count:,} parameters, {ranks} x {accelerator.device.type}; "
            f"{len(usable.rows)} examples, the longest of {usable.longest} tokens; {usable.dropped} dropped as longer "
            f"than the student's window of {student.window}",
            flush=True,
        )
        if main and any(recipe.arms[arm.run.arm].uld > 0 for arm in of_student):
            with progress(f"{plan.name} alignment", len(reader), "examples") as bar:
                covered = coverage.measure(reader, plan.prompts, bar.advance)
            coverage.save(RunDir.of(recipe).alignment(plan.name), covered, reader, plan.prompts)
            print(f"{plan.name}: {coverage.summary(covered)}", flush=True)
        collators = []  # of all arms, so that one that cannot be trained is refused before another has been
        for arm in of_student:
            losses = recipe.arms[arm.run.arm]
            alignment = alignment_of(losses, recipe.train)
            collators.append(Collator(reader, plan.prompts, student.vocab_size, losses, alignment))
        for arm, collator in zip(of_student, collators, strict=True):
            train_arm(accelerator, student, arm, recipe.arms[arm.run.arm], recipe.train, collator, usable)


def train_arm(
    accelerator: Accelerator,
    student: Student,
    arm: ArmPlan,
    losses: Arm,
    settings: Train,
    collator: Collator,
    usable: Usable,
) -> None:
    """One arm from where it stands to `settings.steps`.

    Raises RunError, before anything of that step is saved, where a loss or a gradient is not finite.
    """
    rank, ranks, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    seed = arm.run.seed
    student.reset(seed)
    gradients = flat_gradients(student.parameters.values())
    optimizer = torch.optim.AdamW(student.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    done = 0
    if arm.done:
        done = checkpoint.load(arm.folder.checkpoint(arm.done), student.model, student.parameters, optimizer)

    def load(step: int) -> list[Batch]:
        """This process's micro-batches of a step: a pure function of the step, so it can run ahead in a thread."""
        batch = batch_indices(step, settings.batch_size, len(usable.rows), seed)
        mine = rank_slice(batch.tolist(), rank, ranks)
        return collator.read([usable.rows[i] for i in mine], settings.micro_batch_size)

    with (
        claimed(arm) if main else nullcontext(),
        MetricsLog(arm.folder, done) if main else nullcontext() as log,
        progress(arm.label, settings.steps, "steps", done) if main else nullcontext() as bar,
    ):
        started = time.perf_counter()
        for step, batches in prefetched(load, range(done, settings.steps)):
            measured = take_step(accelerator, student, optimizer, gradients, arm, losses, settings, step, batches)
            tokens_per_s = measured["tokens"] / (time.perf_counter() - started)
            if log is not None and bar is not None:
                log.write({"step": step + 1, **measured, "tokens_per_s": tokens_per_s})
                loss, lr, norm = measured["loss"], measured["lr"], measured["grad_norm"]
                bar.advance(1, note=f"loss {loss:.4f} lr {lr:.2e} norm {norm:.2f} {tokens_per_s:,.0f} tok/s")
                if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                    log.flush()
                    folder = arm.folder.checkpoint(step + 1)
                    notes = {
                        "arm": fingerprint_of(arm.identity),
                        "provenance": run_notes(accelerator, settings, usable),
                    }
                    checkpoint.save(folder, step + 1, student.model, student.parameters, optimizer, notes)
            started = time.perf_counter()
    accelerator.wait_for_everyone()


def prefetched(load: Callable[[int], list[Batch]], steps: range) -> Iterator[tuple[int, list[Batch]]]:
    """Every step with its micro-batches; those of the next one are loaded in a thread meanwhile."""
    with ThreadPoolExecutor(1) as ahead:
        upcoming = ahead.submit(load, steps.start)
        for step in steps:
            batches = upcoming.result()
            if step + 1 in steps:
                upcoming = ahead.submit(load, step + 1)
            yield step, batches


def take_step(
    accelerator: Accelerator,
    student: Student,
    optimizer: torch.optim.Optimizer,
    gradients: Tensor,
    arm: ArmPlan,
    losses: Arm,
    settings: Train,
    step: int,
    batches: Sequence[Batch],
) -> dict[str, float]:
    """One optimizer step on this process's micro-batches; what is to be logged of it. Raises as `train_arm` does.

    gradients: see `flat_gradients`.
    """
    weights = {name: getattr(losses, name) for name in COMPONENTS if getattr(losses, name) > 0}

    # The denominators, over all micro-batches and processes, before any loss is computed.
    valid = global_counts(accelerator, batches)

    # Forward and backward. The adapter's gradients add up in `gradients`.
    gradients.zero_()
    parts = []
    for micro, batch in enumerate(batches):
        torch.manual_seed(seed_of("dropout", arm.run.seed, step, micro, accelerator.process_index))
        parts.append(student.backward(batch.to(accelerator.device), weights, valid, losses.temperature))
    means = torch.stack(parts).sum(0) if parts else gradients.new_zeros(len(weights))

    # Over the processes: sums, since every part was divided by the global count already.
    gradients.copy_(accelerator.reduce(gradients, reduction="sum"))
    components = dict(zip(weights, accelerator.reduce(means, reduction="sum").tolist(), strict=True))
    loss = sum(weights[name] * value for name, value in components.items())
    grad_norm = gradients.norm().item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise not_finite(arm, step, components, grad_norm, batches, parts)

    # The update.
    gradients.mul_(min(1.0, settings.max_grad_norm / (grad_norm + 1e-6)))
    lr = learning_rate(step, settings)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return (
        {"loss": loss, **components, "lr": lr, "grad_norm": grad_norm, "positions": valid["ce"]}
        | ({"aligned": valid["uld"]} if "uld" in weights else {})
        | {"tokens": valid["tokens"]}
    )


def learning_rate(step: int, settings: Train) -> float:
    """Of the optimizer step that follows `step` finished ones: a linear warm-up to the peak, then the schedule.

    The first step already moves (peak / warmup_steps); cosine and linear would reach zero one step after the last.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (1 - progress) if settings.schedule == "linear" else settings.lr


def flat_gradients(parameters: Any) -> Tensor:
    """One float32 vector that holds the gradients of all parameters: each `.grad` is a view into it.

    Backward adds into the views in place; one collective, one norm and one multiplication then serve them all.
    """
    parameters = list(parameters)
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for parameter, view in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
        parameter.grad = view.view_as(parameter)
    return flat


def global_counts(accelerator: Accelerator, batches: Sequence[Batch]) -> dict[str, int]:
    """Valid positions of every component, and input tokens, in the whole global batch."""
    local = [batch.counts() for batch in batches]
    names = ("tokens", *COMPONENTS)
    mine = torch.tensor([sum(c.get(name, 0) for c in local) for name in names], device=accelerator.device)
    return dict(zip(names, accelerator.reduce(mine, reduction="sum").tolist(), strict=True))


def not_finite(
    arm: ArmPlan,
    step: int,
    components: dict[str, float],
    grad_norm: float,
    batches: Sequence[Batch],
    parts: Sequence[Tensor],
) -> RunError:
    """What to say when a step must not be taken, naming the examples whose losses are not finite (else all of it)."""
    every = [batch.example_ids for batch in batches]
    bad = [ids for ids, part in zip(every, parts, strict=True) if not part.isfinite().all()]
    bad_ids, all_ids = ([i for ids in gather_object(found) for i in ids] for found in (bad, every))
    shown = ", ".join(f"{name} {value:.4g}" for name, value in components.items())
    return RunError(
        f"{arm.label}, step {step + 1}: {shown}, gradient norm {grad_norm:.4g} are not finite. "
        f"Micro-batches with these examples: {', '.join(bad_ids or all_ids)}\n"
        "  Nothing of this step was saved. Look at one: python -m cache_schema show --recipe <recipe> --example <id>\n"
        "  If the examples are sound, lower train.lr (another run_dir, since it is another arm) or use dtype float32"
    )


def run_notes(accelerator: Accelerator, settings: Train, usable: Usable) -> dict[str, Any]:
    """What changes a result by rounding at most, for state.json."""
    return {
        "processes": accelerator.num_processes,
        "micro_batch_size": settings.micro_batch_size,
        "examples": len(usable.rows),
        "dropped": usable.dropped,
        "randomness": "dropout: torch.manual_seed of (seed, step, micro-batch, rank); order: of (seed, epoch)",
        **provenance(),
    }
