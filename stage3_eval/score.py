"""From predictions to numbers: pure functions, no model, no file. Called by `evaluate` and `results`.

A prediction is scored by its task. None is an answer the metric cannot read: it counts as wrong and is counted apart
as unparsable. A prediction that is not there is an error, never a wrong answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import RunError
from pipeline.tasks import Example, get_task
from stage3_eval.predictions import Prediction


@dataclass(frozen=True)
class Scores:
    """One condition on some examples of one task.

    ids: the examples. values: metric -> a value for each of them, in [0, 1], unparsable ones 0. unparsable: metric ->
    how many had no answer to read. unfinished: how many were cut at eval.max_new_tokens. tokens: written in all.
    """

    ids: tuple[str, ...]
    values: Mapping[str, tuple[float, ...]]
    unparsable: Mapping[str, int]
    unfinished: int
    tokens: int

    @property
    def n(self) -> int:
        return len(self.ids)


def score(examples: Sequence[Example], predictions: Mapping[str, Prediction], where: str) -> Scores:
    """Score the predictions (id -> prediction) of examples that are all of one task.

    where: names the condition in errors. Raises RunError where a prediction is missing.
    """
    task = get_task(examples[0].task)
    missing = [example.id for example in examples if example.id not in predictions]
    if missing:
        raise RunError(
            f"{where}: {len(missing)} of {len(examples)} predictions are missing ({', '.join(missing[:3])}, ...); "
            "run python -m stage3_eval without --rescore to generate them"
        )
    assert task.score is not None
    rows = [task.score(predictions[example.id].prediction, example) for example in examples]
    chosen = [predictions[example.id] for example in examples]
    return Scores(
        ids=tuple(example.id for example in examples),
        values={metric: tuple(float(row[metric] or 0.0) for row in rows) for metric in task.metrics},
        unparsable={metric: sum(row[metric] is None for row in rows) for metric in task.metrics},
        unfinished=sum(not prediction.finished for prediction in chosen),
        tokens=sum(prediction.tokens for prediction in chosen),
    )


def mean(values: Sequence[float]) -> float:
    """The mean of some values."""
    return sum(values) / len(values)
