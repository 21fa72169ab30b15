"""From cached rows to tensors: the student's own prompt, and the teacher's numbers beside each answer token.

`Collator` is called by `train` in a thread of its own, one step ahead. Row t of an answer is read from the student's
output at input position answer_start - 1 + t, the place before answer token t, and is compared with answer token t and
with a row of the cache: row t where teacher and student have the same tokens, else the row that `pipeline.alignment`
finds for it, or none.

Shapes: B examples, L padded input tokens, N the student's answer positions in the batch (examples one after another, no
padding), K cached ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from cache_schema.manifest import Manifest
from cache_schema.reader import CacheReader
from cache_schema.schema import ALL, RANKED, TEXT, AlignmentRow, CacheRow, Status, TextRow
from pipeline.alignment import NONE, Positions, align
from pipeline.errors import ModelError, RunError
from pipeline.models import tokenizer_digest
from pipeline.prompts import Encoded, PromptBuilder
from pipeline.sections import LOSSES, Alignment, Arm

G = TypeVar("G", bound=Any)


@dataclass(frozen=True)
class Teacher:
    """The cached distributions, one row for each of the student's positions. Rows that are not usable mean nothing."""

    logits_NK: Tensor  # float32, raw
    ids_NK: Tensor | None  # int64; None for an arm whose losses compare no ids
    logsumexp_N: Tensor  # float32, of logit / T over the full vocabulary, at the arm's temperature
    log_tail_N: Tensor | None  # float32, the same over the ids outside the top K; None when K = V
    usable_N: Tensor  # bool: there is a row for this position, and it is not quarantined
    weights_NK: Tensor | None = None  # float32, of drawn ids, see `weights`; None where the largest logits were kept


@dataclass(frozen=True)
class Batch:
    """A micro-batch. `teacher` is None for an arm that reads text alone."""

    example_ids: tuple[str, ...]
    input_ids_BL: Tensor  # int64
    attention_mask_BL: Tensor  # int64, 1 for a token and 0 for padding
    position_ids_BL: Tensor  # int64, counted without the padding
    read_at_N: Tensor  # int64 into the flattened [B * L]: where the student's prediction of each answer token is read
    labels_N: Tensor  # int64, the answer tokens themselves
    teacher: Teacher | None

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return _moved(self, device)

    def counts(self) -> dict[str, int]:
        """Valid positions by loss component, and the input tokens: what the sums are divided by, and throughput.

        `ce` counts every answer position; the teacher's losses those that have a usable row.
        """
        counts = {"tokens": int(self.attention_mask_BL.sum()), "ce": len(self.labels_N)}
        if self.teacher is not None:
            usable = int(self.teacher.usable_N.sum())
            counts |= {name: usable for name, needs in LOSSES.items() if needs.teacher}
        return counts


