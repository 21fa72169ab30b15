"""The report of a run: `<run>/report/report.html`, `results.json`, `table.md` and pictures. Called by `__main__`.

Of one task `table.md` has everything; of a mixture it has the summary, and `details.md` beside it every metric of every
task. Made from predictions alone: no model of the run. Rewritten whole each time.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cache_schema.atomic import publish, remove_temporaries
from pipeline.errors import RunError
from pipeline.recipe import Recipe
from pipeline.run_dir import RunDir
from stage3_eval.blocks import Block
from stage3_eval.evaluate import Evaluated
from stage3_eval.report import html
from stage3_eval.report.html.collect import collect
from stage3_eval.report.results import results
from stage3_eval.report.summary import summary_of
from stage3_eval.report.tables import tables_of

RESULTS, TABLE, DETAILS = "results.json", "table.md", "details.md"
NOTHING_INSIDE: dict[str, Any] = {
    "cache": None,
    "students": {},
    "missing": {"token viewer": "the run was not looked into"},
}


def write_report(
    recipe: Recipe,
    blocks: Sequence[Block],
    evaluated: Sequence[Evaluated],
    command: Sequence[str],
    inside: Mapping[str, Any] | None = None,
) -> tuple[str, list[Path]]:
    """Write everything; the table as text, and the paths of all files, the pictures last. evaluated: students and
    references; one of which nothing could be answered is listed as missing, and in no table. inside: what
    `look_inside` found.

    Raises RunError where a file stands in the folder's place or the disk refuses.
    """
    from stage3_eval.report import pictures

    run_dir, models = RunDir.of(recipe), [model for model in evaluated if model.files]
    found = results(recipe, blocks, models, provenance(recipe, models, command))
    mixture = len(recipe.data.tasks) > 1
    texts = {TABLE: summary_of(found), DETAILS: tables_of(found)} if mixture else {TABLE: tables_of(found)}
    found["missing"] = {f"{model.name}/{name}": why for model in evaluated for name, why in model.missing.items()}
    if found["missing"]:
        lines = [f"- {name}: {why}" for name, why in found["missing"].items()]
        texts = {
            file: "\n".join([text, "**Missing, since it could not be generated:**", "", *lines, ""])
            for file, text in texts.items()
        }
    losses = {
        model.name: {run.name: read_losses(run_dir.arm(model.name, run.name).metrics) for run in recipe.arm_runs}
        for model in models
        if model.name in recipe.students
    }
    shown = html.page(collect(recipe, blocks, models, found, losses, inside or NOTHING_INSIDE))
    folder = run_dir.report
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: found a file, expected a folder; move it away, or set run_dir=<folder>")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
        for old in [*folder.glob("*.png"), folder / DETAILS]:
            old.unlink(missing_ok=True)
        drawn = pictures.draw(found, losses, folder, mixture)
        for name, text in texts.items():
            publish(folder / name, text.encode())
        numbers = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        publish(folder / RESULTS, numbers.encode())
        publish(folder / html.NAME, shown)
    except OSError as error:
        raise RunError(
            f"{folder}: the report cannot be written: {error.strerror or error}; make room or check its permissions, "
            "and run the same command: predictions are kept"
        ) from None
    return texts[TABLE], [*(folder / name for name in (html.NAME, RESULTS, *texts)), *drawn]


def provenance(recipe: Recipe, models: Sequence[Evaluated], command: Sequence[str]) -> dict[str, Any]:
    """What the numbers come from: the recipe, the cache, the arms, the prediction files, and the command."""
    trained = {model.name: {run.name: dict(run.trained_with) for run in model.runs} for model in models if model.runs}
    caches = sorted({of["cache"] for runs in trained.values() for of in runs.values() if "cache" in of})
    return {
        "command": ["python", "-m", *command],
        "recipe": recipe.model_dump(mode="json"),
        "cache_fingerprint": caches[0] if len(caches) == 1 else caches or None,
        "trained_with": trained,
        "predictions": {
            model.name: {
                f"{condition} on {block}": {"file": file.path.name, **file.provenance}
                for (condition, block), file in model.files.items()
            }
            for model in models
        },
        "scored_by": {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "scipy")}},
    }


def read_losses(metrics: Path) -> dict[int, float]:
    """step -> cross-entropy from an arm's metrics.jsonl; of a step that was run twice, the last.

    A last line that a kill cut off is left out. Raises RunError for any other line that cannot be read.
    """
    if not metrics.is_file():
        return {}
    losses: dict[int, float] = {}
    lines = metrics.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row.get("ce") is not None:
                losses[int(row["step"])] = float(row["ce"])
        except (ValueError, KeyError, AttributeError) as error:
            if number == len(lines):
                break
            raise RunError(f"{metrics}, line {number}: not a step's metrics: {error}; remove the line") from None
    return dict(sorted(losses.items()))
