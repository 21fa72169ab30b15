"""From cached rows to tensors: the student's own prompt, and the teacher's numbers beside each answer token.

`Collator` is called by `train` in a thread of its own, one step ahead. Row t of an answer is read from the student's
output at input position answer_start - 1 + t, the place before answer token t, and is compared with answer token t and
with row t of the cache, which is the teacher's distribution over the same token.

Shapes: B examples, L padded input tokens, N answer positions of the batch (examples one after another, no padding),
K cached ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from cache_schema.manifest import Manifest
from cache_schema.reader import CacheReader
from cache_schema.schema import ALL, TEXT, CacheRow, Status, TextRow
from pipeline.errors import DataError, ModelError
from pipeline.models import tokenizer_digest
from pipeline.prompts import Encoded, PromptBuilder
from pipeline.sections import Arm

G = TypeVar("G", bound=Any)


@dataclass(frozen=True)
class Teacher:
    """The cached distributions of a batch; row n predicts answer token n. Rows that are not usable mean nothing."""

    logits_NK: Tensor  # float32, raw
    ids_NK: Tensor  # int64
    logsumexp_N: Tensor  # float32, of logit / T over the full vocabulary, at the arm's temperature
    log_tail_N: Tensor | None  # float32, the same over the ids outside the top K; None when K = V
    usable_N: Tensor  # bool


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

        `ce` counts every answer position; the teacher's losses leave the quarantined ones out.
        """
        counts = {"tokens": int(self.attention_mask_BL.sum()), "ce": len(self.labels_N)}
        if self.teacher is not None:
            usable = int(self.teacher.usable_N.sum())
            counts |= {"logit_mse": usable, "kl": usable}
        return counts


class Collator:
    """Reads rows of a cache and makes batches of them for one student and one arm.

    An arm without teacher losses reads the text columns alone. student_vocab: the width of the student's output.
    Raises ModelError unless the student of an arm with teacher losses has the teacher's tokenizer.
    """

    def __init__(self, reader: CacheReader, prompts: PromptBuilder, student_vocab: int, arm: Arm) -> None:
        self.reader, self.prompts, self.student_vocab = reader, prompts, student_vocab
        self.with_teacher = arm.needs_teacher
        self.column = reader.manifest.temperatures.index(arm.temperature) if arm.kl > 0 else 0  # only kl has one
        if arm.needs_teacher:
            check_same_tokenizer(prompts.tokenizer, reader.manifest, student_vocab)

    def read(self, indices: Sequence[int], micro_batch_size: int) -> list[Batch]:
        """The micro-batches, on the CPU, of these rows of the cache; none for no rows."""
        rows: Sequence[TextRow] = self.reader.read(indices, ALL if self.with_teacher else TEXT)
        return [self.collate(rows[i : i + micro_batch_size]) for i in range(0, len(rows), micro_batch_size)]

    def collate(self, rows: Sequence[TextRow], padding: Literal["right", "left"] = "right") -> Batch:
        """One micro-batch. Training pads on the right; the other side exists to show that it makes no difference."""
        encoded = [self.prompts.encode(row.prompt, row.answer) for row in rows]
        length = max(len(e.input_ids) for e in encoded)
        ids_BL = torch.full((len(rows), length), int(self.prompts.end_id or 0))
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
            teacher=self._teacher(rows, encoded) if self.with_teacher else None,
        )

    def _teacher(self, rows: Sequence[TextRow], encoded: Sequence[Encoded]) -> Teacher:
        """The rows' distributions end to end, in the order of `labels_N`."""
        cached = [row for row in rows if isinstance(row, CacheRow)]
        for row, e in zip(cached, encoded, strict=True):
            self._check_answer(row, e.answer_ids)
        tails = [row.log_tail for row in cached if row.log_tail is not None]
        return Teacher(
            logits_NK=_joined([row.logits for row in cached]),
            ids_NK=_joined([_ids(row) for row in cached]).long(),
            logsumexp_N=_joined([row.logsumexp[:, self.column] for row in cached]),
            log_tail_N=_joined([tail[:, self.column] for tail in tails]) if tails else None,
            usable_N=_joined([row.status == Status.USABLE for row in cached]),
        )

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
                f"{_token(self.prompts, theirs, at)}. Distilling position by position needs the same tokenizer and the "
                "same end of turn; use a student with the teacher's tokenizer, or train this student with ce alone"
            )
        used = _ids(row)[row.status == Status.USABLE]
        if used.size and int(used.max()) >= self.student_vocab:
            raise ModelError(
                f"example {row.example_id}: the cache has token id {int(used.max())}, but the student's vocabulary "
                f"ends at {self.student_vocab - 1}; use a student with the teacher's vocabulary, or ce alone"
            )


