"""What a training step may hold: full-vocabulary logits of a few positions at a time, never of a batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cache_schema.reader import CacheReader
from pipeline.fingerprint import Experiment
from pipeline.recipe import load_recipe
from pipeline.sections import Arm
from stage2_student.batches import Collator
from stage2_student.student import Student

VOCABULARY = 5_003  # a prime above every other size here: what has it as a factor has the vocabulary as a dimension
CHUNK = 7  # positions whose logits may exist at once


class LargestLogits(TorchDispatchMode):
    """Records how many rows the largest tensor over the vocabulary has, forward and backward, weights left out."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights, self.rows = weights, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it made."""
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            over_vocabulary = isinstance(tensor, Tensor) and VOCABULARY in tensor.shape
            if over_vocabulary and tensor.untyped_storage().data_ptr() not in self.weights:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return made


@pytest.mark.parametrize(
    "arm",
    [
        Arm(ce=1.0),
        Arm(ce=1.0, logit_mse=0.5),
        Arm(ce=1.0, kl=0.5, temperature=1.2),
        Arm(ce=1.0, uld=0.5, temperature=1.2),
    ],
)
def test_no_tensor_holds_a_batchs_logits(tmp_path: Path, arm: Arm) -> None:
    toys.tiny_tokenizer(tmp_path / "model")
    toys.tiny_qwen3(tmp_path / "model", vocab_size=VOCABULARY)
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path, cache={"temperatures": [1.0, 1.2]})))
    experiment = Experiment(recipe)
    reader = CacheReader.open(toys.fill_cache(recipe), expect=experiment.identity)
    student = Student(experiment.teacher_source, recipe.students["toy"], 0, torch.device("cpu"))
    collator = Collator(reader, experiment.teacher_prompts, student.vocab_size, arm, "boundary")
    (batch,) = collator.read(range(6), 6)
    weights = {name: w for name in ("ce", "logit_mse", "kl", "uld") if (w := getattr(arm, name)) > 0}
    frozen = {p.untyped_storage().data_ptr() for p in student.model.parameters()}
    largest = {}
    for chunk in (CHUNK, 10 * len(batch.labels_N)):
        with LargestLogits(frozen) as watched:
            student.backward(batch, weights, batch.counts(), arm.temperature, chunk * VOCABULARY)
        largest[chunk] = watched.rows
    assert len(batch.labels_N) > 10 * CHUNK
    assert largest.pop(CHUNK) == CHUNK
    assert set(largest.values()) == {len(batch.labels_N)}  # one chunk for all would be noticed
