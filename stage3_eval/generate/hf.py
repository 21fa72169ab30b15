"""The engine on transformers for decoders. Called by `subject`; see `stage3_eval.generate` for the protocol.

Shapes: B rows of a batch, P tokens of the context that all prompts share, L columns of own padded tokens, C columns in
all, V vocabulary; N answer rows of a batch, H hidden.
"""

import inspect
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RunError
from pipeline.model_folder import check_adapter
from stage3_eval.generate import ADAPTER_FILE, Generated
from stage3_eval.generate.batching import Batches, summed_logprobs

if TYPE_CHECKING:
    from torch import Tensor

    from stage3_eval.generate.decoding import Decoding

_SHARED_TOKENS = 16  # a shorter common context is not worth a forward pass of its own


class HFEngine:
    """Batched greedy decoding on a transformers decoder.

    Prompts are sorted by length and padded on the left; a context that all of them share (the worked examples) is
    computed once; the place of a row that has ended is taken by a prompt that waits. Out of memory halves the batch
    and goes on.
    """

    def __init__(self, model: Any, batch_size: int) -> None:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        self.batches = Batches(batch_size)
        self.chunk = 8 * batch_size  # so that seven in eight prompts find a batch in work to join
        self.provenance: dict[str, Any] = {"engine": "hf", "batch_size": batch_size}
        self._base = model
        self._peft: Any = None
        self._loaded: tuple[Path, str] | None = None  # the adapter in memory: its folder, its name in peft
        self._count = 0
        self._head: Callable[[Any], Any] | None = None  # hidden_NH -> logits_NV float32
        self._joinable = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_logits_only = {"logits_to_keep": 1} if keeps else {}

    def generate(
        self, prompts: Sequence[Sequence[int]], adapter: Path | None, max_new_tokens: int, end_id: int
    ) -> list[Generated]:
        """See Engine. Raises RunError for an adapter that cannot be loaded, or where one prompt alone is too much."""
        import torch

        with torch.inference_mode(), self._adapted(adapter) as model:
            shared_ids = self._shared(prompts)
            return self.batches.stream(
                [len(prompt) for prompt in prompts],
                lambda left: self._decode(model, shared_ids, prompts, left, max_new_tokens, end_id),
            )

    def label_logprobs(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[Sequence[int]]], adapter: Path | None
    ) -> list[list[float]]:
        """See Engine. A row is a prompt with one of its labels; the head runs in float32 on the labels' rows alone."""
        import torch

        self._use_head()
        rows = [(prompt, label) for prompt, of in zip(prompts, labels, strict=True) for label in of]
        with torch.inference_mode(), self._adapted(adapter) as model:
            sums = self.batches.run(
                [len(prompt) + len(label) for prompt, label in rows],
                lambda batch: self._logprobs(model, [rows[i] for i in batch]),
            )
        ends = list(accumulate(len(of) for of in labels))
        return [sums[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def answer_logits(self, prompt: Sequence[int], answer: Sequence[int], adapter: Path | None) -> "Tensor":
        """[N, V] float32 raw logits after a prompt: row t predicts answer token t, having read those before it."""
        import torch

        from pipeline.models import body_and_head

        head = self._use_head()
        with torch.inference_mode(), self._adapted(adapter) as model:
            ids_1T = torch.tensor([[*prompt, *answer]], device=self._base.device)
            hidden_1TH = body_and_head(model)[0](
                input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False
            ).last_hidden_state
            logits_NV: Tensor = head(hidden_1TH[0, len(prompt) - 1 : -1]).float().cpu()
            return logits_NV

    def close(self) -> None:
        """Free the model's memory."""
        import torch

        self._base = self._peft = self._loaded = self._head = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _use_head(self) -> "Callable[[Any], Any]":
        """The output head in float32, compared once with the model's own logits."""
        from pipeline.models import check_head, float32_head

        if self._head is None:
            check_head(self._base)
            self._head = float32_head(self._base)
        return self._head

    def _adapted(self, adapter: Path | None) -> AbstractContextManager[Any]:
        """The model with this adapter, or without any, as a context."""
        if adapter is None:
            return _without_adapter(self._peft) if self._peft is not None else nullcontext(self._base)
        if self._loaded is None or self._loaded[0] != adapter:
            self._swap(adapter)
        return nullcontext(self._peft)

    def _swap(self, adapter: Path) -> None:
        """Load an adapter in the place of the one in memory."""
        from peft import PeftModel

        if not (adapter / ADAPTER_FILE).is_file():
            raise RunError(f"checkpoint {adapter}: expected a LoRA adapter, found no {ADAPTER_FILE}; train it again")
        check_adapter(adapter)
        self._count += 1
        name = f"adapter{self._count}"
        try:
            with warnings.catch_warnings():  # peft asks for what transformers has renamed
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(self._base, str(adapter), adapter_name=name).eval()
                else:
                    self._peft.load_adapter(str(adapter), adapter_name=name)
        except Exception as error:  # whatever peft makes of a file that anyone may have written
            raise RunError(f"checkpoint {adapter}: its adapter does not fit the student's model: {error}") from None
        self._peft.set_adapter(name)
        self._peft.requires_grad_(False)
        if self._loaded is not None:
            self._peft.delete_adapter(self._loaded[1])
        self._loaded = (adapter, name)

    def _shared(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The context that all prompts begin with, where it is worth computing once; each keeps a token of its own.

        Models with a sliding window are left out: they measure it in columns, padding between context and own tokens
        included. So are rows that would join others in work there, for the same reason.
        """
        if len(prompts) < 2 or not self._joinable:
            return []
        first, last = min(map(list, prompts)), max(map(list, prompts))  # what these two share, all share
        most = min(len(prompt) for prompt in prompts) - 1
        count = next((i for i in range(most) if first[i] != last[i]), most)
        return first[:count] if count >= _SHARED_TOKENS else []

    def _decode(
        self,
        model: Any,
        shared_ids: list[int],
        prompts: Sequence[Sequence[int]],
        left: list[int],
        max_new_tokens: int,
        end_id: int,
    ) -> Iterator[tuple[int, Generated]]:
        """Greedy answers to the prompts that are left, each as soon as it is there.

        At most `batches.size` rows are in work. Once an eighth of them have ended, prompts that wait take their places;
        when none waits, rows leave once half of them have ended: copying the KV cache must pay.
        """
        context, size = self._context(model, shared_ids), self.batches.size
        waiting, rows = deque(left), None
        while waiting or rows is not None:
            if rows is None or (waiting and self._joinable and 8 * rows.going_on <= 7 * size):
                if rows is not None:
                    rows.drop_ended()
                free = size - (len(rows.prompts) if rows is not None else 0)
                joining = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                new = self._read(model, context, joining, [prompts[i][len(shared_ids) :] for i in joining])
                rows = new if rows is None else rows.joined(new)
            else:
                if 2 * rows.going_on <= len(rows.prompts):
                    rows.drop_ended()
                rows.step(model, **self._last_logits_only)
            yield from rows.end(end_id, max_new_tokens)
            if not rows.going_on:
                rows = None

    def _context(self, model: Any, shared_ids: list[int]) -> "list[tuple[Tensor, Tensor]]":
        """Keys and values of the shared context, a pair a layer, [1, heads, P, head size]; empty where none is."""
        import torch
        from transformers import DynamicCache

        from pipeline.models import kv_cache_argument

        if not shared_ids:
            return []
        cache: Any = DynamicCache(config=self._base.config)
        ids = torch.tensor([shared_ids], device=self._base.device)
        model(input_ids=ids, use_cache=True, **kv_cache_argument(model, cache), **self._last_logits_only)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _read(
        self, model: Any, context: "list[tuple[Tensor, Tensor]]", prompts: list[int], own: list[Sequence[int]]
    ) -> "Decoding":
        """Rows that have read their own tokens after the context, each with the first token of its answer.

        prompts: their numbers. Columns are [shared context P | padding | own tokens], L after the context.
        """
        import torch
        from transformers import DynamicCache

        from pipeline.models import kv_cache_argument
        from stage3_eval.generate.decoding import Decoding

        device, B, L = self._base.device, len(own), max(map(len, own))
        P = context[0][0].shape[2] if context else 0
        if context:
            cache: Any = DynamicCache([(k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)) for k, v in context])
        else:
            cache = DynamicCache(config=self._base.config)
        ids_BL = torch.tensor([[0] * (L - len(ids)) + list(ids) for ids in own], device=device)
        mask_BC = torch.ones(B, P + L, dtype=torch.long, device=device)
        for row, ids in enumerate(own):
            mask_BC[row, P : P + L - len(ids)] = 0
        positions_BL = (mask_BC.cumsum(1) - 1).clamp(min=0)[:, P:]
        logits_BV = model(
            input_ids=ids_BL,
            attention_mask=mask_BC,
            position_ids=positions_BL,
            use_cache=True,
            **kv_cache_argument(model, cache),
            **self._last_logits_only,
        ).logits[:, -1]
        return Decoding(prompts, cache, mask_BC, positions_BL[:, -1] + 1, logits_BV.argmax(-1))

    def _logprobs(self, model: Any, rows: list[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """The summed log-probability of each row's label after its prompt.

        Rows are padded on the right, where a decoder's earlier positions do not look.
        """
        import torch

        from pipeline.models import body_and_head

        assert self._head is not None
        device = self._base.device
        longest = max(len(prompt) + len(label) for prompt, label in rows)
        ids_BT = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
        mask_BT = torch.zeros_like(ids_BT)
        answers_BT = torch.zeros_like(ids_BT, dtype=torch.bool)  # where a label token is predicted
        for row, (prompt, label) in enumerate(rows):
            ids_BT[row, : len(prompt) + len(label)] = torch.tensor([*prompt, *label], device=device)
            mask_BT[row, : len(prompt) + len(label)] = 1
            answers_BT[row, len(prompt) - 1 : len(prompt) + len(label) - 1] = True
        body = body_and_head(model)[0]
        hidden_NH = body(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state[answers_BT]
        targets_N = ids_BT.roll(-1, 1)[answers_BT]
        return summed_logprobs(self._head(hidden_NH), targets_N, [len(label) for _, label in rows])


@contextmanager
def _without_adapter(model: Any) -> Iterator[Any]:
    """A peft model as its base alone."""
    with model.disable_adapter():
        yield model
