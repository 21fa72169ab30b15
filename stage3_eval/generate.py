"""The engines that write answers, behind one small protocol; here the one on transformers. Called by `evaluate`.

Greedy always: a prediction is a function of the prompt and the weights. One base model serves every checkpoint of a
student: LoRA adapters are swapped, the base is loaded once.

Shapes: B prompts of a batch (those not finished yet), P tokens of the context they share, L columns of
their own padded tokens, C = P + L + limit columns in all, V vocabulary.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pipeline.errors import RunError
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from pipeline.models import ModelSource

ADAPTER_FILE = "adapter_model.safetensors"
_SHARED_TOKENS = 16  # a shorter common context is not worth a forward pass of its own


class Generated(NamedTuple):
    """One answer: its token ids, and whether it ended by the end token (then its last id) or was cut at the limit."""

    ids: list[int]
    finished: bool


class Engine(Protocol):
    """What answers prompts.

    chunk: how many prompts are worth handing over at once. provenance: what a prediction file says wrote it.
    """

    chunk: int
    provenance: dict[str, Any]

    def generate(
        self, prompts: Sequence[Sequence[int]], adapter: Path | None, max_new_tokens: int, end_id: int
    ) -> list[Generated]:
        """Greedy answers in the order of the prompts, by the base model (adapter None) or with a LoRA adapter."""
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...


def load_engine(recipe: Recipe, student: str, source: "ModelSource", longest: int) -> Engine:
    """The engine the recipe asks for. longest: tokens of the longest prompt with its answer, at most.

    Raises ModelError where the model cannot be loaded, RunError where the engine is not installed.
    """
    settings = recipe.students[student]
    if recipe.eval.engine == "vllm":
        from stage3_eval.generate_vllm import VLLMEngine

        return VLLMEngine(source, settings.dtype, settings.lora.r, longest, recipe.runtime.device)
    from pipeline.models import device_of, load_causal_lm, window_of

    model = load_causal_lm(source, settings.dtype, "none", device_of(recipe))
    check_window(window_of(model), longest)
    return HFEngine(model, recipe.eval.batch_size)


def check_window(window: int | None, longest: int) -> None:
    """Raise RunError where the longest prompt and answer do not fit: a cut prompt would be scored as a wrong answer."""
    if window is not None and longest > window:
        raise RunError(
            f"the longest prompt and eval.max_new_tokens are {longest} tokens together, but the model reads {window} "
            "at most; lower eval.max_new_tokens, or teacher.shots for the few_shot baseline"
        )


class HFEngine:
    """Batched greedy decoding on a transformers model.

    Prompts are sorted by length and padded on the left; a context that all of them share (the worked examples) is
    computed once; a row leaves the batch soon after it has finished. Out of memory halves the batch and goes on.
    """

    def __init__(self, model: Any, batch_size: int) -> None:
        self.batch_size = batch_size
        self.chunk = batch_size
        self.provenance: dict[str, Any] = {"engine": "hf", "batch_size": batch_size}
        self._base = model
        self._peft: Any = None
        self._loaded: tuple[Path, str] | None = None  # the adapter in memory: its folder, its name in peft
        self._count = 0
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_logits_only = {"logits_to_keep": 1} if keeps else {}

    def generate(
        self, prompts: Sequence[Sequence[int]], adapter: Path | None, max_new_tokens: int, end_id: int
    ) -> list[Generated]:
        """See Engine. Raises RunError for an adapter that cannot be loaded, or where one prompt alone is too much."""
        import torch

        answers: dict[int, Generated] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        with torch.inference_mode(), self._adapted(adapter) as model:
            shared_ids = self._shared(prompts)
            while len(answers) < len(order):
                batch = order[len(answers) :][: self.batch_size]
                try:
                    done = self._decode(model, shared_ids, [prompts[i] for i in batch], max_new_tokens, end_id)
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if not _out_of_memory(error):
                        raise
                    done = None
                if done is None:  # outside the handler: the exception holds on to the batch's tensors
                    self._halve(len(batch))
                else:
                    answers.update(zip(batch, done, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Free the model's memory."""
        import torch

        self._base = self._peft = self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

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
        self._count += 1
        name = f"adapter{self._count}"
        try:
            with warnings.catch_warnings():  # peft asks for what transformers has renamed
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(self._base, str(adapter), adapter_name=name).eval()
                else:
                    self._peft.load_adapter(str(adapter), adapter_name=name)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise RunError(f"checkpoint {adapter}: its adapter does not fit the student's model: {error}") from None
        self._peft.set_adapter(name)
        self._peft.requires_grad_(False)
        if self._loaded is not None:
            self._peft.delete_adapter(self._loaded[1])
        self._loaded = (adapter, name)

    def _shared(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The context that all prompts begin with, where it is worth computing once; each keeps a token of its own.

        Models with a sliding window are left out: they measure it in columns, padding between context and own tokens
        included.
        """
        config = self._base.config
        slides = any("sliding" in kind for kind in getattr(config, "layer_types", None) or [])
        if len(prompts) < 2 or slides:
            return []
        first, last = min(map(list, prompts)), max(map(list, prompts))  # what these two share, all share
        most = min(len(prompt) for prompt in prompts) - 1
        count = next((i for i in range(most) if first[i] != last[i]), most)
        return first[:count] if count >= _SHARED_TOKENS else []

    def _decode(
        self, model: Any, shared_ids: list[int], prompts: list[Sequence[int]], max_new_tokens: int, end_id: int
    ) -> list[Generated]:
        """Greedy decoding of one batch: columns are [shared context P | padding | own tokens L | answer]."""
        import torch

        device = self._base.device
        P, own = len(shared_ids), [list(prompt[len(shared_ids) :]) for prompt in prompts]
        L = max(map(len, own))
        cache = self._context(model, shared_ids, len(prompts))
        ids_BL = torch.tensor([[end_id] * (L - len(ids)) + ids for ids in own], device=device)
        mask_BC = torch.ones(len(prompts), P + L + max_new_tokens, dtype=torch.long, device=device)
        for row, ids in enumerate(own):
            mask_BC[row, P : P + L - len(ids)] = 0
        positions_BL = (mask_BC[:, : P + L].cumsum(1) - 1).clamp(min=0)[:, P:]

        answers: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # row of the batch -> prompt; -1 once finished
        for step in range(max_new_tokens):
            logits_BV = model(
                input_ids=ids_BL,
                attention_mask=mask_BC[:, : P + L + step],
                position_ids=positions_BL,
                past_key_values=cache,
                use_cache=True,
                **self._last_logits_only,
            ).logits[:, -1]
            next_B = logits_BV.argmax(-1)
            for row, token in enumerate(next_B.tolist()):
                if rows[row] >= 0:
                    answers[rows[row]].append(token)
                    rows[row] = -1 if token == end_id else rows[row]
            alive = [row for row, prompt in enumerate(rows) if prompt >= 0]
            if not alive:
                break
            ids_BL, positions_BL = next_B[:, None], positions_BL[:, -1:] + 1
            if len(alive) <= len(rows) // 2:  # copying the cache pays once it halves
                keep_B = torch.tensor(alive, device=device)
                cache.batch_select_indices(keep_B)
                ids_BL, positions_BL, mask_BC = ids_BL[keep_B], positions_BL[keep_B], mask_BC[keep_B]
                rows = [rows[row] for row in alive]
        return [Generated(ids, ids[-1] == end_id) for ids in answers]

    def _context(self, model: Any, shared_ids: list[int], batch: int) -> Any:
        """A KV cache that holds the shared context for each row of the batch, or nothing."""
        import torch
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self._base.config)
        if not shared_ids:
            return cache
        ids = torch.tensor([shared_ids], device=self._base.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, **self._last_logits_only)
        return DynamicCache(
            [(layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1)) for layer in cache.layers]
        )

    def _halve(self, tried: int) -> None:
        """Go on with half the batch that did not fit."""
        import torch

        if tried == 1:
            raise RunError(
                "out of memory with a single prompt; lower eval.max_new_tokens or teacher.shots, or use a larger device"
            )
        self.batch_size = tried // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"out of memory with {tried} prompts in a batch; going on with {self.batch_size}", flush=True)


@contextmanager
def _without_adapter(model: Any) -> Iterator[Any]:
    """A peft model as its base alone."""
    with model.disable_adapter():
        yield model


def _out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU a type of its own, on a CPU a RuntimeError that says so."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
