"""The embedded student of the `pocket-uld` recipe: a small GPT-2 that has read pages about stories, and no prompt.

Called by `python -m pipeline.pocket --model gpt2`. See `pipeline.pocket.pages` for what it reads.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from pipeline.pocket.documents import Document
from pipeline.pocket.examples import measure_tasks
from pipeline.pocket.pages import draw_page
from pipeline.pocket.pretrain import Batch, Settings, collate
from pipeline.pocket.stories import pretraining_stories
from pipeline.pocket.subwords import byte_tokenizer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

SETTINGS = Settings(decay_share=0.4, batch_tokens=1200, hidden=96, layers=4, intermediate=384, heads=3)

WINDOW = 256
"""Tokens it is built to read; a prompt with its answer takes less than 120, and as much again with a worked example."""

PAGE_TOKENS = 110

MIX = ("qa", "qa", "qa", "summary")
"""Of which kind the texts of a batch's pages are, in turn: three stories to a talk."""


class GPT2Course:
    """A `pipeline.pocket.pretrain.Course`."""

    batch_names = ("remarks",)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = byte_tokenizer()
        self.rng = random.Random(settings.seed)
        self.stories = {kind: pretraining_stories(kind, self.rng) for kind in set(MIX)}

    def build(self) -> GPT2LMHeadModel:
        """A fresh GPT-2 without dropout."""
        from transformers import GPT2Config, GPT2LMHeadModel

        settings, eos = self.settings, self.tokenizer.eos_token_id
        config = GPT2Config(
            vocab_size=len(self.tokenizer),
            n_positions=WINDOW,
            n_embd=settings.hidden,
            n_layer=settings.layers,
            n_head=settings.heads,
            n_inner=settings.intermediate,
            initializer_range=0.08,  # GPT-2's 0.02 suits its 768 hidden units: about hidden ** -0.5
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=eos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        return GPT2LMHeadModel(config)

    def draw(self, progress: float) -> list[Batch]:
        """One batch of pages."""
        count = max(1, round(self.settings.batch_tokens / PAGE_TOKENS))
        documents = [self.draw_document(MIX[index % len(MIX)]) for index in range(count)]
        return [collate(documents, self.tokenizer.pad_token_id, self.settings.question_weight)]

    def draw_document(self, kind: str) -> Document:
        """A page as token ids; its remarks are what counts as answer."""
        page = draw_page(self.rng, next(self.stories[kind]))
        story: list[int] = self.tokenizer(page.story)["input_ids"]
        remarks: list[int] = [*self.tokenizer("".join(page.remarks))["input_ids"], self.tokenizer.eos_token_id]
        return Document([*story, *remarks], [False] * len(story) + [True] * len(remarks))

    def measure(self, model: Any, n: int) -> list[dict[str, Any]]:
        """Share of right answers, a task, of the untouched model."""
        return measure_tasks(model, self.tokenizer, n)
