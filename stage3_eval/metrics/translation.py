"""BLEU (Papineni et al. 2002) and chrF (Popovic 2015) by sacrebleu, over the corpus, with its own tokenizers.

A corpus score is no mean over sentences: it is made of counts summed over them. So each example's counts are kept, and
errors and p-values come from our paired bootstrap over them, the same as for every other metric; the scores are
sacrebleu's. The values by example are scores of the sentence alone; they only tell on how many one arm is better.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.sections import Metrics
from pipeline.tasks import Example
from stage3_eval.compare import Corpus, Measured
from stage3_eval.predictions import Prediction

LIBRARIES = {"sacrebleu": "sacrebleu"}


def check(settings: Metrics) -> None:
    """Nothing but the library is needed."""


def measure(name: str, examples: Sequence[Example], answers: Sequence[Prediction], settings: Metrics) -> Measured:
    """The corpus score in [0, 1], its statistics by example, and sacrebleu's signature as the note."""
    metric, of_sentence = _scorers(name)
    # The package offers a corpus's statistics to its own significance tests only, by these two methods.
    statistics = metric._extract_corpus_statistics([answer.prediction for answer in answers], _streams(examples))

    def score(by: Any, row: Sequence[float] | npt.NDArray[np.float64]) -> float:
        return min(1.0, float(by._compute_score_from_stats([int(count) for count in row]).score) / 100)

    return Measured(
        tuple(score(of_sentence, row) for row in statistics),
        corpus=Corpus(np.asarray(statistics, dtype=np.float64), lambda row: score(metric, row)),
        note=str(metric.get_signature()),
    )


def describe(name: str, settings: Metrics) -> dict[str, Any]:
    """The signature, less the number of references: that is known of a corpus, and stands in each result's note."""
    metric, _ = _scorers(name)
    metric.num_refs = 1
    signature = metric.get_signature()
    signature.update("nrefs", None)
    return {"score": "over the corpus", "signature": str(signature), "errors": "paired bootstrap over examples"}


def _scorers(name: str) -> tuple[Any, Any]:
    """The metric over the corpus, and over one sentence (BLEU: only the orders that it is long enough for)."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if name == "chrf":
        return CHRF(), CHRF()
    return BLEU(), BLEU(effective_order=True)


def _streams(examples: Sequence[Example]) -> list[list[str | None]]:
    """The golds as sacrebleu wants them: the first of every example, the second, ...; None where there are fewer."""
    return [list(stream) for stream in zip_longest(*(example.golds for example in examples))]
