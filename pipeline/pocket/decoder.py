"""The embedded decoder of the `pocket` recipe: a Qwen3 of 0.8 M parameters that reads and solves word problems.

Called by `python -m pipeline.pocket --model decoder`.

A step takes two batches of about equally many tokens, one answered with worked steps and one without. Documents are
short at first (arithmetic is learned there as well, and cheaper) and have up to nine problems later. Equal tokens at
unequal length make about three documents in five bare, which are the odds of a first answer without context.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from pipeline.pocket.documents import MOST_PROBLEMS, Document, batch_of, drills
from pipeline.pocket.measure import measure
from pipeline.pocket.pretrain import Batch, Settings, collate
from pipeline.pocket.problems import pretraining_problems
from pipeline.pocket.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

SETTINGS = Settings()

WINDOW = 768
"""Tokens the model is trained to read: nine worked problems fit; beyond the trained length everything collapses."""

SENTENCE_SHARE = 0.07
"""Share of the documents without steps that answer in a sentence instead of `#### n`."""


def longest_document(progress: float, settings: Settings) -> int:
    """Most problems a document may have at this point of the run."""
    if progress < settings.short_share / 2:
        return 2
    return 4 if progress < settings.short_share else MOST_PROBLEMS


class DecoderCourse:
    """A `pipeline.pocket.pretrain.Course`."""

    batch_names = ("worked", "bare")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = build_tokenizer()
        self.rng = random.Random(settings.seed)
        self.problems = pretraining_problems(settings.seed)

    def build(self) -> Qwen3ForCausalLM:
        """A fresh Qwen3 decoder with tied embeddings, two query heads a key/value head."""
        from transformers import Qwen3Config, Qwen3ForCausalLM

        settings = self.settings
        config = Qwen3Config(
            vocab_size=len(self.tokenizer),
            hidden_size=settings.hidden,
            num_hidden_layers=settings.layers,
            intermediate_size=settings.intermediate,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads // 2,
            head_dim=settings.hidden // settings.heads,
            max_position_embeddings=WINDOW,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return Qwen3ForCausalLM(config)

    def draw(self, progress: float) -> list[Batch]:
        """A batch of worked documents and one of others, each of about `batch_tokens` tokens."""
        longest = longest_document(progress, self.settings)
        return [
            collate(documents, self.tokenizer.pad_token_id, self.settings.question_weight)
            for documents in (self.draw_worked(longest), self.draw_others(longest))
        ]

    def draw_worked(self, longest: int) -> list[Document]:
        """Worked documents, all with the same number of problems."""
        size = 1 + int(self.rng.random() * longest)
        count = max(1, round(self.settings.batch_tokens / (70 * size)))
        return batch_of(self.tokenizer, self.problems, ["worked"] * count, size)

    def draw_others(self, longest: int) -> list[Document]:
        """Drills, or documents without steps; the latter are short for the most part."""
        if self.rng.random() < (0.8 if longest < MOST_PROBLEMS else 0.4):
            return drills(self.tokenizer, self.problems, max(1, round(self.settings.batch_tokens / 75)), 3)
        size = 1 + int(self.rng.random() ** 2 * longest)
        count = max(1, round(self.settings.batch_tokens / (40 * size)))
        styles = ["sentence" if self.rng.random() < SENTENCE_SHARE else "bare" for _ in range(count)]
        return batch_of(self.tokenizer, self.problems, styles, size)

    def measure(self, model: Any, n: int) -> list[dict[str, Any]]:
        """Strict accuracy on validation problems, without and with eight worked examples."""
        return [measure(model, self.tokenizer, n, shots) for shots in (0, 8)]