class Collator:
    """Reads rows of a cache and makes batches of them for one student and one arm.

    Only the columns that the arm's losses need are read. student_vocab: the width of the student's output. alignment:
    which row a position is compared with, where the student's tokenizer is not the teacher's (`pipeline.alignment`).
    Raises ModelError unless the student of an arm that compares ids has the teacher's tokenizer, RunError where the
    cache keeps drawn ids and the arm needs the largest logits.
    """

    def __init__(
        self, reader: CacheReader, prompts: PromptBuilder, student_vocab: int, arm: Arm, alignment: Alignment
    ) -> None:
        self.reader, self.prompts, self.student_vocab, self.alignment = reader, prompts, student_vocab, alignment
        self.same_tokenizer = has_teachers_tokenizer(prompts, reader.manifest)
        self.with_ids = arm.needs_ids
        self.columns = ALL if arm.needs_ids else RANKED if arm.needs_teacher else TEXT
        self.temperature_column = reader.manifest.temperatures.index(arm.temperature) if arm.has_temperature else 0
        _check_selector(reader, arm)
        if arm.needs_ids:
            check_same_tokenizer(prompts.tokenizer, reader.manifest, student_vocab)

    def read(self, indices: Sequence[int], micro_batch_size: int) -> list[Batch]:
        """The micro-batches, on the CPU, of these rows of the cache; none for no rows."""
        rows = self.reader.read(indices, self.columns)
        return [self.collate(rows[i : i + micro_batch_size]) for i in range(0, len(rows), micro_batch_size)]

    def collate(self, rows: Sequence[TextRow], padding: Literal["right", "left"] = "right") -> Batch:
        """One micro-batch. Training pads on the right; the other side exists to show that it makes no difference."""
        encoded = [self.prompts.encode(row.prompt, row.answer) for row in rows]
        length = max(len(e.input_ids) for e in encoded)
        ids_BL = torch.full((len(rows), length), self.prompts.end_id)
        mask_BL = torch.zeros_like(ids_BL)
        read_at = []
        for b, e in enumerate(encoded):
            start = 0 if padding == "right" else length - len(e.input_ids)
            ids_BL[b, start : start + len(e.input_ids)] = torch.tensor(e.input_ids)
            mask_BL[b, start : start + len(e.input_ids)] = 1
            first = b * length + start + e.answer_start - 1
            read_at.append(torch.arange(first, first + len(e.answer_ids)))
        return Batch(
            example_ids=tuple(row.example_id for row in rows),
            input_ids_BL=ids_BL,
            attention_mask_BL=mask_BL,
            position_ids_BL=(mask_BL.cumsum(1) - 1).clamp(min=0),
            read_at_N=torch.cat(read_at),
            labels_N=torch.tensor([token for e in encoded for token in e.answer_ids]),
            teacher=None if self.columns is TEXT else self._teacher(rows, encoded),
        )

    def _teacher(self, rows: Sequence[TextRow], encoded: Sequence[Encoded]) -> Teacher:
        """The rows' distributions, one for each of `labels_N` in its order."""
        cached = [row for row in rows if isinstance(row, CacheRow)]
        aligned = [self._aligned(row, e) for row, e in zip(cached, encoded, strict=True)]

        def gathered(arrays: Iterable[np.ndarray[Any, Any]]) -> Tensor:
            """Row n for position n; any row where there is none, for `usable_N` leaves it out."""
            return torch.from_numpy(np.concatenate([a[at.clip(0)] for a, at in zip(arrays, aligned, strict=True)]))

        tails = [row.log_tail for row in cached if row.log_tail is not None]
        draws = [row.draws for row in cached if row.draws is not None]
        slots = max((int((d > 0).sum(axis=1).max()) for d in draws), default=self.reader.manifest.top_k)  # none beyond
        usable = gathered(row.status == Status.USABLE for row in cached)
        return Teacher(
            logits_NK=gathered(row.logits[:, :slots] for row in cached),
            ids_NK=gathered(_ids(row)[:, :slots] for row in cached).long() if self.with_ids else None,
            logsumexp_N=gathered(row.logsumexp[:, self.temperature_column] for row in cached),
            log_tail_N=gathered(tail[:, self.temperature_column] for tail in tails) if tails else None,
            usable_N=usable & torch.from_numpy(np.concatenate(aligned) != NONE),
            weights_NK=gathered(self._weights(row)[:, :slots] for row in cached) if draws else None,
        )

    def _weights(self, row: CacheRow) -> np.ndarray[Any, Any]:
        assert row.draws is not None
        column, temperatures = self.temperature_column, self.reader.manifest.temperatures
        return weights(row.draws, row.logits, row.logsumexp, temperatures, column)

    def _aligned(self, row: CacheRow, encoded: Encoded) -> Positions:
        """The row of the cache that each position of the student is compared with."""
        if self.with_ids:
            self._check_answer(row, encoded.answer_ids)
        return aligned_rows(row, encoded, self.alignment, self.same_tokenizer)

    def _check_answer(self, row: CacheRow, answer_ids: Sequence[int]) -> None:
        """Same-tokenizer distillation: the student reads the very answer tokens that the teacher's rows predict."""
        ours, theirs = list(answer_ids), row.answer_ids.tolist()
        if ours != theirs:
            at = next(
                (t for t, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            raise ModelError(
                f"example {row.example_id}: the student's answer tokens are not those that the teacher predicted. They "
                f"differ first at answer token {at}: the student has {_token(self.prompts, ours, at)}, the cache has "
                f"{_token(self.prompts, theirs, at)}. logit_mse and kl need the same tokenizer and the same end of "
                "turn; use a student with the teacher's tokenizer, or train this student with uld"
            )
        used = _ids(row)[row.status == Status.USABLE]
        if used.size and int(used.max()) >= self.student_vocab:
            raise ModelError(
                f"example {row.example_id}: the cache has token id {int(used.max())}, but the student's vocabulary "
                f"ends at {self.student_vocab - 1}; use a student with the teacher's vocabulary, or uld"
            )


def aligned_rows(row: AlignmentRow, encoded: Encoded, alignment: Alignment, same_tokenizer: bool) -> Positions:
    """[N] for each answer position of the student the row of the cache that it is compared with, or NONE."""
    same_tokens = same_tokenizer and encoded.answer_ids == row.answer_ids.tolist()
    return align(alignment, row.answer_offsets, np.array(encoded.answer_offsets), same_tokens)


def weights(
    draws_NK: np.ndarray[Any, Any],
    logits_NK: np.ndarray[Any, Any],
    logsumexp_NT: np.ndarray[Any, Any],
    temperatures: Sequence[float],
    column: int,
) -> np.ndarray[Any, Any]:
    """[N, K] float32 d / K * p / p0 of drawn ids: its mean is p, the teacher at temperatures[column], at every id.

    p0 is the teacher at temperatures[0], from which the ids were drawn (cache_schema/FORMAT.md, "Selectors").
    """
    share_NK: np.ndarray[Any, Any] = draws_NK.astype(np.float32) / draws_NK.shape[1]
    if column == 0:
        return share_NK
    log_p0_NK, log_p_NK = (logits_NK / temperatures[i] - logsumexp_NT[:, i, None] for i in (0, column))
    share_NK *= np.exp(log_p_NK - log_p0_NK)
    return share_NK


def _check_selector(reader: CacheReader, arm: Arm) -> None:
    """Raise RunError where a loss would take drawn logits for the largest."""
    needing = arm.need_largest
    if reader.manifest.sampled and needing:
        raise RunError(
            f"the cache at {reader.location} keeps drawn ids (selector sampled), but {' and '.join(needing)} of this "
            "arm compare the teacher's largest logits; train with kl, or make another cache: --set cache.selector=topk"
        )


def has_teachers_tokenizer(prompts: PromptBuilder, manifest: Manifest) -> bool:
    """Whether a token id means the same to student and teacher."""
    return bool(tokenizer_digest(prompts.tokenizer) == manifest.identity["tokenizer"]["sha256"])


def check_same_tokenizer(tokenizer: Any, manifest: Manifest, student_vocab: int) -> None:
    """Raise ModelError unless logits at the cache's ids mean the same thing for a student."""
    ours, theirs = tokenizer_digest(tokenizer), manifest.identity["tokenizer"]["sha256"]
    if ours != theirs:
        raise ModelError(
            f"the student's tokenizer {tokenizer.name_or_path} (sha256 {ours[:12]}) is not the one that the cache was "
            f"made with (sha256 {theirs[:12]}), so a token id means another thing to each; logit_mse and kl need the "
            "teacher's tokenizer. Use a student that has it, or train this one with uld, which compares no ids"
        )
    inside = 0 if manifest.sampled else manifest.top_k + manifest.stores_tail
    if inside > student_vocab:
        raise ModelError(
            f"the cache holds the top {manifest.top_k} of {manifest.vocab_size} logits, but the student's vocabulary "
            f"has {student_vocab} ids only; make a cache with a smaller cache.top_k, or use another student"
        )


def _moved(group: G, device: torch.device) -> G:
    """A dataclass of tensors, and of dataclasses of tensors, on another device."""
    values = {f.name: getattr(group, f.name) for f in fields(group)}
    tensors = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
    groups = {name: _moved(v, device) for name, v in values.items() if is_dataclass(v)}
    return replace(group, **tensors, **groups)


def _ids(row: CacheRow) -> np.ndarray[Any, Any]:
    assert row.token_ids is not None, "the recipe's check: logit_mse and kl need cache.store_ids"
    return row.token_ids


def _token(prompts: PromptBuilder, ids: Sequence[int], at: int) -> str:
    if at >= len(ids):
        return "nothing (it is shorter)"
    return f"{ids[at]} {prompts.tokenizer.convert_ids_to_tokens(ids[at])!r}"
