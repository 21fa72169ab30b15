"""The capture loop: examples in, cache rows out, shard by shard.

A shard is the unit of work, independent and idempotent: its batches are made inside it, so doing it again gives the
same bytes on the same hardware, thread count and batch plan. Called by `executor`, which hands out the shards.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from cache_schema.bounds import MAX_ROW_VALUES
from cache_schema.codec import usable_positions
from cache_schema.schema import CacheRow, QuarantinedExample, Status
from pipeline.data import Shots
from pipeline.errors import UserError
from pipeline.fingerprint import Experiment
from pipeline.prompts import Encoded, PromptBuilder
from pipeline.tasks import Example
from stage1_teacher.sampling import sample, uniforms
from stage1_teacher.teacher import FullLogitsTeacher, Teacher, TeacherInput
from stage1_teacher.topk import TopK


class OutOfMemory(UserError):
    """One example alone does not fit into memory."""


@dataclass(frozen=True)
class Capture:
    """What is needed to turn one shard's examples into rows.

    step: the quantisation step, in logits: a logit too far below the top one to be stored makes its position unusable.
    batch_tokens: own tokens of a batch, the encoder's and the decoder's, padding included.
    store_ids: whether rows carry the ids of their logits; without, they never leave the device.
    sample_seed: draw `top_k` ids of every position with this seed instead of keeping the largest; the teacher has to
    show its full logits for that.
    """

    teacher: Teacher
    prompts: PromptBuilder
    shots: Shots
    top_k: int
    temperatures: Sequence[float]
    step: float
    batch_tokens: int
    store_ids: bool = True
    sample_seed: int | None = None

    @classmethod
    def of(cls, experiment: Experiment, teacher: Teacher) -> "Capture":
        """As the experiment's recipe has it."""
        recipe, cache = experiment.recipe, experiment.recipe.cache
        return cls(
            teacher,
            experiment.teacher_prompts,
            experiment.training_set.shots,
            cache.top_k,
            cache.temperatures,
            cache.step,
            recipe.runtime.batch_tokens,
            cache.store_ids,
            cache.sample_seed if cache.selector == "sampled" else None,
        )

    def shard(
        self, examples: Sequence[Example], report: Callable[[int], None] = lambda done: None
    ) -> tuple[list[CacheRow], list[QuarantinedExample]]:
        """Rows of the usable examples, in their order, and the others with their reasons.

        `report` is called with the number of examples finished.
        """
        jobs, quarantined = self.prepare(examples)
        report(len(quarantined))
        rows: dict[str, CacheRow] = {}
        for context, batch in self.batches(jobs):
            try:
                for job, kept in zip(batch, self._run(batch, context), strict=True):
                    rows[job.example.id] = self._row(job, kept)
            except Exception as error:
                first, *others = (job.example.id for job in batch)
                error.add_note(f"in the batch of {first}" + (f" and {len(others)} more" if others else ""))
                raise
            report(len(batch))
        return [rows[example.id] for example in examples if example.id in rows], quarantined

    def prepare(self, examples: Sequence[Example]) -> "tuple[list[Job], list[QuarantinedExample]]":
        """What the teacher is to read of the usable examples, and the others with their reasons."""
        quarantined: list[QuarantinedExample] = []
        jobs: list[Job] = []
        for example in examples:
            if example.unusable:
                quarantined.append(QuarantinedExample(example.id, example.task, example.unusable))
                continue
            encoded = self.prompts.try_encode(example.prompt, example.answer, self.shots.of(example))
            if encoded is None:
                quarantined.append(QuarantinedExample(example.id, example.task, "cannot_encode"))
                continue
            reason, readable = self._usable(example, encoded)
            if reason:
                quarantined.append(QuarantinedExample(example.id, example.task, reason, len(encoded.answer_ids)))
                continue
            read = TeacherInput(encoded.input_ids[:readable], encoded.answer_start - 1, encoded.encoder_ids)
            jobs.append(Job(example, encoded, read))
        return jobs, quarantined

    def batches(self, jobs: "Sequence[Job]") -> "Iterator[tuple[list[int], list[Job]]]":
        """The batches of a shard, each with the leading tokens that all its sequences share and that are read once."""
        for context, group in self._by_context(jobs):
            for batch in token_budget_batches(group, len(context), self.batch_tokens):
                yield context, batch

    def _usable(self, example: Example, encoded: Encoded) -> tuple[str, int]:
        """(why the example cannot be used at all or "", how many of its tokens count).

        The last token is never read, only predicted, so a window of W serves W + 1 tokens. An answer that goes beyond
        is cut there: its later positions are in the ledger as `cut`. One that no prompt would leave room for is not
        kept at all: it would be a row of nothing but cut positions, as large as its text is long; nor is one of more
        numbers than the format allows a row. An id that the model has no row for, which a tokenizer with added tokens
        can give, would stop the whole batch.
        """
        readable, window = len(encoded.input_ids), self.teacher.window
        if window is not None:
            readable = min(readable, window + 1)
        if not example.answer.strip():
            return "empty_answer", readable
        if encoded.answer_start == 0:  # nothing to read before answer token 0, so nothing that predicts it
            return "empty_prompt", readable
        if readable <= encoded.answer_start:
            return "prompt_exceeds_window", readable
        if window is not None and len(encoded.answer_ids) > window + 1:
            return "answer_exceeds_window", readable
        if len(encoded.answer_ids) * max(self.top_k, len(self.temperatures), 2) > MAX_ROW_VALUES:
            return "answer_too_long", readable
        if max([*encoded.input_ids, *encoded.encoder_ids]) >= self.teacher.vocab_size:
            return "id_beyond_vocabulary", readable
        return "", readable

    def _by_context(self, jobs: "Sequence[Job]") -> Iterator[tuple[list[int], "list[Job]"]]:
        """Jobs grouped by the worked examples they share; those that share none are read whole, context ()."""
        shared: dict[str, list[int]] = {}
        groups: dict[tuple[int, ...], list[Job]] = {}
        for job in jobs:
            task = job.example.task
            if task not in shared:
                shared[task] = (
                    self.prompts.shared_ids(self.shots.of(job.example)) if self.shots.policy == "shared" else []
                )
            context = shared[task]
            fits = job.encoded.input_ids[: len(context)] == context and len(context) < job.encoded.answer_start
            groups.setdefault(tuple(context) if fits else (), []).append(job)
        for key, members in groups.items():
            yield list(key), members

    def _run(self, batch: "Sequence[Job]", context: list[int]) -> "list[TopK]":
        """One batch through the teacher and reduced to the CPU; halved for as long as memory runs out."""
        inputs = [job.input for job in batch]
        try:
            chunks = [_on_cpu(kept, self.store_ids) for kept in self._selected(batch, context)]
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        else:
            return _split(chunks, [item.rows for item in inputs])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            raise OutOfMemory(
                f"example {batch[0].example.id}: its {sum(batch[0].lengths)} tokens do not fit into memory; "
                "use teacher.quantization=nf4, fewer teacher.shots, or a larger device"
            )
        half = len(batch) // 2
        return self._run(batch[:half], context) + self._run(batch[half:], context)

    def _selected(self, batch: "Sequence[Job]", context: list[int]) -> Iterator[TopK]:
        """All wanted rows of the batch, in order, in chunks of some rows: their largest logits, or drawn ones."""
        inputs = [job.input for job in batch]
        if self.sample_seed is None:
            yield from self.teacher.top_k(inputs, context, self.top_k, self.temperatures)
            return
        assert isinstance(self.teacher, FullLogitsTeacher), "the recipe's check"
        done, seed = 0, self.sample_seed
        uniforms_NK = np.concatenate(
            [uniforms(seed, job.example.task, job.example.id, job.input.rows, self.top_k) for job in batch]
        )
        for logits_NV in self.teacher.answer_logits(inputs, context):
            yield sample(logits_NV, uniforms_NK[done : done + len(logits_NV)], self.temperatures)
            done += len(logits_NV)

    def _row(self, job: "Job", kept: TopK) -> CacheRow:
        """One example's cache row; positions beyond the window are filled with zeros and marked cut."""
        answer_ids = np.asarray(job.encoded.answer_ids, dtype=np.int32)
        n, read = len(answer_ids), len(kept.finite_N)
        status = np.full(n, Status.CUT, dtype=np.uint8)

        def padded(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
            array = tensor.numpy()
            return np.concatenate([array, np.zeros((n - read, *array.shape[1:]), dtype=array.dtype)])

        logits, logsumexp = padded(kept.logits_NK), padded(kept.logsumexp_NT)
        token_ids = None if kept.token_ids_NK is None else padded(kept.token_ids_NK).astype(np.int32)
        draws = None if kept.draws_NK is None else padded(kept.draws_NK).astype(np.int32)
        log_tail = None if kept.log_tail_NT is None else padded(kept.log_tail_NT)
        usable = usable_positions(logits[:, 0], logits, logsumexp, log_tail, self.step)[:read] & kept.finite_N.numpy()
        status[:read] = np.where(usable, Status.USABLE, Status.NOT_FINITE)
        if (answer_ids == self._unknown_id).any():
            status[int((answer_ids == self._unknown_id).argmax()) :] = Status.UNKNOWN_TOKEN
        return CacheRow(
            example_id=job.example.id,
            task=job.example.task,
            prompt=job.example.prompt,
            answer=job.example.answer,
            answer_ids=answer_ids,
            answer_start=job.encoded.answer_start,
            answer_offsets=np.asarray(job.encoded.answer_offsets, dtype=np.int32),
            status=status,
            top_logit=logits[:, 0].copy(),
            logits=logits,
            token_ids=token_ids,
            logsumexp=logsumexp,
            log_tail=log_tail,
            draws=draws,
        )

    @property
    def _unknown_id(self) -> int:
        """The id of a text the tokenizer does not know, -1 where it knows all (or ends its turns with it, as GPT-2)."""
        unknown = self.prompts.tokenizer.unk_token_id
        return -1 if unknown is None or unknown == self.prompts.end_id else int(unknown)


@dataclass(frozen=True)
class Job:
    """A usable example and what the teacher reads of it."""

    example: Example
    encoded: Encoded
    input: TeacherInput

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens for the encoder (0 without one) and for the decoder."""
        return len(self.input.encoder_ids), len(self.input.input_ids)


def token_budget_batches(jobs: Sequence[Job], skipped: int, budget: int) -> Iterator[list[Job]]:
    """Length-sorted batches, longest first (memory is at its peak at once, not at the end), each of at most `budget`
    tokens with padding, the encoder's and the decoder's; `skipped` leading tokens of every decoder sequence are the
    shared context and count nothing. Sorted by the encoder's lengths first: prompts are longer than answers."""
    batch: list[Job] = []
    longest = np.zeros(2, dtype=int)
    for job in sorted(jobs, key=lambda job: (*(-n for n in job.lengths), job.example.id)):
        own = np.array(job.lengths) - (0, skipped)
        if batch and np.maximum(longest, own).sum() * (len(batch) + 1) > budget:
            yield batch
            batch, longest = [], own
        batch.append(job)
        longest = np.maximum(longest, own)
    if batch:
        yield batch


def _on_cpu(kept: TopK, with_ids: bool) -> TopK:
    ids = kept.token_ids_NK.cpu() if with_ids and kept.token_ids_NK is not None else None
    tail = None if kept.log_tail_NT is None else kept.log_tail_NT.cpu()
    draws = None if kept.draws_NK is None else kept.draws_NK.cpu()
    return TopK(kept.logits_NK.cpu(), ids, kept.logsumexp_NT.cpu(), tail, kept.finite_N.cpu(), draws)


def _split(chunks: Sequence[TopK], lengths: Sequence[int]) -> list[TopK]:
    """Row chunks of a batch, regrouped by sequence."""

    def whole(name: str) -> Sequence[Any]:
        if getattr(chunks[0], name) is None:
            return [None] * len(lengths)
        parts: Sequence[torch.Tensor] = torch.cat([getattr(chunk, name) for chunk in chunks]).split(list(lengths))
        return parts

    return [TopK(*parts) for parts in zip(*(whole(field.name) for field in fields(TopK)), strict=True)]


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch raises a class of its own on a GPU and a plain RuntimeError for the CPU's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
