"""The embedded teacher of the `pocket-uld` recipe: a small T5 that reads stories, answers, and sums talks up.

Called by `python -m pipeline.pocket --model t5`. Its shape is T5 1.1's and FLAN-T5's: gated GELU, relative positions,
a head that is not tied to the embeddings. It learns the three tasks by the very prompts of `pipeline.tasks`, and beside
them to write whole pages on a story (`pipeline.pocket.pages`): a few words of answer alone teach it reading too slowly.

Shape legend: B examples, L tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.pocket.examples import draw_example, measure_tasks
from pipeline.pocket.pages import draw_page
from pipeline.pocket.pretrain import Batch, Settings
from pipeline.pocket.stories import KINDS, pretraining_stories
from pipeline.pocket.subwords import piece_tokenizer

if TYPE_CHECKING:
    from transformers import T5ForConditionalGeneration

SETTINGS = Settings(
    lr=1.5e-3, decay_share=0.4, weight_decay=0.05, batch_tokens=1200, hidden=96, layers=3, intermediate=192, heads=3
)

EXAMPLE_TOKENS = 50
"""What an example takes on average, padding included."""

MIX = ("qa", "page", "yesno", "page", "summary", "page")
"""What a batch is made of, in turn."""


class T5Course:
    """A `pipeline.pocket.pretrain.Course`. No text is mostly chance here: what the encoder reads weighs nothing."""

    batch_names = ("answers",)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = piece_tokenizer()
        self.rng = random.Random(settings.seed)
        self.stories = {kind: pretraining_stories(kind, self.rng) for kind in KINDS}

    def build(self) -> T5ForConditionalGeneration:
        """A fresh T5, with a decoder one layer lower than its encoder."""
        from transformers import T5Config, T5ForConditionalGeneration

        settings = self.settings
        config = T5Config(  # type: ignore[call-arg]
            vocab_size=len(self.tokenizer),
            d_model=settings.hidden,
            d_kv=settings.hidden // settings.heads,
            d_ff=settings.intermediate,
            num_layers=settings.layers,
            num_decoder_layers=settings.layers - 1,
            num_heads=settings.heads,
            relative_attention_max_distance=64,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            decoder_start_token_id=self.tokenizer.pad_token_id,
        )
        model = T5ForConditionalGeneration(config)
        # transformers 5 ties every fresh T5, and unties one only if its file has two different matrices, as here
        model.lm_head.weight = nn.Parameter(model.shared.weight.detach() * settings.hidden**-0.5)
        model.all_tied_weights_keys.pop("lm_head.weight")
        for name, matrix in model.named_parameters():
            if name.endswith((".q.weight", ".k.weight")):  # T5 makes queries tiny, for an optimizer that scales steps
                nn.init.normal_(matrix, std=settings.hidden**-0.5 * (settings.hidden // settings.heads) ** -0.25)
        return model

    def draw(self, progress: float) -> list[Batch]:
        """One batch of the mixture."""
        count = max(1, round(self.settings.batch_tokens / EXAMPLE_TOKENS))
        return [self.collate([self.draw_pair(MIX[index % len(MIX)]) for index in range(count)])]

    def draw_pair(self, kind: str) -> tuple[str, str]:
        """What is read and what is to be written."""
        if kind == "page":
            page = draw_page(self.rng, next(self.stories["qa"]))
            return page.story, "".join(page.remarks).strip()
        example = draw_example(kind, next(self.stories[kind]), self.rng)
        return example.prompt, example.answer

    def collate(self, pairs: Sequence[tuple[str, str]]) -> Batch:
        """Texts to read and to write, padded on the right."""
        read, write = (
            self.tokenizer(list(texts), padding=True, return_tensors="pt") for texts in zip(*pairs, strict=True)
        )
        target_BL: Tensor = write["input_ids"]
        is_answer_BL = write["attention_mask"].bool()
        inputs = {
            "input_ids": read["input_ids"],
            "attention_mask": read["attention_mask"],
            "decoder_input_ids": nn.functional.pad(target_BL[:, :-1], (1, 0), value=self.tokenizer.pad_token_id),
        }
        tokens = int(read["attention_mask"].sum() + is_answer_BL.sum())
        return Batch(inputs, target_BL, is_answer_BL, is_answer_BL.to(torch.float32), tokens)

    def measure(self, model: Any, n: int) -> list[dict[str, Any]]:
        """Share of right answers, a task."""
        return measure_tasks(model, self.tokenizer, n)
