"""Coverage of CommonGen (Lin et al. 2020, arXiv 1911.03705): are the concepts in the sentence, whatever their form?

`coverage` is the share of an example's concepts that the answer has, `coverage_all` is 1 where it has all. The answer
has a concept if the concept as written (they are lemmas already), or its lemma, is among the answer's lemmas.

Lemmas are spaCy's: by default of `spacy.blank("en")` with the lookup tables of spacy-lookups-data, which need no
trained model and read one lower-case word at a time; with eval.metrics.spacy_model, of a trained pipeline, which looks
at the sentence. The concepts go through the same lemmatizer.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.sections import Metrics
from pipeline.tasks import Example
from stage3_eval.compare import Measured
from stage3_eval.predictions import Prediction

LIBRARIES = {"spacy": "spacy", "spacy-lookups-data": "spacy_lookups_data"}
_ELSE = "name another, or leave the key out for blank English with lookup lemmas"
_UNUSED = ("parser", "senter", "ner")  # parts of a trained pipeline that no lemma comes from


def check(settings: Metrics) -> None:
    """Raise RunError where the trained pipeline is neither a folder nor an installed package, or has no lemmatizer."""
    name = settings.spacy_model
    if name is None:
        return
    package = find_spec(name) if name.isidentifier() else None
    folder = Path(package.origin).parent if package and package.origin and not Path(name).is_dir() else Path(name)
    if not folder.is_dir():
        raise RunError(f"eval.metrics.spacy_model={name}: neither a folder nor an installed spaCy pipeline; {_ELSE}")
    try:
        parts = list(json.loads((folder / "meta.json").read_text(encoding="utf-8"))["pipeline"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"eval.metrics.spacy_model={name}: expected a folder written by spaCy's to_disk, whose meta.json names the "
            f"parts of its pipeline: {error}; {_ELSE}"
        ) from None
    _check_lemmatizer(name, parts)


def measure(name: str, examples: Sequence[Example], answers: Sequence[Prediction], settings: Metrics) -> Measured:
    """The share of concepts in each answer, or whether all are there."""
    values = []
    for example, answer in zip(examples, answers, strict=True):
        lemmas, concepts = _lemmas(answer.prediction, settings.spacy_model), example.extra["concepts"]
        found = [c.lower() in lemmas or _lemmas(c, settings.spacy_model) <= lemmas for c in concepts]
        values.append(float(all(found)) if name == "coverage_all" else sum(found) / len(found))
    return Measured(tuple(values))


def describe(name: str, settings: Metrics) -> dict[str, Any]:
    """What lemmatises."""
    if settings.spacy_model is None:
        return {"lemmas": "spacy.blank('en'), lookup, of lower-case words"}
    meta = _pipeline(settings.spacy_model).meta
    return {"lemmas": f"{meta['lang']}_{meta['name']} {meta['version']}", "spacy_model": settings.spacy_model}


@lru_cache(maxsize=100_000)
def _lemmas(text: str, model: str | None) -> frozenset[str]:
    """The lemmas of a text, in lower case."""
    return frozenset(token.lemma_.lower() for token in _pipeline(model)(text if model else text.lower()))


@lru_cache(maxsize=1)
def _pipeline(model: str | None) -> Any:
    """The lemmatizer, loaded once. Raises RunError where a trained one cannot be read, or has none."""
    import spacy

    if model is None:
        blank = spacy.blank("en")
        blank.add_pipe("lemmatizer", config={"mode": "lookup"})
        blank.initialize()
        return blank
    try:
        trained = spacy.load(model, exclude=_UNUSED)
    except (OSError, ValueError) as error:
        raise RunError(f"eval.metrics.spacy_model={model}: it cannot be loaded: {str(error).splitlines()[0]}") from None
    _check_lemmatizer(model, trained.pipe_names)
    return trained


def _check_lemmatizer(model: str, parts: Sequence[str]) -> None:
    if not any("lemmatizer" in part for part in parts):
        found = f"only {', '.join(parts)}" if parts else "nor any other part"
        raise RunError(f"eval.metrics.spacy_model={model}: it has no lemmatizer, {found}; {_ELSE}")
