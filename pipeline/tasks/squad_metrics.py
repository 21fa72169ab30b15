"""F1 and exact match of short answers, as the official SQuAD 1.1 script computes them (Rajpurkar et al. 2016,
arXiv 1606.05250).

Called by `squad` and by every task that is scored in its manner. Before texts are compared they are put in lower case,
ASCII punctuation is taken out, then the words `a`, `an` and `the`, and what white space is left separates words. Of
several acceptable answers the best counts, for each metric on its own. One trap is the script's and is kept: where
nothing is left of an acceptable answer (`A`), even the same answer matches exactly and has an F1 of 0.
"""

import re
import string
from collections import Counter

from pipeline.tasks import Example, Scores

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def answer_words(text: str) -> list[str]:
    """What is compared of an answer."""
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def f1(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words, each counted as often as it occurs."""
    found, expected = Counter(answer_words(prediction)), Counter(answer_words(gold))
    common = (found & expected).total()
    return 2 * common / (found.total() + expected.total()) if common else 0.0


def score_answer(prediction: str, example: Example) -> Scores:
    """`f1` and `exact_match`, each the best over the example's golds; an empty prediction is wrong, not unparsable."""
    words = answer_words(prediction)
    return {
        "f1": max(f1(prediction, gold) for gold in example.golds),
        "exact_match": float(any(words == answer_words(gold) for gold in example.golds)),
    }
