"""Examples of the three story tasks, drawn for pre-training and measured after it.

Called by `pipeline.pocket.t5` and `pipeline.pocket.subwords` (drawing), and by the courses of both story models
(measuring). Prompts and answers are the tasks' own, from `pipeline.tasks`.
"""

from __future__ import annotations

import itertools
import random
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline.pocket.stories import KINDS, Story, row_of, split_rows, split_stories, summaries
from pipeline.tasks import Example, NoOptions, Task, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 60
"""The longest summary takes the GPT-2 tokenizer about 50."""


@cache
def task_of(kind: str) -> Task:
    """The task of one of KINDS; `get_task` looks through a folder each time."""
    return get_task(f"pocket_{kind}")


def draw_example(kind: str, story: Story, rng: random.Random) -> Example:
    """An example about the story, of the task of one of KINDS."""
    return task_of(kind).to_example(row_of(kind, story, rng), 0, NoOptions())


def validation_examples(kind: str, n: int) -> list[Example]:
    """The first `n` validation examples of one of KINDS."""
    rows = itertools.islice(split_rows(kind, "validation"), n)
    return [task_of(kind).to_example(row, index, NoOptions()) for index, row in enumerate(rows)]


def written(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int = 50) -> list[str]:
    """Greedy answers of a decoder or an encoder-decoder to the prompts, in order."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(prompts[start : start + batch_size], padding=True, padding_side="left", return_tensors="pt")
        ids_BL = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        if not model.config.is_encoder_decoder:
            ids_BL = ids_BL[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in tokenizer.batch_decode(ids_BL, skip_special_tokens=True)]
    return texts


def measure_tasks(model: Any, tokenizer: PreTrainedTokenizerBase, n: int) -> list[dict[str, Any]]:
    """The share of right answers to the first `n` validation examples of each kind.

    Right is one of the acceptable wordings of an answer, the label, or any of the summaries that are right.
    """
    from pipeline.pocket.measure import wilson

    found: list[dict[str, Any]] = []
    for kind in KINDS:
        examples = validation_examples(kind, n)
        texts = written(model, tokenizer, [example.prompt for example in examples])
        golds = [example.golds for example in examples]
        if kind == "summary":
            golds = [summaries(story) for story in split_stories(kind, "validation")[:n]]
        right = sum(text in acceptable for text, acceptable in zip(texts, golds, strict=True))
        low, high = wilson(right, n)
        found.append(
            {
                "task": f"pocket_{kind}",
                "n": n,
                "right": round(right / n, 4),
                "interval_95": [round(low, 4), round(high, 4)],
            }
        )
    return found
