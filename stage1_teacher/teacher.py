"""Teacher engines behind one small protocol: token ids in, float32 logits of the answer rows out.

Shape suffixes: B sequences, L tokens, H hidden, N answer rows of the batch, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.models import body_and_head, check_head, device_of, float32_head, load_causal_lm, locate, window_of
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class TeacherInput:
    """One sequence to read: `input_ids` whole, of which the rows `first_row` .. len(input_ids) - 2 are wanted.

    Row p is the output at input position p: the distribution that predicts the token at p + 1. With first_row =
    answer_start - 1, the first row wanted predicts answer token 0 and the last one end-of-sequence.
    """

    input_ids: list[int]
    first_row: int

    @property
    def rows(self) -> int:
        """How many rows are wanted."""
        return len(self.input_ids) - 1 - self.first_row


class Teacher(Protocol):
    """What the capture loop needs of a teacher."""

    vocab_size: int
    window: int | None  # the most tokens it can read

    def answer_logits(self, batch: Sequence[TeacherInput], context_ids: Sequence[int]) -> Iterator[Tensor]:
        """Float32 logits_NV of all wanted rows of the batch, in order, in chunks of some rows.

        Every sequence of the batch begins with `context_ids`, which is shorter than its first wanted row.
        """
        ...


class CausalTeacher:
    """A decoder run by transformers.

    The context that all sequences share (the worked examples) is read once and its key/value cache kept; each batch
    reads only its own tokens, right-padded over it. No mask is needed: under causal attention a token never sees the
    padding behind it. This is bitwise what the full forward computes in float32 on CPU (a test shows it). The output
    head runs on the wanted rows only, in float32.
    """

    def __init__(self, model: Any) -> None:
        check_head(model)
        self.model = model
        self.body, _ = body_and_head(model)
        self.head = float32_head(model)
        self.device = next(model.parameters()).device
        self.vocab_size = int(model.config.vocab_size)
        self.window = window_of(model)
        self.rows_per_chunk = max(16, 2**25 // self.vocab_size)
        self._context: tuple[tuple[int, ...], list[tuple[Tensor, Tensor]]] = ((), [])

    @torch.no_grad()
    def answer_logits(self, batch: Sequence[TeacherInput], context_ids: Sequence[int]) -> Iterator[Tensor]:
        """See Teacher."""
        skipped = len(context_ids)
        own = [item.input_ids[skipped:-1] for item in batch]
        longest = max(map(len, own))
        ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids in own], device=self.device)
        past = self._past(context_ids, len(batch)) if context_ids else None
        hidden_BLH = self.body(input_ids=ids_BL, past_key_values=past, use_cache=past is not None).last_hidden_state
        hidden_NH = torch.cat([hidden_BLH[b, item.first_row - skipped : len(own[b])] for b, item in enumerate(batch)])
        for rows_NH in hidden_NH.split(self.rows_per_chunk):
            yield self.head(rows_NH)

    def _past(self, context_ids: Sequence[int], batch_size: int) -> Any:
        """The context's key/value cache, seen by every sequence of the batch."""
        from transformers import DynamicCache

        if self._context[0] != tuple(context_ids):
            cache: Any = DynamicCache()
            self.body(
                input_ids=torch.tensor([list(context_ids)], device=self.device), past_key_values=cache, use_cache=True
            )
            self._context = (tuple(context_ids), [(layer.keys, layer.values) for layer in cache.layers])
        return DynamicCache(
            [(k.expand(batch_size, -1, -1, -1), v.expand(batch_size, -1, -1, -1)) for k, v in self._context[1]]
        )


def vocabulary_size(recipe: Recipe) -> int:
    """The teacher's vocabulary from its config alone, before any weight is read."""
    from transformers import AutoConfig

    source = locate(recipe.teacher.model, recipe.teacher.revision)
    try:
        config = AutoConfig.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {source.location}: its config.json cannot be read: {error}") from None
    if config.is_encoder_decoder:
        raise ModelError(f"model {source.location} is an encoder-decoder ({config.model_type}); teacher.kind is causal")
    return int(config.vocab_size)


def load_teacher(recipe: Recipe) -> Teacher:
    """The teacher a recipe names, its weights on the recipe's device."""
    source = locate(recipe.teacher.model, recipe.teacher.revision)
    model = load_causal_lm(source, recipe.teacher.dtype, recipe.teacher.quantization, device_of(recipe))
    return CausalTeacher(model)
