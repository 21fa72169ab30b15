"""Tasks: one small file each, found by its name. To add a task, add `pipeline/tasks/<name>.py` that defines `TASK`.

A task says where its rows come from (the Hugging Face Hub, or a generator of its own; `data.dir` overrides both),
how a row becomes an example (untemplated prompt and answer), and how a prediction is scored.
"""

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.errors import RecipeError, unknown_name

Row = Mapping[str, Any]
Scores = dict[str, float | None]

_DEFINES_TASK = re.compile(r"^TASK\b", re.MULTILINE)


class NoOptions(BaseModel):
    """A task without options."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class Example:
    """One prompt with its answer, as plain text: no template, no special token.

    references: the acceptable answers for scoring where there are several; empty means `answer` alone.
    labels: of a classification, all answers there are, `answer` among them; empty where answers are free text.
    truncated: whether the context in the prompt was cut to the task's word limit.
    extra: what a metric needs besides the texts (concepts to cover, tests to run), as plain JSON values.
    unusable: why its row could not be read as an example, in one word; "" of every sound one (`pipeline.rows`).
    """

    id: str
    task: str
    prompt: str
    answer: str
    references: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    truncated: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    unusable: str = ""

    @property
    def golds(self) -> tuple[str, ...]:
        """What a prediction is compared with: the references, else the answer."""
        return self.references or (self.answer,)


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face Hub: its path, its configuration, and our split names in its words.

    A split may be a sum of the Hub's (`test_r1+test_r2`). rows: gathers its rows into ours where they are not one to
    one (several references of an item in rows of their own); rows read from `data.dir` go through it too.
    revision: `refs/convert/parquet` where the data set itself is a loading script, which `datasets` no longer runs.
    """

    path: str
    config: str | None
    splits: Mapping[str, str]
    revision: str | None = None
    rows: Callable[[Iterable[Row]], Iterable[Row]] | None = None


@dataclass(frozen=True)
class Task:
    """What one task file defines.

    name: the file's name. version: raised whenever a prompt, an answer or a row changes meaning (it is hashed).
    to_example: (row, index of the row in its split, options) -> Example.
    metrics: what is reported, the headline metric first: the names that `score` returns, and names of the metrics of
      stage 3 that need a library, a model, a sandbox or the whole corpus (stage3_eval/metrics has the list).
    score: (prediction, example) -> metric name -> value in [0, 1], or None where the prediction has no answer
      that the metric can read (such a prediction counts as wrong and is counted apart as unparsable).
    source: a Hub data set, or a function from (split, options) to rows.
    """

    name: str
    version: int
    summary: str
    source: HubSource | Callable[[str, Any], Iterable[Row]]
    to_example: Callable[[Row, int, Any], Example]
    metrics: tuple[str, ...]
    score: Callable[[str, Example], Scores] | None = None
    options: type[BaseModel] = field(default=NoOptions)


def texts(value: Any) -> list[str]:
    """A row's list of texts. Raises ValueError for a text where a list is expected: its letters would pass for one."""
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"expected a list of texts, found {value!r:.60}")
    return list(value)


def task_names() -> list[str]:
    """The tasks there are: the modules of this folder that define `TASK`, read but not imported.

    The others are helpers, for several tasks to share.
    """
    modules = Path(__file__).parent.glob("[!_]*.py")
    return sorted(m.stem for m in modules if _DEFINES_TASK.search(m.read_text(encoding="utf-8")))


def get_task(name: str) -> Task:
    """The task called `name`. Raises RecipeError naming the nearest one if there is none."""
    if name not in task_names():
        raise RecipeError(unknown_name("task", name, task_names()))
    task = importlib.import_module(f"pipeline.tasks.{name}").TASK
    if not isinstance(task, Task) or task.name != name:
        raise RecipeError(f"pipeline/tasks/{name}.py must define TASK = Task(name={name!r}, ...)")
    return task
