"""The identity test: a teacher that is the student itself must cost nothing, and a slip anywhere must cost something.

The cache is made from the base model's plain forward pass, one unpadded example at a time; the student reads it back
through its own prompts, padding, gathering, chunks and head, its adapter as every arm begins. What is left is

* float32: the codec, at most step / 2 a logit;
* bfloat16: the student's head, which rounds each logit to 8 bits (the teacher's ran in float32), at most 2**-8 of the
  largest logit, and the body's sums in another order, which padding brings.

So a root mean square above these bounds is an off-by-one, a template, a mask or a position slip. The controls shift
the rows by one, or drop a worked example, and must not vanish.

The rank-ordered loss sees probabilities: logits off by e / T each move a probability by at most 2 e / T of itself (the
normaliser moves too), hence an L1 distance by 2 e / T.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys

from cache_schema.reader import CacheReader
from cache_schema.schema import CacheRow
from pipeline.fingerprint import Experiment
from pipeline.prompts import Encoded, PromptBuilder
from pipeline.recipe import Recipe, load_recipe
from pipeline.sections import Arm
from pipeline.tasks import Example
from stage2_student.batches import Batch, Collator
from stage2_student.student import Student

STEP = 2.0**-6
ARM = Arm(logit_mse=1.0, kl=1.0)
ULD = Arm(uld=1.0, temperature=1.2)


class WithShots(PromptBuilder):
    """A student that reads the worked examples too, so that its prompt can be the teacher's."""

    shots: Sequence[Example] = ()

    def encode(self, prompt: str, answer: str, shots: Sequence[Example] = ()) -> Encoded:
        return super().encode(prompt, answer, self.shots)


@dataclass
class Setting:
    """One cache and the student that is its teacher."""

    recipe: Recipe
    rows: list[CacheRow]
    collator: Collator
    student: Student

    def losses(self, batch: Batch) -> tuple[float, float]:
        """(root mean squared logit error, KL) at step 0, in chunks of 20 positions."""
        chunk_logits = 20 * self.student.vocab_size
        mse, kl = self.student.backward(
            batch, {"logit_mse": 1.0, "kl": 1.0}, batch.counts(), 1.0, chunk_logits
        ).tolist()
        return mse**0.5, kl

    def rank_loss(self, batch: Batch) -> float:
        """ULD at step 0, at the cache's second temperature."""
        return self.student.backward(batch, {"uld": 1.0}, batch.counts(), ULD.temperature, None).item()

    @property
    def bound(self) -> float:
        """Of a logit's error, for the student's dtype."""
        largest = max(float(np.abs(row.logits).max()) for row in self.rows)
        return STEP / 2 + (1e-4 if self.recipe.students["toy"].dtype == "float32" else 2**-8 * largest)


def setting(tmp_path: Path, dtype: str, count: int = 5, arm: Arm = ARM, **overrides: Any) -> Setting:
    """A cache whose teacher is the student."""
    sections: dict[str, Any] = {
        "teacher": {"dtype": dtype, "shots": 0},
        "students": {"toy": {"dtype": dtype}},
        "eval": {"baselines": ["zero_shot"]},
    }
    for name, section in overrides.items():
        sections[name] = sections.get(name, {}) | section
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path, **sections)))
    experiment = Experiment(recipe)
    reader = CacheReader.open(toys.fill_cache(recipe), expect=experiment.identity)
    student = Student(experiment.teacher_source, recipe.students["toy"], 0, torch.device("cpu"))
    prompts = WithShots(experiment.teacher_tokenizer, recipe.teacher.thinking)
    collator = Collator(reader, prompts, student.vocab_size, arm, "boundary")
    return Setting(recipe, reader.read(range(count)), collator, student)


def shifted(batch: Batch) -> Batch:
    """The control: every row of the teacher one answer token too late."""
    teacher = batch.teacher
    assert teacher is not None
    names = ("logits_NK", "ids_NK", "logsumexp_N", "log_tail_N", "weights_NK")
    rolled = {n: values.roll(1, 0) for n in names if (values := getattr(teacher, n)) is not None}
    return replace(batch, teacher=replace(teacher, **rolled))


