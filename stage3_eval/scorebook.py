"""Scores of what was answered, each computed once. Called by `report.results`, which asks for them again and again."""

from collections.abc import Sequence

from pipeline.sections import Metrics
from pipeline.tasks import Example
from stage3_eval.evaluate import Evaluated
from stage3_eval.score import Scores, score


class ScoreBook:
    """(model, condition, block, examples of one task) -> Scores. settings: the recipe's eval.metrics."""

    def __init__(self, settings: Metrics) -> None:
        self._settings = settings
        self._scores: dict[tuple[str, str, str, str, int], Scores] = {}

    def of(self, model: Evaluated, condition: str, block: str, examples: Sequence[Example]) -> Scores:
        """The scores of some examples of one task of a block: all of them, or the curve's.

        Raises RunError where a prediction is missing.
        """
        key = (model.name, condition, block, examples[0].task, len(examples))
        if key not in self._scores:
            answers = model.answers(condition, block)
            self._scores[key] = score(examples, answers, f"{model.name}/{condition} on {block}", self._settings)
        return self._scores[key]
