"""A model that is scored: a student with its checkpoints, or a reference as it is. Called by `evaluate` and `answers`.

What kind it is, decoder or encoder-decoder, is read from its config. Weights are loaded only when an engine is asked
for.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError
from pipeline.recipe import Recipe
from pipeline.sections import Reference
from stage3_eval.generate import Engine

if TYPE_CHECKING:
    from pipeline.models import ModelSource
    from pipeline.prompts import PromptBuilder


class Subject:
    """One model of the recipe, by its name under `students` or `eval.references`."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        self.name = name
        self.settings = recipe.students[name] if name in recipe.students else recipe.eval.references[name]
        self._recipe = recipe

    @property
    def engine(self) -> str:
        """What generates: eval.engine; references always run on transformers, since vLLM has no encoder-decoders."""
        return "hf" if isinstance(self.settings, Reference) else self._recipe.eval.engine

    @property
    def kind(self) -> str:
        return "reference" if isinstance(self.settings, Reference) else "student"

    @property
    def arithmetic(self) -> dict[str, str]:
        """In what numbers it is run."""
        of_reference = {"quantization": self.settings.quantization} if isinstance(self.settings, Reference) else {}
        return {"dtype": self.settings.dtype, **of_reference}

    @cached_property
    def source(self) -> "ModelSource":
        """Where it lies; see `look_for`."""
        from pipeline.models import locate

        try:
            return locate(self.settings.model, self.settings.revision)
        except ModelError as error:
            section = "eval.references" if isinstance(self.settings, Reference) else "students"
            raise ModelError(f"{section}.{self.name}: {error}") from None

    def look_for(self) -> None:
        """Raise ModelError, naming the recipe's key, where there is no such model. Reads no weights."""
        _ = self.source

    @cached_property
    def weights(self) -> str:
        """What its answers are known by: a Hub name and commit, or a digest of a folder."""
        return self.source.identity()

    @cached_property
    def prompts(self) -> "PromptBuilder":
        from pipeline.models import load_tokenizer
        from pipeline.prompts import PromptBuilder

        thinking = self._recipe.teacher.thinking
        tokenizer = load_tokenizer(self.source)
        return PromptBuilder(tokenizer, thinking, require_switch=False, seq2seq=self.seq2seq)

    @property
    def seq2seq(self) -> bool:
        return bool(self._config.is_encoder_decoder)

    @property
    def window(self) -> int | None:
        """The most tokens it can read, None where its config names no limit (relative positions)."""
        limit = getattr(self._config, "max_position_embeddings", None)
        return int(limit) if limit else None

    @cached_property
    def _config(self) -> Any:
        from pipeline.models import load_config

        return load_config(self.source)

    def tokens_needed(self, prompt_tokens: int, answer_tokens: int) -> int:
        """Of its window: a decoder reads both as one text, an encoder-decoder reads each with a half of its own."""
        return max(prompt_tokens, answer_tokens) if self.seq2seq else prompt_tokens + answer_tokens

    def identity(self) -> dict[str, Any]:
        """The part of a prediction file's identity that says which model and tokenizer."""
        from pipeline.models import tokenizer_digest

        tokenizer = {"sha256": tokenizer_digest(self.prompts.tokenizer), **self.prompts.describe()}
        return {self.kind: {"weights": self.weights, **self.arithmetic}, "tokenizer": tokenizer}

    def load(self, longest: int, adapters: Sequence[Path]) -> Engine:
        """Its engine. longest: tokens of the longest prompt with its answer. adapters: those it will be asked for.

        Raises ModelError where the model cannot be loaded, RunError where the engine is not installed.
        """
        settings, batch_size = self.settings, self._recipe.eval.batch_size
        if not isinstance(settings, Reference) and self.engine == "vllm":
            from stage3_eval.generate.vllm import VLLMEngine

            device = self._recipe.runtime.device
            return VLLMEngine(self.source, settings.dtype, settings.lora.r, longest, adapters, device)
        from pipeline.models import device_of, load_causal_lm, load_seq2seq_lm

        quantization = settings.quantization if isinstance(settings, Reference) else "none"
        load = load_seq2seq_lm if self.seq2seq else load_causal_lm
        model = load(self.source, settings.dtype, quantization, device_of(self._recipe))
        if self.seq2seq:
            from stage3_eval.generate.seq2seq import Seq2SeqEngine

            return Seq2SeqEngine(model, batch_size)
        from stage3_eval.generate.hf import HFEngine

        return HFEngine(model, batch_size)
