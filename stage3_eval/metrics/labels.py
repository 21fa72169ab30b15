"""Classification by the likelihood of the labels: right where the model finds the gold label the likeliest of all.

Nothing is generated for it, so nothing is unparsable; the task's own `accuracy` reads what was generated, and the two
are reported apart. The log-likelihoods (of a label's tokens, end-of-sequence included, summed) come with a prediction.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.errors import RunError
from pipeline.sections import Metrics
from pipeline.tasks import Example
from stage3_eval.compare import Measured
from stage3_eval.predictions import Prediction

LIBRARIES: dict[str, str] = {}


def check(settings: Metrics) -> None:
    """Nothing is needed."""


def measure(name: str, examples: Sequence[Example], answers: Sequence[Prediction], settings: Metrics) -> Measured:
    """1 where the gold label has the largest log-likelihood, 0 elsewhere; a tie with another label is wrong.

    Raises RunError where a prediction carries no log-likelihoods, or not one for each label.
    """
    values = []
    for example, answer in zip(examples, answers, strict=True):
        found = answer.label_logprobs
        if found is None or len(found) != len(example.labels):
            raise RunError(
                f"metric {name}: the prediction for {example.id} has {len(found or ())} log-likelihoods, expected one "
                f"for each of {len(example.labels)} labels; run python -m stage3_eval without --rescore to compute them"
            )
        of_gold = found[example.labels.index(example.answer)]
        values.append(float(sum(other >= of_gold for other in found) == 1))
    return Measured(tuple(values))


def describe(name: str, settings: Metrics) -> dict[str, Any]:
    """The rule."""
    return {"score": "the gold label's log-likelihood, end-of-sequence included, is above every other label's"}
