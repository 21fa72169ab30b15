"""The identity test of an encoder-decoder teacher, from the recipe to the loss.

Stage 1 itself fills a cache without ids. Then the same model, loaded anew, stands in for the student: transformers' own
training forward, `model(input_ids, labels)`, which shifts the answer by itself, one unpadded example at a time. Rank by
rank the two must agree, and the ULD loss between them must vanish. What is left is

* float32: the codec. A logit is off by step / 2 at most, a probability by step / (2 T) of itself, and a row's
  probabilities sum to 1;
* bfloat16, and nf4 above it: the stand-in's own head, which rounds each logit to 8 bits (the teacher's ran in float32),
  and the body's sums in another order, which batches bring. Together 2**-9 of the largest logit in the mean.

The controls shift the rows by one, or put another prompt before the answer, and must not vanish.
"""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from cache_schema.reader import CacheReader
from cache_schema.schema import RANKED, CacheRow
from pipeline.fingerprint import Experiment
from pipeline.models import load_seq2seq_lm
from pipeline.recipe import Recipe, load_recipe
from stage1_teacher.__main__ import main
from stage2_student.losses import uld

T, STEP = 1.2, 2.0**-6
Logits = Callable[[str, CacheRow], Tensor]


def seq2seq_recipe(tmp_path: Path, **overrides: Any) -> Recipe:
    """A recipe whose teacher is the encoder-decoder in `tmp_path`/model, its cache filled by stage 1."""
    sections: dict[str, Any] = {
        "teacher": {"kind": "seq2seq", "shots": 0},
        "cache": {"store_ids": False, "temperatures": [T], "step": STEP},
        "arms": {"distill": None, "uld": {"ce": 1.0, "uld": 0.5, "temperature": T}},
        "eval": {"baselines": ["zero_shot"]},
    }
    for name, section in overrides.items():
        sections[name] = sections.get(name, {}) | section
    path = toys.tiny_recipe(tmp_path, **sections)
    assert main(["--recipe", str(path)]) == 0
    return load_recipe(str(path))


def stand_in(recipe: Recipe, tokenize: Callable[[str], list[int]]) -> Logits:
    """Fresh logits_NV of a row's answer after a prompt; tokenize: a text with end-of-sequence."""
    source, teacher = Experiment(recipe).teacher_source, recipe.teacher
    model = load_seq2seq_lm(source, teacher.dtype, teacher.quantization, torch.device("cpu"))

    def logits(prompt: str, row: CacheRow) -> Tensor:
        labels = tokenize(row.answer)
        assert labels == row.answer_ids.tolist()
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tokenize(prompt)]), labels=torch.tensor([labels]))
        logits_NV: Tensor = out.logits[0].float()
        return logits_NV

    return logits


def mean_uld(rows: list[CacheRow], logits: list[Tensor], shift: int = 0) -> float:
    """Mean over the usable positions of all rows."""
    total, count = 0.0, 0
    for row, logits_NV in zip(rows, logits, strict=True):
        assert row.token_ids is None
        usable_N = torch.from_numpy(row.status == 0)
        kept = [row.logits, row.logsumexp[:, 0], row.log_tail[:, 0]]  # type: ignore[index]
        teacher = [torch.from_numpy(part).roll(shift, 0) for part in kept]
        total += float(uld(logits_NV, *teacher, usable_N, T))  # type: ignore[arg-type]
        count += int(usable_N.sum())
    assert count > 50
    return total / count


def check(recipe: Recipe, logits: Logits) -> None:
    """The loss vanishes to its bound, and comes back with each control."""
    experiment = Experiment(recipe)
    reader = CacheReader.open(experiment.cache_dir, expect=experiment.identity)
    rows = list(reader.rows(RANKED))
    fresh = [logits(row.prompt, row) for row in rows]
    largest = max(float(logits_NV.abs().max()) for logits_NV in fresh)
    rounding = 1e-5 if recipe.teacher.dtype == "float32" else 2**-9 * largest
    bound = math.expm1((STEP / 2 + rounding) / T)
    assert mean_uld(rows, fresh) <= bound
    assert mean_uld(rows, fresh, shift=1) > 5 * bound
    others = [rows[i - 1].prompt for i in range(len(rows))]
    assert mean_uld(rows, [logits(prompt, row) for prompt, row in zip(others, rows, strict=True)]) > 5 * bound


@pytest.mark.parametrize(("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "nf4")])
def test_a_teacher_that_is_the_student_costs_nothing(tmp_path: Path, dtype: str, quantization: str) -> None:
    tokenizer = toys.tiny_tokenizer(tmp_path / "model")
    toys.tiny_t5(tmp_path / "model", hidden=64, pad_token_id=1, decoder_start_token_id=1, eos_token_id=0)
    recipe = seq2seq_recipe(tmp_path, teacher={"dtype": dtype, "quantization": quantization})
    check(recipe, stand_in(recipe, lambda text: [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]))


DATA = os.environ.get("LOGITBANK_DATA")


@pytest.mark.skipif(
    not DATA, reason="needs the real tokenizer and rows: set LOGITBANK_DATA to the folder that has them"
)
def test_with_the_real_t5_tokenizer_and_rows(tmp_path: Path) -> None:
    """The true vocabulary of 32,128, K = 256, and texts as T5's own tokenizer call lays them out."""
    from transformers import AutoTokenizer

    shutil.copytree(Path(str(DATA)) / "tokenizers" / "t5", tmp_path / "model")
    toys.tiny_t5(tmp_path / "model", vocab_size=32128, hidden=64)
    recipe = seq2seq_recipe(
        tmp_path,
        data={"dir": DATA, "tasks": {"gsm8k": None, "common_gen": {"train": 6}, "samsum": {"train": 4}}},
        cache={"top_k": 256},
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    check(recipe, stand_in(recipe, lambda text: tokenizer(text)["input_ids"]))
