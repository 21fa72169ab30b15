"""ROUGE-L (Lin 2004) by the package rouge-score: F-measure of the longest common subsequence of words.

Of several references the best counts. Its tokenizer keeps ASCII letters and digits only, so an accented word falls
apart: it is no metric for Spanish. Stemming (Porter's) moves scores, so it is a choice of the recipe.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.sections import Metrics
from pipeline.tasks import Example
from stage3_eval.compare import Measured
from stage3_eval.predictions import Prediction

LIBRARIES = {"rouge-score": "rouge_score"}


def check(settings: Metrics) -> None:
    """Nothing but the library is needed."""


def measure(name: str, examples: Sequence[Example], answers: Sequence[Prediction], settings: Metrics) -> Measured:
    """F-measure of each answer against its best gold."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=settings.rouge_stemmer)
    return Measured(
        tuple(
            max(scorer.score(gold, answer.prediction)["rougeL"].fmeasure for gold in example.golds)
            for example, answer in zip(examples, answers, strict=True)
        )
    )


def describe(name: str, settings: Metrics) -> dict[str, Any]:
    """The stemmer, and what is compared."""
    return {"score": "rougeL F-measure, best over references", "stemmer": settings.rouge_stemmer}
