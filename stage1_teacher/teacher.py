"""Teacher engines behind one small protocol: token ids in, the answer rows' largest logits and normalisers out.

Shape suffixes: B sequences, L tokens (E where the encoder reads them), H hidden, N answer rows of the batch, V
vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.models import (
    body_and_head,
    check_head,
    check_seq2seq_head,
    device_of,
    float32_head,
    input_device,
    kv_cache_argument,
    load_causal_lm,
    load_config,
    load_seq2seq_lm,
    locate,
    placement,
    window_of,
)
from pipeline.prompts import PromptBuilder
from pipeline.recipe import Recipe
from stage1_teacher.topk import TopK, select_top_k


@dataclass(frozen=True)
class TeacherInput:
    """One sequence for the decoder to read, of which the rows `first_row` .. len(input_ids) - 2 are wanted.

    Row p is the output at input position p: the distribution that predicts the token at p + 1. With first_row =
    answer_start - 1, the first row wanted predicts answer token 0 and the last one end-of-sequence.
    encoder_ids: what the encoder reads first; empty for a decoder alone.
    """

    input_ids: list[int]
    first_row: int
    encoder_ids: Sequence[int] = ()

    @property
    def rows(self) -> int:
        """How many rows are wanted."""
        return len(self.input_ids) - 1 - self.first_row


class Teacher(Protocol):
    """What the capture loop needs of a teacher."""

    vocab_size: int
    window: int | None  # the most tokens its decoder can read

    @property
    def provenance(self) -> dict[str, Any]:
        """What a commit record says of the engine beyond the software: where the teacher lies, what it has read."""
        ...

    def top_k(
        self, batch: Sequence[TeacherInput], context_ids: Sequence[int], k: int, temperatures: Sequence[float]
    ) -> Iterator[TopK]:
        """All wanted rows of the batch, in order, in chunks of some rows, reduced as `topk.select_top_k` does.

        Every sequence of the batch begins with `context_ids`, which is shorter than its first wanted row.
        """
        ...


class FullLogitsTeacher(ABC):
    """A teacher in this process, whose full logits are at hand."""

    model: Any
    vocab_size: int
    window: int | None

    @property
    def provenance(self) -> dict[str, Any]:
        """See Teacher."""
        return placement(self.model)

    @abstractmethod
    def answer_logits(self, batch: Sequence[TeacherInput], context_ids: Sequence[int]) -> Iterator[Tensor]:
        """Float32 logits_NV of all wanted rows of the batch, in order, in chunks of some rows."""

    def top_k(
        self, batch: Sequence[TeacherInput], context_ids: Sequence[int], k: int, temperatures: Sequence[float]
    ) -> Iterator[TopK]:
        """See Teacher."""
        for logits_NV in self.answer_logits(batch, context_ids):
            yield select_top_k(logits_NV, k, temperatures)


class CausalTeacher(FullLogitsTeacher):
    """A decoder run by transformers.

    The context that all sequences share (the worked examples) is read once and its key/value cache kept; each batch
    reads only its own tokens, right-padded over it. No mask is needed: under causal attention a token never sees the
    padding behind it. In float32 this is what the full forward computes to 1e-6, bitwise on some processors (a test
    shows it). The output head runs on the wanted rows only, in float32.
    """

    def __init__(self, model: Any) -> None:
        check_head(model)
        self.model = model
        self.body, _ = body_and_head(model)
        self.head = float32_head(model)
        self.device = input_device(model)
        self.vocab_size = int(model.config.vocab_size)
        self.window = window_of(model.config)
        self.rows_per_chunk = _rows_per_chunk(self.vocab_size)
        self._context: tuple[tuple[int, ...], list[tuple[Tensor, Tensor]]] = ((), [])

    @torch.no_grad()
    def answer_logits(self, batch: Sequence[TeacherInput], context_ids: Sequence[int]) -> Iterator[Tensor]:
        """See FullLogitsTeacher."""
        skipped = len(context_ids)
        own = [item.input_ids[skipped:-1] for item in batch]
        ids_BL = _right_padded(own, self.device)
        past = kv_cache_argument(self.body, self._past(context_ids, len(batch))) if context_ids else {}
        hidden_BLH = self.body(input_ids=ids_BL, use_cache=bool(past), **past).last_hidden_state
        hidden_NH = torch.cat([hidden_BLH[b, item.first_row - skipped : len(own[b])] for b, item in enumerate(batch)])
        for rows_NH in hidden_NH.split(self.rows_per_chunk):
            yield self.head(rows_NH)

    def _past(self, context_ids: Sequence[int], batch_size: int) -> Any:
        """The context's key/value cache, seen by every sequence of the batch."""
        from transformers import DynamicCache

        if self._context[0] != tuple(context_ids):
            cache: Any = DynamicCache()
            ids_1L = torch.tensor([list(context_ids)], device=self.device)
            self.body(input_ids=ids_1L, use_cache=True, **kv_cache_argument(self.body, cache))
            self._context = (tuple(context_ids), [(layer.keys, layer.values) for layer in cache.layers])
        return DynamicCache(
            [(k.expand(batch_size, -1, -1, -1), v.expand(batch_size, -1, -1, -1)) for k, v in self._context[1]]
        )


