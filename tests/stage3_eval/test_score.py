"""From predictions to values: unparsable counts as wrong and is counted, missing is an error."""

import dataclasses

import pytest

from pipeline.errors import RunError
from pipeline.sections import Metrics
from pipeline.tasks import Example, get_task
from stage3_eval.compare import Measured
from stage3_eval.predictions import Prediction
from stage3_eval.score import score

EXAMPLES = [Example(f"test/{i}", "gsm8k", "?", f"so it is\n#### {i}") for i in range(4)]


def predicted(*texts, finished=True):
    return {f"test/{i}": Prediction(f"test/{i}", "gsm8k", "", text, 7, finished) for i, text in enumerate(texts)}


def test_values_follow_the_examples():
    scores = score(EXAMPLES, predicted("#### 0", "#### 9", "it is 2", "no idea"), "here")
    assert scores.ids == ("test/0", "test/1", "test/2", "test/3")
    assert scores.measured == {
        "strict": Measured((1.0, 0.0, 0.0, 0.0), unparsable=2),
        "flexible": Measured((1.0, 0.0, 1.0, 0.0), unparsable=1),
    }
    assert (scores.n, scores.unfinished, scores.tokens) == (4, 0, 28)


def test_unfinished_answers_are_counted_and_still_scored():
    scores = score(EXAMPLES[:1], predicted("#### 0", finished=False), "here")
    assert scores.unfinished == 1
    assert scores.measured["strict"].values == (1.0,)


def test_a_missing_prediction_is_an_error_not_a_wrong_answer():
    with pytest.raises(RunError, match=r"toy/sft@2: 1 of 4 predictions are missing \(test/3"):
        score(EXAMPLES, predicted("#### 0", "#### 1", "#### 2"), "toy/sft@2")


def test_a_tasks_own_metrics_and_those_of_the_libraries_in_the_tasks_order():
    """BoolQ's generated label and its likelihoods; CommonGen's are the libraries' alone."""
    example = Example("test/0", "boolq", "?", "yes", labels=("yes", "no"))
    found = {"test/0": Prediction("test/0", "boolq", "", "No.", 2, True, label_logprobs=(-1.0, -2.0))}
    measured = score([example], found, "here").measured
    assert list(measured) == ["accuracy", "label_likelihood"]
    assert (measured["accuracy"].values, measured["label_likelihood"].values) == ((0.0,), (1.0,))
    covered = Example("test/0", "common_gen", "?", "Dogs run.", extra={"concepts": ["dog", "run"]})
    found = {"test/0": Prediction("test/0", "common_gen", "", "A dog is running.", 2, True)}
    measured = score([covered], found, "here").measured
    assert list(measured) == ["rouge_l", "coverage", "coverage_all"]
    assert measured["coverage_all"].values == (1.0,)
    unstemmed = score([covered], found, "here", Metrics(rouge_stemmer=False)).measured
    assert unstemmed["rouge_l"].values < measured["rouge_l"].values


def test_a_prompt_that_was_not_asked_is_not_unparsable_too():
    """Each is counted once: an answer that cannot be read, and a prompt that had none."""
    examples = [Example(f"test/{i}", "boolq", "?", "yes", labels=("yes", "no")) for i in range(3)]
    found = {
        "test/0": Prediction("test/0", "boolq", "", "perhaps", 2, True, label_logprobs=(-2.0, -1.0)),
        "test/1": Prediction.unanswered(examples[1], ""),
        "test/2": Prediction("test/2", "boolq", "", "yes", 2, True, label_logprobs=(-1.0, -2.0)),
    }
    scores = score(examples, found, "here")
    assert (scores.too_long, scores.measured["accuracy"].unparsable) == (1, 1)
    assert scores.measured["accuracy"].values == scores.measured["label_likelihood"].values == (0.0, 0.0, 1.0)


def test_one_metric_alone():
    assert list(score(EXAMPLES[:1], predicted("#### 0"), "here", None, ["flexible"]).measured) == ["flexible"]


def test_a_metric_that_nobody_has_is_told_the_nearest(monkeypatch):
    misspelt = dataclasses.replace(get_task("gsm8k"), metrics=("strikt",))
    monkeypatch.setattr("pipeline.tasks.gsm8k.TASK", misspelt)
    with pytest.raises(RunError, match=r"task gsm8k: unknown metric 'strikt'\. Did you mean 'strict'\?"):
        score(EXAMPLES[:1], predicted("#### 0"), "here")