def check_same_tokenizer(tokenizer: Any, manifest: Manifest, student_vocab: int) -> None:
    """Raise ModelError unless logits at the cache's ids mean the same thing for a student."""
    ours, theirs = tokenizer_digest(tokenizer), manifest.identity["tokenizer"]["sha256"]
    if ours != theirs:
        raise ModelError(
            f"the student's tokenizer {tokenizer.name_or_path} (sha256 {ours[:12]}) is not the one that the cache was "
            f"made with (sha256 {theirs[:12]}), so a token id means another thing to each; logit_mse and kl need the "
            "teacher's tokenizer. Use a student that has it, or train this one with ce alone (--arm sft)"
        )
    if manifest.top_k > student_vocab or (manifest.stores_tail and manifest.top_k == student_vocab):
        raise ModelError(
            f"the cache holds the top {manifest.top_k} of {manifest.vocab_size} logits, but the student's vocabulary "
            f"has {student_vocab} ids only; make a cache with a smaller cache.top_k, or use another student"
        )


@dataclass(frozen=True)
class Usable:
    """The rows of a cache that a student can read whole: `rows` are row numbers, the same for all its arms."""

    rows: list[int]
    dropped: int
    longest: int  # tokens of the longest example, prompt and answer together


def usable_rows(
    reader: CacheReader, prompts: PromptBuilder, window: int | None, report: Callable[[], None] | None = None
) -> Usable:
    """Drop what does not fit the student's window of `window` tokens, before the order is built.

    Only the text, the student's tokenizer and its window decide, so every arm of a student trains on the same
    examples. `report` is called after each. Raises DataError when nothing is left.
    """
    lengths = []
    for row in reader.rows(TEXT):
        lengths.append(len(prompts.encode(row.prompt, row.answer).input_ids))
        if report is not None:
            report()
    rows = [index for index, length in enumerate(lengths) if window is None or length <= window]
    if not rows:
        found = (
            f"the shortest of {len(lengths)} examples has {min(lengths)} tokens" if lengths else "the cache has no rows"
        )
        raise DataError(
            f"no example fits the student {prompts.tokenizer.name_or_path}, which reads {window} tokens: {found}; "
            "use a student with a longer window, or a task with shorter examples"
        )
    return Usable(rows, len(lengths) - len(rows), max(lengths))


def _moved(group: G, device: torch.device) -> G:
    """A dataclass of tensors, and of dataclasses of tensors, on another device."""
    values = {f.name: getattr(group, f.name) for f in fields(group)}
    tensors = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
    groups = {name: _moved(v, device) for name, v in values.items() if is_dataclass(v)}
    return replace(group, **tensors, **groups)


def _ids(row: CacheRow) -> np.ndarray[Any, Any]:
    assert row.token_ids is not None, "the recipe's check: logit_mse and kl need cache.store_ids"
    return row.token_ids


def _joined(arrays: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))


def _token(prompts: PromptBuilder, ids: Sequence[int], at: int) -> str:
    if at >= len(ids):
        return "nothing (it is shorter)"
    return f"{ids[at]} {prompts.tokenizer.convert_ids_to_tokens(ids[at])!r}"