class Seq2SeqTeacher(FullLogitsTeacher):
    """An encoder-decoder run by transformers: prompts into the encoder, answers teacher-forced through the decoder.

    The encoder's padding is masked, in its own attention and in the decoder's look at it. The decoder is padded on the
    right and needs no mask, as under causal attention. The output head runs on the wanted rows only, in float32.
    """

    def __init__(self, model: Any) -> None:
        check_seq2seq_head(model)
        self.model = model
        self.head = float32_head(model)
        self.device = input_device(model)
        self.vocab_size = int(model.config.vocab_size)
        self.window = window_of(model.config)
        self.rows_per_chunk = _rows_per_chunk(self.vocab_size)

    @torch.no_grad()
    def answer_logits(self, batch: Sequence[TeacherInput], context_ids: Sequence[int]) -> Iterator[Tensor]:
        """See FullLogitsTeacher; there is no context to share, since the encoder reads each prompt as a whole."""
        assert not context_ids, "an encoder reads in both directions: nothing before the prompt can be read once"
        ids_BE = _right_padded([item.encoder_ids for item in batch], self.device)
        lengths_B = torch.tensor([len(item.encoder_ids) for item in batch], device=self.device)
        mask_BE = (torch.arange(ids_BE.shape[1], device=self.device) < lengths_B[:, None]).long()
        read_BEH = self.model.get_encoder()(input_ids=ids_BE, attention_mask=mask_BE).last_hidden_state
        own = [item.input_ids[:-1] for item in batch]
        hidden_BLH = self.model.get_decoder()(
            input_ids=_right_padded(own, self.device),
            encoder_hidden_states=read_BEH,
            encoder_attention_mask=mask_BE,
            use_cache=False,
        ).last_hidden_state
        hidden_NH = torch.cat([hidden_BLH[b, item.first_row : len(own[b])] for b, item in enumerate(batch)])
        for rows_NH in hidden_NH.split(self.rows_per_chunk):
            yield self.head(rows_NH)


def _right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """ids_BL; what the padding says does not matter."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences], device=device)


def _rows_per_chunk(vocab_size: int) -> int:
    """Answer rows whose full logits exist at a time: 128 MiB of float32."""
    return max(16, 2**25 // vocab_size)


def vocabulary_size(recipe: Recipe, prompts: PromptBuilder) -> int:
    """The teacher's vocabulary, from its config alone: what does not fit is refused before any weight is read.

    Raises ModelError where the config cannot be read, where teacher.kind is not the model's, and for an encoder-decoder
    in float16 or one whose decoder starts otherwise than with the prompts' token.
    """
    source = locate(recipe.teacher.model, recipe.teacher.revision)
    config = load_config(source)
    kind = "seq2seq" if config.is_encoder_decoder else "causal"
    if kind != recipe.teacher.kind:
        what = "an encoder-decoder" if config.is_encoder_decoder else "a decoder without an encoder"
        raise ModelError(
            f"model {source.location} is {what} ({config.model_type}), but teacher.kind is {recipe.teacher.kind}; "
            f"--set teacher.kind={kind}"
        )
    if kind == "seq2seq":
        if recipe.teacher.dtype == "float16":
            raise ModelError(
                "teacher.dtype is float16, in which the activations of FLAN-T5-XL and other large T5s overflow; "
                "--set teacher.dtype=bfloat16"
            )
        if config.decoder_start_token_id != prompts.start_id:
            raise ModelError(
                f"model {source.location} ({config.model_type}): its decoder starts with token "
                f"{config.decoder_start_token_id}; expected its tokenizer's pad_token, {prompts.start_id}, as T5's "
                "does. This family lays out its answers otherwise and is not supported"
            )
    return int(config.vocab_size)


def load_teacher(recipe: Recipe, longest: Callable[[], int]) -> Teacher:
    """The teacher a recipe names, its weights where the recipe's runtime section says.

    longest: tokens of the longest sequence; counted only for an engine that must know (vLLM reserves memory for it).
    """
    source, teacher, runtime = locate(recipe.teacher.model, recipe.teacher.revision), recipe.teacher, recipe.runtime
    if teacher.engine == "vllm":
        from stage1_teacher.vllm import VLLMTeacher

        return VLLMTeacher(recipe, longest())
    load = load_seq2seq_lm if teacher.kind == "seq2seq" else load_causal_lm
    model = load(source, teacher.dtype, teacher.quantization, device_of(recipe), runtime.device_map)
    return Seq2SeqTeacher(model) if teacher.kind == "seq2seq" else CausalTeacher(model)
