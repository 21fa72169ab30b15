"""The rows of a decoder's batch while their answers are written. Called by `hf`.

Shapes: B rows, C columns of the KV cache: the shared context, padding, own tokens, answer. A row's padding may lie
anywhere: `mask_BC` leaves it out, and positions are counted without it, so other rows can join at any time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.models import kv_cache_argument
from stage3_eval.generate import Generated


@dataclass
class Decoding:
    """Rows in work. A row that has ended stays, its tokens thrown away, until `drop_ended`."""

    prompts: list[int]  # row -> which prompt it answers
    cache: Any
    mask_BC: Tensor  # int64, 1 for a column to be attended to
    positions_B: Tensor  # int64, where the token written last stands
    next_B: Tensor  # int64, the token written last, which the model has not read yet
    answers: list[list[int]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.answers:
            self.answers = [[token] for token in self.next_B.tolist()]
            self.ended = [False] * len(self.answers)

    @property
    def going_on(self) -> int:
        """How many rows have not ended."""
        return self.ended.count(False)

    def end(self, end_id: int, max_new_tokens: int) -> Iterator[tuple[int, Generated]]:
        """The prompts answered by the token written last, with their answers."""
        for row, ids in enumerate(self.answers):
            if not self.ended[row] and (ids[-1] == end_id or len(ids) == max_new_tokens):
                self.ended[row] = True
                yield self.prompts[row], Generated(ids, ids[-1] == end_id)

    def step(self, model: Any, **arguments: Any) -> None:
        """One token more for each row."""
        self.mask_BC = torch.cat([self.mask_BC, self.mask_BC.new_ones(len(self.prompts), 1)], 1)
        logits_BV = model(
            input_ids=self.next_B[:, None],
            attention_mask=self.mask_BC,
            position_ids=self.positions_B[:, None],
            use_cache=True,
            **kv_cache_argument(model, self.cache),
            **arguments,
        ).logits[:, -1]
        self.next_B, self.positions_B = logits_BV.argmax(-1), self.positions_B + 1
        for row, token in enumerate(self.next_B.tolist()):
            if not self.ended[row]:
                self.answers[row].append(token)

    def drop_ended(self) -> None:
        """Go on with the others alone."""
        rows = [row for row, ended in enumerate(self.ended) if not ended]
        keep = torch.tensor(rows, device=self.next_B.device)
        self.cache.batch_select_indices(keep)
        self.mask_BC, self.positions_B, self.next_B = self.mask_BC[keep], self.positions_B[keep], self.next_B[keep]
        self.prompts, self.answers = [self.prompts[row] for row in rows], [self.answers[row] for row in rows]
        self.ended = [False] * len(rows)

    def joined(self, other: "Decoding") -> "Decoding":
        """These rows and others in one batch, which takes no more columns than its longest row needs.

        Both caches must hold every column (no sliding window).
        """
        parts = (self, other)
        starts = [int(part.mask_BC.any(0).int().argmax()) for part in parts]  # before it, nobody's columns
        C = max(part.mask_BC.shape[1] - start for part, start in zip(parts, starts, strict=True))

        def fitted(tensor: Tensor, start: int, columns: int) -> Tensor:
            tensor = tensor.narrow(columns, start, tensor.shape[columns] - start)
            shape = list(tensor.shape)
            shape[columns] = C - shape[columns]
            return torch.cat([tensor.new_zeros(shape), tensor], columns)

        def both(tensors: tuple[Tensor, Tensor], columns: int) -> Tensor:
            return torch.cat([fitted(t, start, columns) for t, start in zip(tensors, starts, strict=True)])

        layers = zip(self.cache.layers, other.cache.layers, strict=True)
        return Decoding(
            prompts=self.prompts + other.prompts,
            cache=DynamicCache([(both((a.keys, b.keys), 2), both((a.values, b.values), 2)) for a, b in layers]),
            mask_BC=both((self.mask_BC, other.mask_BC), 1),
            positions_B=torch.cat([self.positions_B, other.positions_B]),
            next_B=torch.cat([self.next_B, other.next_B]),
            answers=self.answers + other.answers,
            ended=self.ended + other.ended,
        )