def check(made: Setting) -> None:
    """Both losses vanish on either padding, and come back when the rows are shifted."""
    for padding in ("right", "left"):
        batch = made.collator.collate(made.rows, padding)  # type: ignore[arg-type]
        error, kl = made.losses(batch)
        assert error <= made.bound, padding
        assert abs(kl) <= made.bound / 10, padding  # errors of both signs, weighted by p
        error, kl = made.losses(shifted(batch))
        assert error > 10 * made.bound, padding
        assert kl > 0.1, padding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_that_is_the_student_costs_nothing(tmp_path: Path, dtype: str) -> None:
    check(setting(tmp_path, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drawn_ids_of_a_teacher_that_is_the_student_cost_nothing(tmp_path: Path, dtype: str) -> None:
    """Whatever was drawn: log p - log q is zero at every id."""
    cache = {"selector": "sampled", "top_k": 24, "step": STEP}
    made = setting(tmp_path, dtype, arm=Arm(kl=1.0), cache=cache, arms={"distill": {"logit_mse": 0.0, "kl": 1.0}})
    for padding in ("right", "left"):
        batch = made.collator.collate(made.rows, padding)  # type: ignore[arg-type]
        kl, of_shifted = (
            made.student.backward(b, {"kl": 1.0}, b.counts(), 1.0, 20 * made.student.vocab_size).item()
            for b in (batch, shifted(batch))
        )
        assert abs(kl) <= made.bound / 10
        assert of_shifted > 0.1


@pytest.mark.parametrize("thinking", [False, True, None])
def test_with_a_chat_template(tmp_path: Path, thinking: bool | None) -> None:
    """The switch is the teacher's, and the student's prompt follows it."""
    toys.tiny_tokenizer(tmp_path / "model", chat=True)
    toys.tiny_qwen3(tmp_path / "model")
    check(setting(tmp_path, "float32", teacher={"thinking": thinking}))


def test_worked_examples_dropped_do_not_vanish(tmp_path: Path) -> None:
    """With the teacher's two shots in its prompt the student is the teacher; with one of them, or none, it is not."""
    made = setting(tmp_path, "float32", teacher={"shots": 2})
    shots = Experiment(made.recipe).training_set.shots.pool["gsm8k"]
    for count in (2, 1, 0):
        made.collator.prompts.shots = shots[2 - count :]  # type: ignore[attr-defined]
        error, kl = made.losses(made.collator.collate(made.rows))
        if count == 2:
            assert error <= made.bound and abs(kl) <= made.bound / 10
        else:
            assert error > 10 * made.bound and kl > 0.1


RANKS = {"temperatures": [1.0, 1.2], "store_ids": False}


@pytest.mark.parametrize("alignment", ["boundary", "index"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_without_ids_cost_nothing_either(tmp_path: Path, dtype: str, alignment: str) -> None:
    made = setting(tmp_path, dtype, arm=ULD, cache=RANKS, arms={"sft": {"ce": 1.0}, "distill": None})
    made.collator.alignment = alignment  # type: ignore[assignment]
    for padding in ("right", "left"):
        batch = made.collator.collate(made.rows, padding)  # type: ignore[arg-type]
        assert batch.counts()["uld"] == len(batch.labels_N)  # the same tokens align completely
        loss, bound = made.rank_loss(batch), 2 * made.bound / ULD.temperature
        assert loss <= bound, padding
        assert made.rank_loss(shifted(batch)) > max(2 * bound, 10 * loss), padding


def test_ranks_notice_a_dropped_worked_example(tmp_path: Path) -> None:
    """And another temperature on one side only."""
    made = setting(
        tmp_path, "float32", arm=ULD, cache=RANKS, teacher={"shots": 2}, arms={"sft": {"ce": 1.0}, "distill": None}
    )
    shots = Experiment(made.recipe).training_set.shots.pool["gsm8k"]
    bound = 2 * made.bound / ULD.temperature
    for count in (2, 1, 0):
        made.collator.prompts.shots = shots[2 - count :]  # type: ignore[attr-defined]
        loss = made.rank_loss(made.collator.collate(made.rows))
        assert loss <= bound if count == 2 else loss > 10 * bound
    made.collator.prompts.shots = shots  # type: ignore[attr-defined]
    made.collator.temperature_column = 0
    assert made.rank_loss(made.collator.collate(made.rows)) > 10 * bound


DATA = os.environ.get("LOGITBANK_DATA")


@pytest.mark.skipif(
    not DATA, reason="needs the real tokenizer and rows: set LOGITBANK_DATA to the folder that has them"
)
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_the_real_qwen_tokenizer_and_rows(tmp_path: Path, dtype: str) -> None:
    """The true vocabulary of 151,936 and the shortest GSM8K rows; this tokenizer's template has no thinking switch."""
    import json

    source = Path(str(DATA))
    shutil.copytree(source / "tokenizers" / "qwen", tmp_path / "model")
    toys.tiny_qwen3(tmp_path / "model", vocab_size=151936, hidden=16, initializer_range=0.6)
    lines = (source / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    shortest = sorted(map(json.loads, lines), key=lambda row: len(row["answer"]))[:3]
    toys.write_jsonl(tmp_path / "data" / "gsm8k" / "train.jsonl", shortest)
    made = setting(tmp_path, dtype, count=3, cache={"top_k": 256})
    assert made.student.vocab_size == 151936
    assert made.collator.prompts.tokenizer.convert_ids_to_tokens(made.collator.prompts.end_id) == "<|im_end|>"
    check(made)
