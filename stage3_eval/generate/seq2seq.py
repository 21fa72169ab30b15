"""The engine on transformers for encoder-decoders: reference models, scored as they are. Called by `subject`.

See `stage3_eval.generate` for the protocol. Shapes: B prompts of a batch (those not finished yet), S columns of the
encoder's padded prompts, R rows of the decoder (a prompt with one of its labels), T columns of padded labels, N label
tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stage3_eval.generate import Generated
from stage3_eval.generate.batching import Batches, Rows, summed_logprobs


class Seq2SeqEngine:
    """Batched greedy decoding on a transformers encoder-decoder, without adapters.

    The encoder runs once a batch; the decoder starts from `decoder_start_token_id` and keeps a KV cache; a row leaves
    the batch soon after it has finished. Out of memory halves the batch and goes on.
    """

    def __init__(self, model: Any, batch_size: int) -> None:
        self.batches = Batches(batch_size)
        self.chunk = batch_size
        self.provenance: dict[str, Any] = {"engine": "hf", "batch_size": batch_size}
        self._model = model
        self._start_id: int = model.config.decoder_start_token_id
        self._head: Callable[[Any], Any] | None = None  # hidden_NH -> logits_NV float32

    def generate(
        self, prompts: Sequence[Sequence[int]], adapter: Path | None, max_new_tokens: int, end_id: int
    ) -> list[Generated]:
        """See Engine. Raises RunError where one prompt alone is too much."""
        import torch

        assert adapter is None  # nothing here trains an encoder-decoder
        with torch.inference_mode():
            return self.batches.run(
                [len(prompt) for prompt in prompts],
                lambda batch: self._decode([prompts[i] for i in batch], max_new_tokens, end_id),
            )

    def label_logprobs(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[Sequence[int]]], adapter: Path | None
    ) -> list[list[float]]:
        """See Engine. Labels are teacher-forced through the decoder, the encoder reads a prompt once for all of its."""
        import torch

        from pipeline.models import check_seq2seq_head, float32_head

        assert adapter is None
        if self._head is None:
            check_seq2seq_head(self._model)
            self._head = float32_head(self._model)
        with torch.inference_mode():
            return self.batches.run(
                [len(prompt) for prompt in prompts],
                lambda batch: self._logprobs([prompts[i] for i in batch], [labels[i] for i in batch]),
            )

    def close(self) -> None:
        """Free the model's memory."""
        import torch

        self._model = self._head = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _encode(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        """What the encoder makes of the prompts, hidden_BSH, and which columns are theirs, mask_BS."""
        import torch

        S, device = max(map(len, prompts)), self._model.device
        ids_BS = torch.tensor([[*ids, *[0] * (S - len(ids))] for ids in prompts], device=device)
        mask_BS = torch.tensor([[1] * len(ids) + [0] * (S - len(ids)) for ids in prompts], device=device)
        encoder = self._model.get_encoder()
        return encoder(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state, mask_BS

    def _decode(self, prompts: list[Sequence[int]], max_new_tokens: int, end_id: int) -> list[Generated]:
        """Greedy decoding of one batch."""
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        from pipeline.models import kv_cache_argument

        device = self._model.device
        hidden_BSH, mask_BS = self._encode(prompts)
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids_B1 = torch.full((len(prompts), 1), self._start_id, device=device)
        rows = Rows(len(prompts), end_id)
        for _ in range(max_new_tokens):
            logits_BV = self._model(
                encoder_outputs=(hidden_BSH,),
                attention_mask=mask_BS,
                decoder_input_ids=ids_B1,
                use_cache=True,
                **kv_cache_argument(self._model, cache),
            ).logits[:, -1]
            next_B = logits_BV.argmax(-1)
            if not rows.add(next_B.tolist()):
                break
            ids_B1 = next_B[:, None]
            if (alive := rows.leave()) is not None:
                keep_B = torch.tensor(alive, device=device)
                cache.batch_select_indices(keep_B)
                ids_B1, hidden_BSH, mask_BS = ids_B1[keep_B], hidden_BSH[keep_B], mask_BS[keep_B]
        return rows.answers()

    def _logprobs(self, prompts: list[Sequence[int]], labels: list[Sequence[Sequence[int]]]) -> list[list[float]]:
        """The summed log-probability of each prompt's labels; row t of the decoder's input predicts label token t."""
        import torch

        assert self._head is not None
        device, flat = self._model.device, [label for of in labels for label in of]
        hidden_BSH, mask_BS = self._encode(prompts)
        prompt_R = torch.tensor([i for i, of in enumerate(labels) for _ in of], device=device)
        lengths = [len(label) for label in flat]
        T = max(lengths)
        labels_RT = torch.tensor([[*label, *[0] * (T - len(label))] for label in flat], device=device)
        is_label_RT = torch.arange(T, device=device) < torch.tensor(lengths, device=device)[:, None]
        hidden_RTH = self._model.get_decoder()(
            input_ids=torch.cat([torch.full_like(labels_RT[:, :1], self._start_id), labels_RT[:, :-1]], 1),
            encoder_hidden_states=hidden_BSH[prompt_R],
            encoder_attention_mask=mask_BS[prompt_R],
            use_cache=False,
        ).last_hidden_state
        sums = iter(summed_logprobs(self._head(hidden_RTH[is_label_RT]), labels_RT[is_label_RT], lengths))
        return [[next(sums) for _ in of] for of in labels]
