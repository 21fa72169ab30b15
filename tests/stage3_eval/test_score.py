"""From predictions to values: unparsable counts as wrong and is counted, missing is an error."""

import pytest

from pipeline.errors import RunError
from pipeline.tasks import Example
from stage3_eval.predictions import Prediction
from stage3_eval.score import score

EXAMPLES = [Example(f"test/{i}", "gsm8k", "?", f"so it is\n#### {i}") for i in range(4)]


def predicted(*texts, finished=True):
    return {f"test/{i}": Prediction(f"test/{i}", "gsm8k", "", text, 7, finished) for i, text in enumerate(texts)}


def test_values_follow_the_examples():
    scores = score(EXAMPLES, predicted("#### 0", "#### 9", "it is 2", "no idea"), "here")
    assert scores.ids == ("test/0", "test/1", "test/2", "test/3")
    assert scores.values["strict"] == (1.0, 0.0, 0.0, 0.0)
    assert scores.values["flexible"] == (1.0, 0.0, 1.0, 0.0)
    assert scores.unparsable == {"strict": 2, "flexible": 1}
    assert (scores.n, scores.unfinished, scores.tokens) == (4, 0, 28)


def test_unfinished_answers_are_counted_and_still_scored():
    scores = score(EXAMPLES[:1], predicted("#### 0", finished=False), "here")
    assert scores.unfinished == 1
    assert scores.values["strict"] == (1.0,)


def test_a_missing_prediction_is_an_error_not_a_wrong_answer():
    with pytest.raises(RunError, match=r"toy/sft@2: 1 of 4 predictions are missing \(test/3"):
        score(EXAMPLES, predicted("#### 0", "#### 1", "#### 2"), "toy/sft@2")
