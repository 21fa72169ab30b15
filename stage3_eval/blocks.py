"""The blocks of examples that results are reported for. Called by `evaluate`, `answers` and `report.results`.

    train, validation, test   the recipe's eval.splits, over the tasks that are trained on
    unseen_zero_shot          the tasks that are not (train: 0): the bare prompt
    unseen_few_shot           the same examples, eval.shots worked examples of the task before each prompt
    held_out                  training rows kept out of the cache, to choose a checkpoint on; in no table of results

All models answer the same examples of a block.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from pipeline.data import Shots, TrainingSet, eval_examples, eval_shots, training_set, unseen_examples
from pipeline.recipe import Recipe
from pipeline.tasks import Example

HELD_OUT = "held_out"
UNSEEN_ZERO_SHOT, UNSEEN_FEW_SHOT = "unseen_zero_shot", "unseen_few_shot"


@dataclass(frozen=True)
class Block:
    """Examples that are scored together.

    curve: those that every checkpoint answers; none where headline checkpoints alone are scored. shots: the worked
    examples before every prompt, whatever answers it.
    """

    name: str
    examples: tuple[Example, ...]
    curve: tuple[Example, ...] = ()
    shots: Shots | None = None

    @property
    def unseen(self) -> bool:
        """Whether its tasks are none of the trained ones."""
        return self.name in (UNSEEN_ZERO_SHOT, UNSEEN_FEW_SHOT)

    @cached_property
    def tasks(self) -> Mapping[str, tuple[Example, ...]]:
        """Its examples by task."""
        return by_task(self.examples)

    @cached_property
    def curve_tasks(self) -> Mapping[str, tuple[Example, ...]]:
        """Those of the curve by task."""
        return by_task(self.curve)


class Blocks:
    """The blocks of a recipe, read once for all its models."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    @cached_property
    def training_set(self) -> TrainingSet:
        return training_set(self._recipe)

    @cached_property
    def scored(self) -> tuple[Block, ...]:
        """What results are reported for, in their order."""
        limit = self._recipe.eval.curve_limit
        blocks = []
        for split in self._recipe.eval.splits:
            examples = eval_examples(self._recipe, split)
            blocks.append(Block(split, examples, first_of_each(examples, limit)))
        if self._recipe.unseen_tasks:
            unseen = unseen_examples(self._recipe)
            blocks.append(Block(UNSEEN_ZERO_SHOT, unseen))
            if self._recipe.eval.shots:
                blocks.append(Block(UNSEEN_FEW_SHOT, unseen, shots=eval_shots(self._recipe)))
        return tuple(blocks)

    @cached_property
    def held_out(self) -> Block:
        """What a checkpoint is chosen on: never a row of a scored block."""
        rows = self.training_set.held_out
        return Block(HELD_OUT, rows, rows)


def first_of_each(examples: tuple[Example, ...], limit: int | None) -> tuple[Example, ...]:
    """The first `limit` examples, each task keeping its share; all where the limit is None or no limit."""
    if limit is None or limit >= len(examples):
        return examples
    room = {task: max(1, limit * len(members) // len(examples)) for task, members in by_task(examples).items()}
    chosen = []
    for example in examples:
        if room[example.task]:
            room[example.task] -= 1
            chosen.append(example)
    return tuple(chosen)


def by_task(examples: Iterable[Example]) -> dict[str, tuple[Example, ...]]:
    """The examples of each task."""
    tasks: dict[str, list[Example]] = {}
    for example in examples:
        tasks.setdefault(example.task, []).append(example)
    return {task: tuple(members) for task, members in tasks.items()}
