"""The training loop: students, their arms, their steps. Called by `__main__`; reads top to bottom.

A step trains on one global batch, cut into a slice a process and micro-batches within it. Nothing of that cut reaches
the result but the rounding of sums: every loss component is a sum divided by *its own* number of valid positions in the
whole global batch, and the processes' gradients are added, not averaged. So accelerate supplies the device, the
process group and one sum over it; its wrappers for models, optimizers and schedulers are not used.

An arm that fails is set aside, with what is to be done about it, and the others are trained.
"""

import math
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from cache_schema.errors import CacheError
from cache_schema.manifest import fingerprint_of
from cache_schema.reader import CacheReader
from pipeline import stopping
from pipeline.errors import RunError, UserError
from pipeline.models import provenance
from pipeline.progress import progress
from pipeline.recipe import Recipe
from pipeline.run_dir import RunDir
from pipeline.sections import LOSSES, Arm, Train
from stage2_student import checkpoint, coverage
from stage2_student.arms import ArmPlan, StudentPlan, alignment_of, claimed
from stage2_student.batches import Batch, Collator
from stage2_student.group import CONTAINED, Group, GroupBroken
from stage2_student.loading import loader, prefetched
from stage2_student.metrics import MetricsLog
from stage2_student.order import rank_slice, seed_of
from stage2_student.student import Student
from stage2_student.usable import Usable, lengths, usable_rows


@dataclass(frozen=True)
class Failed:
    """An arm that was not trained to its end, and why."""

    arm: ArmPlan
    error: Exception

    def __str__(self) -> str:
        known = isinstance(self.error, UserError | CacheError)
        return f"{self.arm.label}: {'' if known else type(self.error).__name__ + ': '}{self.error}"


def train(recipe: Recipe, reader: CacheReader, arms: Sequence[ArmPlan], group: Group) -> list[Failed]:
    """Train these arms to the last step, each from its newest checkpoint; those that failed, the same ones on every
    process. Arms of one student share the base model."""
    failed: list[Failed] = []

    def fails(of: Sequence[ArmPlan], error: Exception) -> None:
        if not isinstance(error, UserError | CacheError):
            traceback.print_exception(error)
        error.__traceback__ = error.__cause__ = error.__context__ = None  # their frames hold the arm's tensors
        failed.extend(Failed(arm, error) for arm in of)
        if group.main and len(arms) > 1:
            print(f"failed, the others go on: {', '.join(a.label for a in of)}: {error}", file=sys.stderr, flush=True)

    for _, of_student in groupby(arms, key=lambda arm: arm.student.name):
        left = list(of_student)
        try:
            student, usable = prepared(recipe, reader, left, group)
        except GroupBroken:
            raise
        except CONTAINED as error:
            fails(left, error)
            continue
        for arm in left:
            try:
                with group.agree():
                    losses = recipe.arms[arm.run.arm]
                    alignment = alignment_of(losses, recipe.train)
                    collator = Collator(reader, arm.student.prompts, student.vocab_size, losses, alignment)
                train_arm(group, student, arm, losses, recipe.train, collator, usable)
            except GroupBroken:
                raise
            except CONTAINED as error:
                fails([arm], error)
        del student  # before the next one is loaded
    return failed


