"""Rows become examples, and examples find their roles: cached, held out, worked example, scored.

All is a pure function of the recipe and the rows, so every stage sees the same split without being told.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import DataError, RecipeError, unknown_name
from pipeline.recipe import Recipe
from pipeline.sections import Data
from pipeline.tasks import Example, HubSource, Task, get_task

T = TypeVar("T")


@dataclass(frozen=True)
class Shots:
    """The worked examples before a prompt, by the recipe's policy.

    shared: the same ones for every example of a task. per_example: drawn for each from the training rows, seeded by
    the example, never the example itself.
    """

    count: int
    policy: str
    seed: int
    pool: Mapping[str, tuple[Example, ...]]  # task -> the shared shots, or all training rows to draw from

    def of(self, example: Example) -> tuple[Example, ...]:
        """The shots in front of `example`."""
        pool = self.pool.get(example.task, ())
        if self.policy == "shared" or not self.count:
            return pool[: self.count]
        draw = random.Random(f"{self.seed}/{example.id}")
        return tuple(islice((s for s in draw.sample(pool, len(pool)) if s.prompt != example.prompt), self.count))


@dataclass(frozen=True)
class TrainingSet:
    """The training rows by role: rows = len(cached) + len(held_out) + shots taken out."""

    rows: int
    cached: tuple[Example, ...]
    held_out: tuple[Example, ...]
    shots: Shots

    def content_digest(self) -> str:
        """SHA-256 of what is cached and of the shots' text, in order."""
        digest = hashlib.sha256()
        pools = [shot for task in sorted(self.shots.pool) for shot in self.shots.pool[task]] if self.shots.count else []
        for example in [*self.cached, *pools]:
            digest.update(json.dumps([example.id, example.task, example.prompt, example.answer]).encode())
        return digest.hexdigest()


def training_set(recipe: Recipe) -> TrainingSet:
    """The training examples of a recipe. Raises DataError where a task is missing, empty or too small."""
    data, teacher = recipe.data, recipe.teacher
    examples = _limited(
        [_sample(_examples(name, "train", data), data.tasks[name].train, data.seed) for name in data.tasks],
        data.train_limit,
        data.seed,
    )
    rows = len(examples)
    by_task = {name: [e for e in examples if e.task == name] for name in data.tasks}
    for name, members in by_task.items():
        if len(members) <= teacher.shots:
            raise DataError(
                f"task {name}: {len(members)} training rows, but {teacher.shots} are needed as worked examples and one "
                "at least to train on; give more rows (data.train_limit, data.tasks) or fewer teacher.shots"
            )
    if teacher.shot_policy == "shared":
        draw = random.Random(teacher.shot_seed)
        pool = {name: tuple(draw.sample(members, teacher.shots)) for name, members in by_task.items()}
        taken = {shot.id for shots in pool.values() for shot in shots}
    else:
        pool, taken = {name: tuple(members) for name, members in by_task.items()}, set()
    rest = [e for e in examples if e.id not in taken]
    if data.held_out >= len(rest):
        raise DataError(
            f"data.held_out is {data.held_out}, but only {len(rest)} training rows are left; hold out fewer"
        )
    held_ids = {e.id for e in _sample(rest, data.held_out, data.seed + 1)} if data.held_out else set()
    if held_ids and teacher.shot_policy == "per_example":
        pool = {name: tuple(e for e in members if e.id not in held_ids) for name, members in pool.items()}
    return TrainingSet(
        rows,
        tuple(e for e in rest if e.id not in held_ids),
        tuple(e for e in rest if e.id in held_ids),
        Shots(teacher.shots, teacher.shot_policy, teacher.shot_seed, pool),
    )


def eval_examples(recipe: Recipe, split: str) -> tuple[Example, ...]:
    """The examples of a scored split, in the order in which a `curve_limit` cuts them."""
    data = recipe.data
    per_task = [_sample(_examples(name, split, data), data.tasks[name].eval, data.seed) for name in data.tasks]
    return tuple(_limited(per_task, data.eval_limit, data.seed))


def task_options(name: str, data: Data) -> BaseModel:
    """The checked options of a task. Raises RecipeError naming the nearest known one."""
    task = get_task(name)
    given = data.tasks[name].options
    for key in given:
        if key not in task.options.model_fields:
            raise RecipeError(f"data.tasks.{name}.options: {unknown_name('option', key, task.options.model_fields)}")
    try:
        return task.options.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"data.tasks.{name}.options.{first['loc'][0]}: {first['msg']}; found {first['input']!r}"
        ) from None


def _examples(name: str, split: str, data: Data) -> list[Example]:
    """All examples of one task's split, ids unique over tasks and splits."""
    task, options = get_task(name), task_options(name, data)
    where, rows = _rows(task, split, data, options)
    examples = []
    for index, row in enumerate(rows):
        try:
            example = task.to_example(row, index, options)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where}, row {index}: task {name} cannot read it: {type(error).__name__} {error}; "
                f"found the fields {sorted(row) if isinstance(row, Mapping) else type(row).__name__}"
            ) from None
        if not isinstance(example.prompt, str) or not isinstance(example.answer, str):
            raise DataError(f"{where}, row {index}: prompt and answer must be text")
        examples.append(replace(example, id=f"{split}/{example.id}"))
    if not examples:
        raise DataError(f"{where}: task {name} has no rows; the file or the split is empty")
    return examples


def _rows(task: Task, split: str, data: Data, options: BaseModel) -> tuple[str, Iterable[Mapping[str, Any]]]:
    """Where a split comes from, in words for errors, and its rows."""
    if data.dir is not None:
        path = Path(data.dir) / task.name / f"{split}.jsonl"
        return str(path), _jsonl(path)
    if not isinstance(task.source, HubSource):
        return f"task {task.name}, split {split}", task.source(split, options)
    return f"{task.source.path} on the Hub, split {split}", _hub(task, task.source, split)


def _jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise DataError(
            f"{path}: expected a file of JSON lines, found {found}; check data.dir (<dir>/<task>/<split>.jsonl)"
        )
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: not JSON: {error}") from None
    return rows


def _hub(task: Task, source: HubSource, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    if split not in source.splits:
        raise DataError(f"task {task.name} has no split '{split}'; it has {', '.join(source.splits)}")
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            source.path, source.config, split=source.splits[split]
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"task {task.name}: the data set {source.path} could not be loaded from the Hub: {error}. "
            f"Without a network, put its rows into <folder>/{task.name}/{split}.jsonl and add --set data.dir=<folder>"
        ) from None
    return rows


def _sample(items: Sequence[T], count: int | None, seed: int) -> list[T]:
    """`count` of the items, drawn without replacement by `seed`, in their old order; all when count is None."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), count))]


def _limited(per_task: list[list[Example]], limit: int | None, seed: int) -> list[Example]:
    """The tasks' examples in one list, at most `limit` of them, each task keeping its share."""
    return _sample([example for examples in per_task for example in examples], limit, seed)
