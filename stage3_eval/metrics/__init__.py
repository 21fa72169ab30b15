"""Metrics that need a library, a model, a sandbox or the whole corpus. Called by `score`; METRICS.md tells how to use.

A task names its metrics (`pipeline.tasks.Task.metrics`); those that its own `score` does not return are found here.
Each module of this folder has

    LIBRARIES                                     what it imports beyond the base install, inside its functions
    check(settings)                               raise RunError where it could not work; cheap, imports no library
    measure(name, examples, answers, settings)    -> Measured, a value for each example
    describe(name, settings)                      -> how it was computed, for results.json
"""

import importlib
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from pipeline.errors import RunError, unknown_name
from pipeline.sections import Metrics

METRICS = MappingProxyType(
    {
        "rouge_l": "rouge",
        "bert_score": "bertscore",
        "coverage": "concepts",
        "coverage_all": "concepts",
        "bleu": "translation",
        "chrf": "translation",
        "passes": "programs",
        "parses": "programs",
        "label_likelihood": "labels",
    }
)


def metric_module(name: str) -> Any:
    """The module that computes a metric. Raises RunError naming the nearest one if there is none."""
    if name not in METRICS:
        raise RunError(unknown_name("metric", name, METRICS))
    return importlib.import_module(f"stage3_eval.metrics.{METRICS[name]}")


def check_available(names: Iterable[str], settings: Metrics) -> None:
    """Raise RunError where a metric could not be computed: called before anything is generated.

    names: metrics of the tasks; those that are not of this folder are left to the task's own `score`. Cheap: looks for
    libraries, folders and programs, and imports none.
    """
    for name in names:
        if name not in METRICS:
            continue
        module = metric_module(name)
        missing = [package for package, imported in module.LIBRARIES.items() if find_spec(imported) is None]
        if missing:
            raise RunError(
                f"metric {name}: {' and '.join(missing)} is not installed here; pip install 'logitbank[metrics]'"
            )
        module.check(settings)


def describe(settings: Metrics, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each metric is computed: libraries with their versions, and every choice that moves a number."""
    described = {}
    for name in names:
        if name in METRICS:
            module = metric_module(name)
            versions = {package: version(package) for package in module.LIBRARIES}
            described[name] = {**versions, **module.describe(name, settings)}
        else:
            described[name] = {"computed_by": "the task's own score"}
    return described
