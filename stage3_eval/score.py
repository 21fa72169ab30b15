"""From predictions to numbers: no file is written, no model of the run is loaded. Called by `evaluate` and `report`.

A prediction is scored by its task, by the metrics of `stage3_eval.metrics`, or by both. An answer that a metric cannot
read counts as wrong and is counted apart as unparsable; a prompt that was too long to be asked has no answer, and is
counted as that alone. A prediction that is not there is an error, never a wrong answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.errors import RunError, unknown_name
from pipeline.sections import Metrics
from pipeline.tasks import Example, Task, get_task
from stage3_eval.compare import Measured
from stage3_eval.metrics import METRICS, metric_module
from stage3_eval.predictions import Prediction


@dataclass(frozen=True)
class Scores:
    """One condition on some examples of one task.

    ids: the examples. measured: metric -> its values for them, in the order of the task's metrics. unfinished: how many
    answers were cut at eval.max_new_tokens. tokens: written in all. too_long: how many were not asked, since their
    prompt leaves no room for an answer; they count as wrong, whatever a metric makes of an empty text.
    """

    ids: tuple[str, ...]
    measured: Mapping[str, Measured]
    unfinished: int
    tokens: int
    too_long: int = 0

    @property
    def n(self) -> int:
        return len(self.ids)


def score(
    examples: Sequence[Example],
    predictions: Mapping[str, Prediction],
    where: str,
    settings: Metrics | None = None,
    metrics: Sequence[str] | None = None,
) -> Scores:
    """Score the predictions (id -> prediction) of examples that are all of one task.

    where: names the condition in errors. settings: the recipe's eval.metrics. metrics: None for all of the task's.
    Raises RunError where a prediction is missing, or a metric cannot be computed.
    """
    missing = [example.id for example in examples if example.id not in predictions]
    if missing:
        raise RunError(
            f"{where}: {len(missing)} of {len(examples)} predictions are missing ({', '.join(missing[:3])}, ...); "
            "run python -m stage3_eval without --rescore to generate them"
        )
    chosen = [predictions[example.id] for example in examples]
    task = get_task(examples[0].task)
    measured = _measured(task, metrics or task.metrics, examples, chosen, settings or Metrics())
    too_long = sum(prediction.too_long for prediction in chosen)
    if too_long:
        measured = {metric: _wrong_where_too_long(found, chosen) for metric, found in measured.items()}
    return Scores(
        ids=tuple(example.id for example in examples),
        measured=measured,
        unfinished=sum(not prediction.finished for prediction in chosen),
        tokens=sum(prediction.tokens for prediction in chosen),
        too_long=too_long,
    )


def _measured(
    task: Task, metrics: Sequence[str], examples: Sequence[Example], answers: Sequence[Prediction], settings: Metrics
) -> dict[str, Measured]:
    """These metrics in their order: those of `stage3_eval.metrics`, the others by the task's own score."""
    pairs = zip(answers, examples, strict=True)
    rows = [task.score(answer.prediction, example) for answer, example in pairs] if task.score else []
    measured = {}
    for name in metrics:
        if name in METRICS:
            measured[name] = metric_module(name).measure(name, examples, answers, settings)
        elif rows and name in rows[0]:
            values = [row[name] for row in rows]
            unread = sum(v is None and not answer.too_long for v, answer in zip(values, answers, strict=True))
            measured[name] = Measured(tuple(float(v or 0.0) for v in values), unread)
        else:
            raise RunError(f"task {task.name}: {unknown_name('metric', name, [*METRICS, *(rows[0] if rows else ())])}")
    return measured


def _wrong_where_too_long(found: Measured, answers: Sequence[Prediction]) -> Measured:
    """Zero for what was not asked. A corpus score keeps the empty answers, which only lower it."""
    pairs = zip(found.values, answers, strict=True)
    return replace(found, values=tuple(0.0 if answer.too_long else value for value, answer in pairs))


def mean(values: Sequence[float]) -> float:
    """The mean of some values."""
    return sum(values) / len(values)
