"""Metrics by the field's libraries: against the libraries' own entry points, and against values worked out by hand."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import RunError
from pipeline.sections import Metrics
from pipeline.tasks import Example
from stage3_eval.compare import difference, estimate
from stage3_eval.metrics import METRICS, check_available, describe, metric_module
from stage3_eval.predictions import Prediction

DATA = os.environ.get("LOGITBANK_DATA")
SETTINGS = Metrics()


def examples(*golds, **fields):
    """An example for each tuple of golds."""
    return [Example(f"e{i}", "toy", "?", of[0], references=of, **fields) for i, of in enumerate(golds)]


def answers(*texts, **fields):
    return [Prediction(f"e{i}", "toy", "", text, 3, True, **fields) for i, text in enumerate(texts)]


def measure(name, golds, texts, settings=SETTINGS):
    return metric_module(name).measure(name, examples(*golds), answers(*texts), settings)


# -- the registry


def test_a_misspelt_metric_is_told_the_nearest():
    with pytest.raises(RunError, match=r"unknown metric 'rouge_1'\. Did you mean 'rouge_l'\?"):
        metric_module("rouge_1")


def test_every_metric_says_how_it_was_computed():
    names = [name for name in METRICS if name not in ("bert_score", "passes", "parses")]
    found = describe(SETTINGS, ["accuracy", *names])
    assert list(found) == ["accuracy", *names]
    assert found["accuracy"] == {"computed_by": "the task's own score"}
    assert found["rouge_l"]["stemmer"] is True
    assert describe(Metrics(rouge_stemmer=False), ["rouge_l"])["rouge_l"]["stemmer"] is False
    assert found["bleu"]["signature"].startswith("case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
    assert found["chrf"]["signature"].startswith("case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.")
    assert found["coverage"]["lemmas"] == "spacy.blank('en'), lookup, of lower-case words"
    assert set(found["coverage"]) >= {"spacy", "spacy-lookups-data"}
    json.dumps(found)


def test_a_missing_library_names_the_extra_before_anything_is_generated(monkeypatch):
    check_available(["accuracy", "rouge_l", "coverage", "bleu", "label_likelihood"], SETTINGS)
    monkeypatch.setitem(metric_module("rouge_l").LIBRARIES, "rouge-score", "a_library_that_is_not_there")
    with pytest.raises(RunError, match=r"metric rouge_l: rouge-score is not installed .*pip install 'logitbank\[metr"):
        check_available(["accuracy", "rouge_l"], SETTINGS)


# -- ROUGE-L


def test_rouge_l_by_hand_stemmed_and_not():
    golds, texts = [("the cats were running home",)], ["the cat was running"]
    stemmed = measure("rouge_l", golds, texts)  # the cat _ run: 3 of 4 and 3 of 5
    assert stemmed.values == (pytest.approx(2 * 3 / (4 + 5)),)
    plain = measure("rouge_l", golds, texts, Metrics(rouge_stemmer=False))  # the _ _ running: 2 of 4, 2 of 5
    assert plain.values == (pytest.approx(2 * 2 / (4 + 5)),)


def test_rouge_l_takes_the_best_gold_and_survives_nothing():
    found = measure("rouge_l", [("a b c", "x y"), ("a",), ("?",)], ["x y", "", "a"])
    assert found.values == (1.0, 0.0, 0.0)
    assert (found.unparsable, found.corpus) == (0, None)


def test_rouge_l_cannot_tell_accents():
    """Why it is no metric for Spanish: any letter beyond ASCII parts a word, and is forgotten."""
    assert measure("rouge_l", [("el año",)], ["el aéo"]).values == (1.0,)


# -- labels


def test_the_likeliest_label_must_be_the_gold_one():
    of = examples(("no",), ("no",), ("no",), labels=("yes", "no"))
    found = [(-3.0, -1.0), (-1.0, -3.0), (-2.0, -2.0)]
    predicted = [Prediction(f"e{i}", "toy", "", "?", 1, True, label_logprobs=pair) for i, pair in enumerate(found)]
    assert metric_module("label_likelihood").measure("label_likelihood", of, predicted, SETTINGS).values == (1, 0, 0)


@pytest.mark.parametrize("logprobs", [None, (-1.0,)])
def test_labels_without_likelihoods_are_an_error(logprobs):
    of = examples(("no",), labels=("yes", "no"))
    with pytest.raises(RunError, match=r"for e0 has [01] log-likelihoods, expected one for each of 2 labels; run"):
        metric_module("label_likelihood").measure(
            "label_likelihood", of, answers("no", label_logprobs=logprobs), SETTINGS
        )


# -- coverage


def coverage(concepts, text, settings=SETTINGS):
    of = [Example("e0", "toy", "?", "x", extra={"concepts": concepts})]
    return tuple(
        metric_module(name).measure(name, of, answers(text), settings).values[0]
        for name in ("coverage", "coverage_all")
    )


@pytest.mark.parametrize(
    ("concepts", "text", "share", "whole"),
    [
        (["dog", "run", "field"], "Two dogs were running across the fields.", 1, 1),
        (["dog", "run", "field"], "The dog sleeps.", 1 / 3, 0),
        (["dog", "run"], "Dogs! RUNNING", 1, 1),  # case at the start of a sentence, and punctuation that sticks
        (["stand", "throw"], "She stood and threw it.", 1, 1),
        (["mouse", "leaf"], "mice", 1 / 2, 0),
        (["dog"], "dog dog dog", 1, 1),
        (["dog", "cat"], "a hotdog catches", 0, 0),  # a part of a word is no word
        (["feed", "building"], "He feeds birds on buildings.", 1, 1),  # whose own lemmas are fee and build
        (["ice cream"], "Ice creams melt", 1, 1),
        (["dog"], "", 0, 0),
    ],
)
def test_coverage_by_hand(concepts, text, share, whole):
    assert coverage(concepts, text) == (pytest.approx(share), whole)


def test_a_trained_pipeline_by_path(tmp_path):
    """A blank one saved: what counts is that the folder is read, and said."""
    import spacy

    trained = spacy.blank("en")
    trained.add_pipe("lemmatizer", config={"mode": "lookup"})
    trained.initialize()
    trained.get_pipe("lemmatizer").lookups.get_table("lemma_lookup").set("blorps", "blorp")
    trained.meta["name"], trained.meta["version"] = "made", "0.1.2"
    trained.to_disk(tmp_path / "made")
    settings = Metrics(spacy_model=str(tmp_path / "made"))
    check_available(["coverage"], settings)
    assert coverage(["blorp"], "blorps", settings) == (1, 1)
    assert coverage(["blorp"], "blorps") == (0, 0)
    assert describe(settings, ["coverage"])["coverage"]["lemmas"] == "en_made 0.1.2"


def test_a_trained_pipeline_that_is_not_there_or_has_no_lemmas(tmp_path):
    import spacy

    with pytest.raises(RunError, match=r"spacy_model=en_nothing: neither a folder nor an installed"):
        check_available(["coverage"], Metrics(spacy_model="en_nothing"))
    with pytest.raises(RunError, match=r"spacy_model=json: expected a folder written by spaCy's to_disk"):
        check_available(["coverage"], Metrics(spacy_model="json"))
    spacy.blank("en").to_disk(tmp_path / "bare")
    with pytest.raises(RunError, match="it has no lemmatizer, nor any other part"):
        check_available(["coverage"], Metrics(spacy_model=str(tmp_path / "bare")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"expected a folder written by spaCy's to_disk"):
        check_available(["coverage"], Metrics(spacy_model=str(tmp_path / "empty")))
    (tmp_path / "empty" / "meta.json").write_text('{"pipeline": ["lemmatizer"]}')
    check_available(["coverage"], Metrics(spacy_model=str(tmp_path / "empty")))  # all that is cheap to look at
    with pytest.raises(RunError, match="cannot be loaded"):
        coverage(["dog"], "dogs", Metrics(spacy_model=str(tmp_path / "empty")))


@pytest.mark.skipif(DATA is None, reason="LOGITBANK_DATA names no folder of real rows")
def test_real_references_cover_their_concepts():
    """People wrote them to: of 7,739 concepts in real references the lemmatizer misses 18."""
    lines = (Path(DATA) / "common_gen" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    pairs = [(row["concepts"], reference) for row in rows for reference in row["references"]]
    of = [Example("e", "toy", "?", "x", extra={"concepts": concepts}) for concepts, _ in pairs]
    found = metric_module("coverage").measure("coverage", of, answers(*(text for _, text in pairs)), SETTINGS)
    missed = sum(round((1 - value) * len(concepts)) for value, (concepts, _) in zip(found.values, pairs, strict=True))
    assert sum(len(concepts) for concepts, _ in pairs) == 7739
    assert missed == 18


# -- BLEU and chrF

WORDS = (
    *("el", "la", "casa", "perro", "niño", "come", "ve", "grande", "rojo", "muy", "en", "de", "con", "un"),
    *("árbol", "ayer", "mañana", "está", "camina", "libro"),
)


def corpus(n, noise, seed):
    """Golds of 5 to 12 words, a second one for every third, and two systems; the second has more words wrong."""
    rng = random.Random(seed)
    golds, systems = [], ([], [])
    for i in range(n):
        gold = [rng.choice(WORDS) for _ in range(rng.randint(5, 12))]
        golds.append((" ".join(gold) + ".", *([" ".join(gold[1:]) + "."] if i % 3 == 0 else [])))
        for system, share in zip(systems, noise, strict=True):
            system.append(" ".join(rng.choice(WORDS) if rng.random() < share else word for word in gold) + ".")
    return golds, *systems


def streams(golds):
    return [[of[i] if i < len(of) else None for of in golds] for i in range(max(map(len, golds)))]


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_a_corpus_score_is_sacrebleus(name):
    from sacrebleu.metrics import BLEU, CHRF

    golds, system, _ = corpus(60, (0.2, 0.3), 1)
    reference = {"bleu": BLEU, "chrf": CHRF}[name]()
    expected = reference.corpus_score(system, streams(golds)).score / 100
    found = measure(name, golds, system)
    assert estimate(found).mean == pytest.approx(expected, abs=1e-12)
    assert 0.3 < expected < 0.9
    assert np.mean(found.values) != pytest.approx(expected, abs=1e-4)  # no mean of sentences
    assert found.note == str(reference.get_signature())
    assert "nrefs:var" in found.note


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_perfect_empty_and_hopeless_translations(name):
    golds = [("un perro muy grande.",), ("ayer.",)]
    assert estimate(measure(name, golds, ["un perro muy grande.", "ayer."])).mean == pytest.approx(1)
    assert measure(name, golds, ["un perro muy grande.", "ayer."]).values == (pytest.approx(1), pytest.approx(1))
    assert estimate(measure(name, golds, ["", ""])).mean == 0
    assert estimate(measure(name, golds, ["zzz", ""])).mean == 0


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_errors_and_p_values_agree_with_sacrebleus(name):
    """Its bootstrap counts one tail, so its p is half of ours; its randomisation test counts both, as ours does."""
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    golds, better, worse = corpus(150, (0.25, 0.3), 7)
    ours = difference(measure(name, golds, better), measure(name, golds, worse))
    assert ours.test == "paired bootstrap of the corpus"

    def theirs(kind):
        metrics = {name: {"bleu": BLEU, "chrf": CHRF}[name]()}
        test = PairedTest([("worse", worse), ("better", better)], metrics, streams(golds), kind, n_samples=2000)
        _, found = test()
        return next(value for key, value in found.items() if key != "System")

    by_bootstrap, by_randomisation = theirs("bs"), theirs("ar")
    assert ours.mean == pytest.approx((by_bootstrap[1].score - by_bootstrap[0].score) / 100)
    assert 0.02 < ours.p < 0.2  # a case that either could get wrong
    assert ours.p == pytest.approx(2 * by_bootstrap[1].p_value, rel=0.25)
    assert ours.p == pytest.approx(by_randomisation[1].p_value, rel=0.25)
    mine = estimate(measure(name, golds, better))
    assert (mine.high - mine.low) / 2 == pytest.approx(by_bootstrap[1].ci / 100, rel=0.1)
    assert mine.standard_error == pytest.approx(by_bootstrap[1].ci / 100 / 1.96, rel=0.1)
