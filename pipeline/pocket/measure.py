"""What a pre-trained pocket model can do: greedy answers to validation problems, with and without worked examples.

Called by `python -m pipeline.pocket` at the end of a run. It reads validation problems only; the test problems are for
`stage3_eval`, whose numbers are the ones to quote.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.models import kv_cache_argument
from pipeline.pocket.documents import answer_of, prompt_of
from pipeline.pocket.problems import Problem, split_problems
from pipeline.tasks.numbers import score_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 56
"""A worked answer takes at most about 46."""


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927)."""
    z = 1.959964
    share, spread = right / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return centre - half, centre + half


def context_ids(tokenizer: PreTrainedTokenizerBase, shots: int, style: str = "worked") -> list[int]:
    """Ids of the first `shots` training problems as worked examples."""
    ids: list[int] = []
    for problem in split_problems("train")[:shots]:
        for text in (prompt_of(problem.question), " " + answer_of(problem, style)):
            ids += tokenizer(text)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    return ids


@torch.inference_mode()
def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    shots: int,
    batch_size: int = 128,
) -> list[str]:
    """Greedy answers, in the problems' order. Questions of equal length share a batch, so nothing is padded."""
    context = context_ids(tokenizer, shots)
    read = model(torch.tensor([context]), use_cache=True).past_key_values.layers if context else ()
    prompts: list[list[int]] = tokenizer([prompt_of(problem.question) for problem in problems])["input_ids"]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    texts = [""] * len(problems)
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            rows = len(part)
            kv = [(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)) for layer in read]
            written = _greedy(model, torch.tensor([prompts[i] for i in part]), kv, tokenizer.eos_token_id)
            for index, ids in zip(part, written, strict=True):
                texts[index] = str(tokenizer.decode(ids))
    return texts


def _greedy(model: Any, input_BL: Tensor, context: list[tuple[Tensor, Tensor]], end_id: int) -> list[list[int]]:
    """Most likely continuations of equally long inputs behind a shared context, each up to its end-of-sequence."""
    from transformers import DynamicCache

    argument = kv_cache_argument(model, DynamicCache(context) if context else DynamicCache())
    rows: list[list[int]] = [[] for _ in range(len(input_BL))]
    open_rows = set(range(len(rows)))
    for _ in range(MAX_NEW_TOKENS):
        logits_BLV = model(input_BL, use_cache=True, logits_to_keep=1, **argument).logits
        input_BL = logits_BLV[:, -1].argmax(-1, True)
        for row, token in enumerate(input_BL[:, 0].tolist()):
            if token == end_id:
                open_rows.discard(row)
            elif row in open_rows:
                rows[row].append(token)
        if not open_rows:
            break
    return rows


def measure(model: Any, tokenizer: PreTrainedTokenizerBase, n: int, shots: int) -> dict[str, Any]:
    """Strict accuracy on the first `n` validation problems, its 95% interval, and the share answered in steps."""
    problems = split_problems("validation")[:n]
    texts = answers(model, tokenizer, problems, shots)
    right = sum(
        score_number(text, problem.worked)["strict"] == 1.0 for text, problem in zip(texts, problems, strict=True)
    )
    low, high = wilson(right, n)
    return {
        "shots": shots,
        "n": n,
        "accuracy": round(right / n, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "answered_in_steps": round(sum("=" in text for text in texts) / n, 4),
    }
