"""Rows become examples, and examples find their roles: cached, held out, worked example, scored.

All is a pure function of the recipe and the rows, so every stage sees the same split without being told.

The mixture. Of each task that is trained on, `data.tasks.<name>.train` rows are drawn without replacement, seeded by
`data.seed`, in the order in which they stood; of several tasks the drawn examples are then put in one order by a single
seeded shuffle, so that every shard of the cache and every early stop holds all tasks in about their shares. A recipe of
one task keeps the order of its rows. Tasks with `train: 0` are unseen: they have no part in the training set, in its
identity or in its worked examples, and are only scored.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import DataError, RecipeError, unknown_name
from pipeline.recipe import Recipe
from pipeline.sections import Data
from pipeline.tasks import Example, HubSource, Row, Task, get_task

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

    @property
    def truncated(self) -> int:
        """How many cached examples have a context that was cut to its task's word limit."""
        return sum(example.truncated for example in self.cached)

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
    for name in recipe.unseen_tasks:
        task_options(name, data)  # a name or an option that is wrong is said now, not by the last stage
    tasks = recipe.trained_tasks
    examples = _limited(
        [_examples(name, "train", data, data.tasks[name].train) for name in tasks], data.train_limit, data
    )
    if len(tasks) > 1:
        random.Random(f"{data.seed}/mixture").shuffle(examples)
    rows = len(examples)
    by_task = {name: [e for e in examples if e.task == name] for name in tasks}
    for name, members in by_task.items():
        if len(members) <= teacher.shots:
            raise DataError(
                f"task {name}: {len(members)} training rows, but {teacher.shots} are needed as worked examples and one "
                "at least to train on; give more rows (data.train_limit, data.tasks) or fewer teacher.shots"
            )
    if teacher.shot_policy == "shared":
        draw = random.Random(teacher.shot_seed)
        pool = {name: tuple(draw.sample(members, teacher.shots)) for name, members in by_task.items()}
        taken = {(shot.task, shot.prompt) for shots in pool.values() for shot in shots}  # and every row like it
    else:
        pool, taken = {name: tuple(members) for name, members in by_task.items()}, set()
    rest = [e for e in examples if (e.task, e.prompt) not in taken]
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
    """The examples of a scored split of the tasks trained on, in the order in which a `curve_limit` cuts them.

    Of `train` they are a seeded draw from what is cached: what was trained on, and nothing else.
    """
    data, tasks = recipe.data, recipe.trained_tasks
    if split == "train":
        cached = training_set(recipe).cached
        per_task = [_sample([e for e in cached if e.task == name], data.tasks[name].eval, data.seed) for name in tasks]
    else:
        per_task = [_examples(name, split, data, data.tasks[name].eval) for name in tasks]
    return tuple(_limited(per_task, data.eval_limit, data))


def unseen_examples(recipe: Recipe) -> tuple[Example, ...]:
    """The test examples of the tasks that are only scored."""
    data = recipe.data
    per_task = [_examples(name, "test", data, data.tasks[name].eval) for name in recipe.unseen_tasks]
    return tuple(_limited(per_task, data.eval_limit, data))


def eval_shots(recipe: Recipe) -> Shots:
    """`eval.shots` worked examples of each unseen task, from its training rows, the same ones before all its prompts.

    Raises DataError where a task has too few training rows.
    """
    data, count, seed = recipe.data, recipe.eval.shots, recipe.teacher.shot_seed
    pool: dict[str, tuple[Example, ...]] = {}
    for name in recipe.unseen_tasks if count else []:
        pool[name] = tuple(_examples(name, "train", data, count, seed))
        if len(pool[name]) < count:
            raise DataError(
                f"task {name}: {len(pool[name])} training rows, but eval.shots asks for {count} as worked examples; "
                "give more rows or fewer eval.shots"
            )
    return Shots(count, "shared", seed, pool)


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


def _examples(name: str, split: str, data: Data, count: int | None, seed: int | None = None) -> list[Example]:
    """`count` examples of one task's split, drawn by the seed (data.seed if None); ids unique over tasks and splits.

    Rows are drawn before they are converted: a large data set costs what is drawn of it.
    """
    task, options = get_task(name), task_options(name, data)
    where, rows = _rows(task, split, data, options)
    examples = []
    for index in _sample(range(len(rows)), count, data.seed if seed is None else seed):
        row = rows[index]
        try:
            example = task.to_example(row, index, options)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{where}, row {index}: task {name} cannot read it: {type(error).__name__} {error}; "
                f"found the fields {sorted(row) if isinstance(row, Mapping) else type(row).__name__}"
            ) from None
        if not (_is_text(example.prompt) and _is_text(example.answer)):
            raise DataError(f"{where}, row {index}: prompt and answer must be text, without lone surrogates")
        examples.append(replace(example, id=f"{split}/{example.id}"))
    if not examples:
        raise DataError(f"{where}: task {name} has no rows; the file or the split is empty")
    return examples


def _is_text(value: object) -> bool:
    """Whether it is text that can be written as UTF-8. JSON allows halves of surrogate pairs, tokenizers do not."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _rows(task: Task, split: str, data: Data, options: BaseModel) -> tuple[str, Sequence[Row]]:
    """Where a split comes from, in words for errors, and its rows."""
    source = task.source
    rows: Iterable[Row]
    if data.dir is not None:
        path = Path(data.dir) / task.name / f"{split}.jsonl"
        where, rows = str(path), _jsonl(path)
    elif isinstance(source, HubSource):
        where, rows = f"{source.path} on the Hub, split {split}", _hub(task, source, split)
    else:
        return f"task {task.name}, split {split}", list(source(split, options))
    if isinstance(source, HubSource) and source.rows is not None:
        try:
            return where, list(source.rows(rows))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{where}: task {task.name} cannot gather its rows: {type(error).__name__} {error}"
            ) from None
    return where, rows


def _jsonl(path: Path) -> list[Row]:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise DataError(
            f"{path}: expected a file of JSON lines, found {found}; check data.dir (<dir>/<task>/<split>.jsonl)"
        )
    rows = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        rows.append(json.loads(line.decode("utf-8")))
                    except ValueError as error:
                        raise DataError(f"{path}, line {number}: not JSON in UTF-8: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: it cannot be read: {error.strerror}") from None
    return rows


def _hub(task: Task, source: HubSource, split: str) -> Sequence[Row]:
    import datasets

    if split not in source.splits:
        raise DataError(f"task {task.name} has no split '{split}'; it has {', '.join(source.splits)}")
    try:
        rows: Sequence[Row] = datasets.load_dataset(
            source.path, source.config, split=source.splits[split], revision=source.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
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


def _limited(per_task: list[list[Example]], limit: int | None, data: Data) -> list[Example]:
    """The tasks' examples in one list, at most `limit` of them, each task keeping about its share."""
    return _sample([example for examples in per_task for example in examples], limit, data.seed)