def prepared(recipe: Recipe, reader: CacheReader, arms: Sequence[ArmPlan], group: Group) -> tuple[Student, Usable]:
    """A student's model and the rows it trains on; on the way, its alignment.json where one of its arms aligns."""
    plan: StudentPlan = arms[0].student
    with group.agree():
        student = Student(plan.source, recipe.students[plan.name], arms[0].run.seed, group.accelerator.device)
        mine = rank_slice(range(len(reader)), group.rank, group.ranks)
        with progress(f"{plan.name} lengths", len(mine), "examples") if group.main else nullcontext() as bar:
            found = lengths(reader, plan.prompts, mine, student.vocab_size, bar.advance if bar else lambda: None)
    found = [length for part in group.gather(found) for length in part]
    with group.agree():
        usable = usable_rows(found, plan.prompts, student.window)
        if group.main:
            print(
                f"{plan.name}: an adapter of {student.parameter_count:,} parameters, "
                f"{group.ranks} x {group.accelerator.device.type}; "
                f"{len(usable.rows)} examples, the longest of {usable.longest} tokens; "
                f"{usable.too_long} dropped as longer than the student's window of {student.window}"
                + (f", {usable.unreadable} as nothing it can read" if usable.unreadable else ""),
                flush=True,
            )
        if group.main and any(recipe.arms[arm.run.arm].uld > 0 for arm in arms):
            with progress(f"{plan.name} alignment", len(reader), "examples") as bar:
                covered = coverage.measure(reader, plan.prompts, bar.advance)
            coverage.save(RunDir.of(recipe).alignment(plan.name), covered, reader, plan.prompts)
            print(f"{plan.name}: {coverage.summary(covered)}", flush=True)
    return student, usable


def train_arm(
    group: Group,
    student: Student,
    arm: ArmPlan,
    losses: Arm,
    settings: Train,
    collator: Collator,
    usable: Usable,
) -> None:
    """One arm from where it stands to `settings.steps`, or to the step at which one of the processes is asked to stop:
    then all save and raise Stopped.

    Raises RunError, before anything of that step is saved, where a loss or a gradient is not finite; it and what else
    may stop one arm (CONTAINED) on every process.
    """
    seed, done = arm.run.seed, arm.done
    load = loader(collator, usable, settings, seed, group.rank, group.ranks)
    with stopping.deferred("this step is done and saved", leave=False), ExitStack() as opened:
        log = bar = None
        with group.agree():
            student.reset(seed)
            parameters = student.parameters.values()
            gradients = flat_gradients(parameters)
            optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
            if group.main:
                opened.enter_context(claimed(arm))
                if done:
                    checkpoint.load(arm.folder.checkpoint(done), student.model, student.parameters, optimizer)
                log = opened.enter_context(MetricsLog(arm.folder, done, settings.trackers, arm.identity))
                bar = opened.enter_context(progress(arm.label, settings.steps, "steps", done))
        group.share(student, optimizer, done)

        problem: Exception | None = None  # of this process alone, until the next sum tells the others
        stop, started = False, time.perf_counter()
        for step, found in prefetched(load, range(done, settings.steps)):
            batches = [] if isinstance(found, Exception) else found
            problem = problem or (found if isinstance(found, Exception) else None)
            measured = take_step(group, student, optimizer, gradients, arm, losses, settings, step, batches, problem)
            stop = group.any(stopping.requested() is not None)
            tokens_per_s = measured["tokens"] / (time.perf_counter() - started)
            if log is not None and bar is not None:
                loss, lr, norm = measured["loss"], measured["lr"], measured["grad_norm"]
                bar.advance(1, note=f"loss {loss:.4f} lr {lr:.2e} norm {norm:.2f} {tokens_per_s:,.0f} tok/s")
                try:
                    log.write({"step": step + 1, **measured, "tokens_per_s": tokens_per_s})
                    regular = (step + 1) % settings.save_every == 0 or step + 1 == settings.steps
                    if regular or stop:
                        log.flush()
                        folder, notes = arm.folder.checkpoint(step + 1), run_notes(group, arm, settings, usable)
                        checkpoint.save(folder, step + 1, student.model, student.parameters, optimizer, notes)
                    if regular:
                        checkpoint.drop_between(arm.folder.checkpoints, settings.save_every, step + 1)
                except CONTAINED as error:
                    problem = error
            if stop:
                break
            started = time.perf_counter()
        with group.agree():
            if problem is not None:
                raise problem
            opened.close()  # here, since closing the log may fail too
    if stop:
        stopping.ask()  # of those that were not asked by a signal
        raise stopping.Stopped(stopping.requested() or stopping.ASK)


