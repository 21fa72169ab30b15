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
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import DataError, RecipeError, unknown_name
from pipeline.recipe import Recipe
from pipeline.rows import example_of, read_rows
from pipeline.sections import Data
from pipeline.tasks import Example, get_task

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
    """The training rows by role: rows = len(cached) + len(held_out) + shots taken out.

    Rows that cannot be used stay among the cached, where stage 1 quarantines them; no shot and no held-out row is one.
    """

    rows: int
    cached: tuple[Example, ...]
    held_out: tuple[Example, ...]
    shots: Shots

    @property
    def truncated(self) -> int:
        """How many cached examples have a context that was cut to its task's word limit."""
        return sum(example.truncated for example in self.cached)

    def content_digest(self) -> str:
        """SHA-256 of what is cached and of the shots' text, in order; of an unusable row, of the row as it is."""
        digest = hashlib.sha256()
        pools = [shot for task in sorted(self.shots.pool) for shot in self.shots.pool[task]] if self.shots.count else []
        for example in [*self.cached, *pools]:
            content = [example.prompt, example.answer]
            if example.unusable:
                content = [example.unusable, example.extra["sha256"]]
            digest.update(json.dumps([example.id, example.task, *content]).encode())
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
    by_task = {name: [e for e in examples if e.task == name and _worked(e)] for name in tasks}
    for name, members in by_task.items():
        if len(members) <= teacher.shots:
            drawn = sum(example.task == name for example in examples)
            bad = f" that can be used, of {drawn}" if drawn > len(members) else ""
            raise DataError(
                f"task {name}: {len(members)} training rows{bad}, but {teacher.shots} are needed as worked examples "
                "and one at least to train on; give more rows (data.train_limit, data.tasks) or fewer teacher.shots"
            )
    if teacher.shot_policy == "shared":
        draw = random.Random(teacher.shot_seed)
        pool = {name: tuple(draw.sample(members, teacher.shots)) for name, members in by_task.items()}
        taken = {(shot.task, shot.prompt) for shots in pool.values() for shot in shots}  # and every row like it
    else:
        pool, taken = {name: tuple(members) for name, members in by_task.items()}, set()
    rest = [e for e in examples if e.unusable or (e.task, e.prompt) not in taken]
    sound = _usable(rest)
    if data.held_out >= len(sound):
        raise DataError(
            f"data.held_out is {data.held_out}, but only {len(sound)} training rows are left; hold out fewer"
        )
    held_ids = {e.id for e in _sample(sound, data.held_out, data.seed + 1)} if data.held_out else set()
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
        cached = _usable(training_set(recipe).cached)
        per_task = [_sample([e for e in cached if e.task == name], data.tasks[name].eval, data.seed) for name in tasks]
    else:
        per_task = [_scored(name, split, data) for name in tasks]
    return tuple(_limited(per_task, data.eval_limit, data))


def unseen_examples(recipe: Recipe) -> tuple[Example, ...]:
    """The test examples of the tasks that are only scored."""
    data = recipe.data
    per_task = [_scored(name, "test", data) for name in recipe.unseen_tasks]
    return tuple(_limited(per_task, data.eval_limit, data))


def eval_shots(recipe: Recipe) -> Shots:
    """`eval.shots` worked examples of each unseen task, from its training rows, the same ones before all its prompts.

    Raises DataError where a task has too few training rows.
    """
    data, count, seed = recipe.data, recipe.eval.shots, recipe.teacher.shot_seed
    pool: dict[str, tuple[Example, ...]] = {}
    for name in recipe.unseen_tasks if count else []:
        drawn = _examples(name, "train", data, count, seed)
        if not all(map(_worked, drawn)):
            drawn = _sample([e for e in _examples(name, "train", data, None) if _worked(e)], count, seed)
        pool[name] = tuple(drawn)
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
    """`count` examples of one task's split, drawn by the seed (data.seed if None), unusable ones among them.

    Rows are drawn before they are converted: a large data set costs what is drawn of it. Raises DataError where none
    can be used.
    """
    task, options = get_task(name), task_options(name, data)
    where, rows = read_rows(task, split, data, options)
    if not len(rows):
        raise DataError(f"{where}: task {name} has no rows; the file or the split is empty")
    drawn = _sample(range(len(rows)), count, data.seed if seed is None else seed)
    examples = [example_of(task, split, rows[index], index, options) for index in drawn]
    if not _usable(examples):
        what = examples[0].extra["what"]
        first = what if what.startswith("line ") else f"row {drawn[0]}: {what}"
        others = f"\n  none of the other {len(examples) - 1} rows can be used either" if len(examples) > 1 else ""
        raise DataError(f"{where}, {first}{others}")
    return examples


def _scored(name: str, split: str, data: Data) -> list[Example]:
    """The examples of a split that is scored. Rows that cannot be used have no gold answer: they are left out, said
    so on stderr, and the n beside every score does not count them."""
    examples = _examples(name, split, data, data.tasks[name].eval)
    if bad := [e for e in examples if e.unusable]:
        named = ", ".join(f"{e.id} ({e.unusable})" for e in bad[:5]) + (", ..." if len(bad) > 5 else "")
        print(
            f"task {name}, split {split}: {len(bad)} of {len(examples)} rows cannot be used and are not scored: "
            + named,
            file=sys.stderr,
            flush=True,
        )
    return _usable(examples)


def _usable(examples: Iterable[Example]) -> list[Example]:
    return [example for example in examples if not example.unusable]


def _worked(example: Example) -> bool:
    """Whether it can be a worked example. An empty answer teaches nothing (stage 1 quarantines its example), and an
    empty prompt asks nothing."""
    return not example.unusable and bool(example.prompt.strip() and example.answer.strip())


def _sample(items: Sequence[T], count: int | None, seed: int) -> list[T]:
    """`count` of the items, drawn without replacement by `seed`, in their old order; all when count is None."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), count))]


def _limited(per_task: list[list[Example]], limit: int | None, data: Data) -> list[Example]:
    """The tasks' examples in one list, at most `limit` of them, each task keeping about its share."""
    return _sample([example for examples in per_task for example in examples], limit, data.seed)
