"""The report of a run: `<run>/report/results.json`, `table.md` and pictures. Called by `__main__`.

Made from predictions alone: no model. Rewritten whole each time.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.recipe import Recipe
from pipeline.run_dir import RunDir
from stage3_eval.evaluate import Evaluated
from stage3_eval.results import arm_provenance, results

RESULTS, TABLE = "results.json", "table.md"


def write_report(recipe: Recipe, students: Sequence[Evaluated], command: Sequence[str]) -> tuple[str, list[Path]]:
    """Write everything; the table as text, and the paths of the pictures.

    Raises RunError where a file stands in the folder's place or the disk refuses.
    """
    from stage3_eval import pictures

    run_dir = RunDir.of(recipe)
    found = results(recipe, students, provenance(recipe, students, command))
    table = table_of(found)
    losses = {
        s.student: {arm: read_losses(run_dir.arm(s.student, arm).metrics) for arm in recipe.arms} for s in students
    }
    folder = run_dir.report
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: found a file, expected a folder; move it away, or set run_dir=<folder>")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
        drawn = pictures.draw(found, losses, folder)
        _replace(folder / TABLE, table)
        _replace(folder / RESULTS, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(
            f"{folder}: the report cannot be written: {error.strerror or error}; make room or check its permissions, "
            "and run the same command: predictions are kept"
        ) from None
    return table, drawn


def provenance(recipe: Recipe, students: Sequence[Evaluated], command: Sequence[str]) -> dict[str, Any]:
    """What the numbers come from: the recipe, the cache, the arms, the prediction files, and the command."""
    arms = {s.student: arm_provenance(s.arms) for s in students}
    caches = sorted({trained["cache"] for of in arms.values() for trained in of.values() if "cache" in trained})
    return {
        "command": ["python", "-m", *command],
        "recipe": recipe.model_dump(mode="json"),
        "cache_fingerprint": caches[0] if len(caches) == 1 else caches or None,
        "trained_with": arms,
        "predictions": {
            s.student: {
                f"{condition} on {split}": {"file": file.path.name, **file.provenance}
                for (condition, split), file in s.files.items()
            }
            for s in students
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


def table_of(found: Mapping[str, Any]) -> str:
    """`table.md`: a table a metric, the checkpoints, and the best on the split, labelled as what it is."""
    blocks = [f"# Results of `{found['recipe']}`"]
    for student, of_student in found["students"].items():
        for split, tasks in of_student["splits"].items():
            for task, metrics in tasks.items():
                blocks.append(f"## Student `{student}`, task `{task}`, {split} split")
                for metric, cells in metrics.items():
                    blocks += [f"### {metric}", _main_table(cells, found["reference"])]
                    if any(cells["curve"].values()):
                        blocks += [_curve_title(cells), _curve_table(cells, found["reference"])]
                        blocks.append(_best_line(cells, split))
        if of_student["held_out_accuracy"]:
            blocks += [
                f"### Choice of `{student}`'s checkpoints, on held-out training rows",
                _held_out_table(of_student["held_out_accuracy"]),
            ]
    blocks.append(_notes(found))
    return "\n\n".join(blocks) + "\n"


def _main_table(cells: Mapping[str, Any], reference: str | None) -> str:
    head = ["condition", "checkpoint", "n", "accuracy", "95 % interval"]
    head += [f"difference to {reference}", "p"] if reference else []
    rows = []
    for name, cell in cells["conditions"].items():
        row = [name, str(cell["checkpoint"] or "none"), f"{cell['n']:,}", _percent(cell["accuracy"])]
        row.append(_interval(cell["interval"]))
        if reference:
            row += [*_difference(cell["difference"]), _p(cell["difference"], "p")]
        rows.append([*row, str(cell["unparsable"]), str(cell["unfinished"])])
    return _markdown([*head, "unparsable", "unfinished"], rows)


def _curve_title(cells: Mapping[str, Any]) -> str:
    n = next(row["n"] for rows in cells["curve"].values() for row in rows)
    whole = next(iter(cells["conditions"].values()))["n"]
    return f"Checkpoints, on {'all' if n == whole else 'the first'} {n:,} examples:"


def _curve_table(cells: Mapping[str, Any], reference: str | None) -> str:
    curve = cells["curve"]
    others = [arm for arm in curve if arm != reference and reference in curve]
    head = ["step", *curve]
    for arm in others:
        head += [f"{arm} - {reference}", "p (Holm)"]
    by_step = {arm: {row["step"]: row for row in rows} for arm, rows in curve.items()}
    rows = []
    for step in sorted({step for of in by_step.values() for step in of}):
        row = [str(step)]
        for of in by_step.values():
            row.append(f"{_percent(of[step]['accuracy'])} {_interval(of[step]['interval'])}" if step in of else "")
        for arm in others:
            found = by_step[arm].get(step, {}).get("difference")
            row += [*_difference(found), _p(found, "p_holm")]
        rows.append(row)
    return _markdown(head, rows)


def _best_line(cells: Mapping[str, Any], split: str) -> str:
    best = [
        f"{arm} {_percent(row['accuracy'])} at step {row['step']}" for arm, row in cells[f"best_on_{split}"].items()
    ]
    n = next(iter(cells[f"best_on_{split}"].values()))["n"]
    return (
        f"Best on {split}, chosen on these same {n:,} examples, only to compare with publications that do so "
        f"(biased upwards): {', '.join(best)}."
    )


def _held_out_table(accuracy: Mapping[str, Mapping[str, float]]) -> str:
    steps = sorted({int(step) for of in accuracy.values() for step in of})
    rows = [[str(s), *(_percent(of[str(s)]) if str(s) in of else "" for of in accuracy.values())] for s in steps]
    return _markdown(["step", *accuracy], rows)


def _notes(found: Mapping[str, Any]) -> str:
    chosen = {
        "last": "its last checkpoint",
        "held_out": "the checkpoint that was best on held-out training rows (of equals, the earliest)",
    }[found["select"]]
    return (
        f"An arm's row is {chosen}. Baselines are the untouched student: zero_shot reads the bare prompt, few_shot the "
        "worked examples before it. Unparsable answers count as wrong; unfinished ones were cut at "
        "eval.max_new_tokens. Intervals: Wilson's for right-or-wrong scores, else the bootstrap. Differences are "
        "paired, in percentage points: exact McNemar test with Newcombe's interval, else the paired bootstrap; "
        "p (Holm) is adjusted over the checkpoints of an arm."
    )


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _interval(interval: Sequence[float]) -> str:
    return f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"


def _difference(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [""]
    return [f"{100 * found['mean']:+.2f} [{100 * found['interval'][0]:+.2f}, {100 * found['interval'][1]:+.2f}]"]


def _p(found: Mapping[str, Any] | None, key: str) -> str:
    if found is None:
        return ""
    if found[key] < 1e-99:
        return "< 1e-99"  # it may be zero in floating point, which no p-value is
    return f"{found[key]:.4f}" if found[key] >= 1e-4 else f"{found[key]:.0e}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns line up in a terminal too; all but the first are right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