def take_step(
    group: Group,
    student: Student,
    optimizer: torch.optim.Optimizer,
    gradients: Tensor,
    arm: ArmPlan,
    losses: Arm,
    settings: Train,
    step: int,
    batches: Sequence[Batch],
    problem: Exception | None = None,
) -> dict[str, float]:
    """One optimizer step on this process's micro-batches; what is to be logged of it. Raises as `train_arm` does.

    gradients: see `flat_gradients`. problem: what this process could not do since the last sum; then all raise.
    """
    weights = losses.weights

    # The denominators, over all micro-batches and processes, before any loss is computed.
    valid = global_counts(group, batches, problem)

    # Forward and backward. The adapter's gradients add up in `gradients`.
    gradients.zero_()
    parts: list[Tensor] = []
    try:
        for micro, batch in enumerate(batches):
            torch.manual_seed(seed_of("dropout", arm.run.seed, step, micro, group.rank))
            parts.append(student.backward(batch.to(gradients.device), weights, valid, losses.temperature))
    except CONTAINED as error:  # no memory, say
        problem = error
    means = torch.stack(parts).sum(0) if parts else gradients.new_zeros(len(weights))

    # Over the processes: sums, since every part was divided by the global count already.
    gradients.copy_(group.sum(gradients))
    *sums, problems = group.sum(torch.cat([means, means.new_tensor([problem is not None])])).tolist()
    if problems:
        raise group.failure(problem)
    components = dict(zip(weights, sums, strict=True))
    loss = sum(weights[name] * value for name, value in components.items())
    grad_norm = gradients.norm().item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise not_finite(group, arm, step, components, grad_norm, batches, parts)

    # The update.
    gradients.mul_(min(1.0, settings.max_grad_norm / (grad_norm + 1e-6)))
    lr = learning_rate(step, settings)
    for settings_of in optimizer.param_groups:
        settings_of["lr"] = lr
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


def global_counts(group: Group, batches: Sequence[Batch], problem: Exception | None = None) -> dict[str, int]:
    """Valid positions of every component, and input tokens, in the whole global batch. Where a process has a problem,
    all raise."""
    local = [batch.counts() for batch in batches]
    names = ("tokens", *LOSSES)
    mine = [int(problem is not None), *(sum(c.get(name, 0) for c in local) for name in names)]
    problems, *counts = group.sum(torch.tensor(mine, device=group.accelerator.device)).tolist()
    if problems:
        raise group.failure(problem)
    return dict(zip(names, counts, strict=True))


def not_finite(
    group: Group,
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
    bad_ids, all_ids = ([i for found in group.gather(mine) for ids in found for i in ids] for mine in (bad, every))
    shown = ", ".join(f"{name} {value:.4g}" for name, value in components.items())
    return RunError(
        f"{arm.label}, step {step + 1}: {shown}, gradient norm {grad_norm:.4g} are not finite. "
        f"Micro-batches with these examples: {', '.join(bad_ids or all_ids)}\n"
        "  Nothing of this step was saved. Look at one: python -m cache_schema show --recipe <recipe> --example <id>\n"
        "  If the examples are sound, lower train.lr (another run_dir, since it is another arm) or use dtype float32"
    )


def run_notes(group: Group, arm: ArmPlan, settings: Train, usable: Usable) -> dict[str, Any]:
    """For state.json: the arm, and what changes a result by rounding at most."""
    notes = {
        "processes": group.ranks,
        "micro_batch_size": settings.micro_batch_size,
        "examples": len(usable.rows),
        "dropped": usable.dropped,
        "randomness": "dropout: torch.manual_seed of (seed, step, micro-batch, rank); order: of (seed, epoch)",
        **provenance(),
    }
    return {"arm": fingerprint_of(arm.identity), "provenance": notes}
