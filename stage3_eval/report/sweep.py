"""The comparison of a sweep's points: `comparison.json` and `comparison.md`. Called by `stage3_eval.sweep`; pure.

    points:   [{point, settings, run_dir, missing: what -> why}]
    against:  the point that others are compared with
    compared: how many differences `p_holm` is adjusted over: of every student, block and task all that differ
    students: <name>: <block>: {tables: <task>: {metric, right_or_wrong, baselines: <name>: a row, rows: [a row]}, best}

A row is an arm at a point, by its headline checkpoint, over its seeds; rows of the same `answers` are one training. Its
`difference` is to the same arm at the point `against`, on the same examples, pair by pair and seed by seed, with the
tests of `report.results`; a row whose answers are those of the other (`same`) has none. Of a task its first metric is
shown. Where a block has several tasks, the table ALL is the mean of their first metrics over all examples. `best` says
what it was chosen on.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.markdown import markdown
from stage3_eval.compare import Measured, is_binary
from stage3_eval.report.rows import Column, Runs, adjust, by_seed, cell_of, difference_of, row_of
from stage3_eval.report.tables import interval_text, p_text, percent, points
from stage3_eval.score import Scores

FORMAT = "logitbank sweep 1"
ALL = "all tasks"
VALIDATION, HELD_OUT = "validation", "held_out"


@dataclass(frozen=True)
class ArmRow:
    """An arm at a point. tables: block -> task or ALL -> seed -> scores. steps: seed -> its headline checkpoint.

    answers: block -> seed -> what its answers are known by. held_out: the mean over its seeds of the score that its
    checkpoint was chosen by, on the held-out rows; None where it was not chosen there.
    """

    point: str
    arm: str
    tables: Mapping[str, Mapping[str, Runs]]
    steps: Mapping[str, int]
    answers: Mapping[str, Mapping[str, str]]
    held_out: float | None = None


@dataclass
class StudentRows:
    """A student over the sweep. baselines: block -> task or ALL -> name -> scores, of the untouched student."""

    arms: list[ArmRow] = field(default_factory=list)
    baselines: dict[str, dict[str, dict[str, Scores]]] = field(default_factory=dict)
    untouched: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    """(block, baseline) -> what its answers are of -> the name in `baselines`."""


def together(scores: Mapping[str, Scores]) -> Scores:
    """The first metrics of several tasks as one score of all their examples."""
    first = {task: next(iter(of.measured.values())) for task, of in scores.items()}
    values = tuple(value for measured in first.values() for value in measured.values)
    return Scores(
        ids=tuple(f"{task}/{example}" for task, of in scores.items() for example in of.ids),
        measured={ALL: Measured(values, sum(measured.unparsable for measured in first.values()))},
        unfinished=sum(of.unfinished for of in scores.values()),
        tokens=sum(of.tokens for of in scores.values()),
        too_long=sum(of.too_long for of in scores.values()),
    )


def compared(students: Mapping[str, StudentRows], against: str) -> dict[str, Any]:
    """`students` and `compared` of the comparison. What several points made alike is compared once."""
    made = {name: _student(rows, against) for name, rows in students.items()}
    tables = [table for blocks in made.values() for of in blocks.values() for table in of["tables"].values()]
    alike: dict[tuple[int, str, str], list[dict[str, Any]]] = {}  # of the same answers minus the same answers
    for number, table in enumerate(tables):
        to = {row["arm"]: row["answers"] for row in table["rows"] if row["point"] == against}
        for row in table["rows"]:
            if row["difference"]:
                alike.setdefault((number, row["answers"], to[row["arm"]]), []).append(row["difference"])
    adjust(differences[0] for differences in alike.values())
    for first, *others in alike.values():
        for other in others:
            other["p_holm"] = first["p_holm"]
    return {"compared": len(alike), "students": made}


def _student(rows: StudentRows, against: str) -> dict[str, Any]:
    blocks: dict[str, Any] = {}
    for block in dict.fromkeys(block for row in rows.arms for block in row.tables):
        of_block = [row for row in rows.arms if block in row.tables]
        names = dict.fromkeys(name for row in of_block for name in row.tables[block])
        baselines = rows.baselines.get(block, {})
        tables = {name: _table(of_block, block, name, baselines.get(name, {}), against) for name in names}
        blocks[block] = {"tables": tables}
    for block, of in blocks.items():
        of["best"] = _best(rows.arms, blocks, block)
    return blocks


def _table(
    rows: Sequence[ArmRow], block: str, name: str, baselines: Mapping[str, Scores], against: str
) -> dict[str, Any]:
    every = [scores for row in rows for scores in row.tables[block][name].values()] + list(baselines.values())
    metric = next(iter(every[0].measured))
    column = Column(metric, not all(is_binary(scores.measured[metric].values) for scores in every))
    reference = {row.arm: row for row in rows if row.point == against}
    return {
        "metric": metric,
        "right_or_wrong": not column.graded,
        "baselines": {of: cell_of(scores, column) for of, scores in baselines.items()},
        "rows": [_row(row, block, name, column, reference.get(row.arm)) for row in rows],
    }


def _row(row: ArmRow, block: str, name: str, column: Column, to: ArmRow | None) -> dict[str, Any]:
    mine, found, same = row.tables[block][name], None, False
    if to is not None and to is not row:
        same = row.answers[block] == to.answers[block]
        pairs = [] if same else by_seed(mine, to.tables[block][name], untouched=False)
        found = difference_of(pairs, column, to.point)
    return {
        "point": row.point,
        "arm": row.arm,
        **row_of(mine, column, row.steps),
        "answers": _digest(row.answers[block]),
        "same": same,
        "difference": found,
    }


def _digest(answers: Mapping[str, str]) -> str:
    """What the answers of all seeds are known by."""
    return hashlib.sha256(json.dumps(answers, sort_keys=True).encode()).hexdigest()[:12]


def _best(arms: Sequence[ArmRow], blocks: Mapping[str, Any], block: str) -> dict[str, Any]:
    """The best row of a block's main table, of equals the first; what it was chosen on, and among how many."""
    rows = _main(blocks[block])["rows"]
    places = {(row["point"], row["arm"]): row for row in rows}
    held_out = {(row.point, row.arm): row.held_out for row in arms if row.held_out is not None}
    if VALIDATION in blocks:
        by, chosen_on = {(r["point"], r["arm"]): r["mean"] for r in _main(blocks[VALIDATION])["rows"]}, VALIDATION
    elif held_out:
        by, chosen_on = held_out, HELD_OUT
    else:
        by, chosen_on = {place: row["mean"] for place, row in places.items()}, block
    best = max((place for place in places if place in by), key=by.__getitem__)
    row = places[best]
    return {
        "point": best[0],
        "arm": best[1],
        "chosen_on": chosen_on,
        "among": len({row["answers"] for row in rows}),
        "fair": chosen_on != block,
        **{key: row[key] for key in ("n", "mean", "interval")},
    }


def _main(of_block: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table of all tasks, or of the only one."""
    tables: Mapping[str, Mapping[str, Any]] = of_block["tables"]
    return tables[ALL] if ALL in tables else next(iter(tables.values()))


def document(found: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    parts = [f"# Sweep of `{found['recipe']}`: {len(found['points'])} points", f"Compared with: {found['against']}"]
    for student, blocks in found["students"].items():
        for block, of in blocks.items():
            for task, table in of["tables"].items():
                name = "" if task == ALL or table["metric"] == ALL else f", {table['metric']}"
                parts.append(f"## Student `{student}`, {task}{name}, {block}")
                parts.append(_markdown(table))
            parts.append(_best_line(of["best"], block))
    missing = [f"- {of['point']}: {what}: {why}" for of in found["points"] for what, why in of["missing"].items()]
    if missing:
        parts += ["**Missing:**", "\n".join(missing)]
    return "\n\n".join([*parts, _notes(found)]) + "\n"


def _markdown(table: Mapping[str, Any]) -> str:
    head = ["point", "arm", "checkpoint", "n", "accuracy" if table["right_or_wrong"] else "score", "95 % interval"]
    head += ["difference", "p", "p (Holm)"]
    rows = []
    for name, row in table["baselines"].items():
        rows.append(["the untouched student", name, "none", *_numbers(row), "", "", ""])
    for row in table["rows"]:
        found = row["difference"]
        label = f"{row['arm']} ({row['seeds']} seeds)" if row["seeds"] > 1 else row["arm"]
        told = points(found) if found else "the same" if row["same"] else ""
        step = row["checkpoint"] or " ".join(str(run["checkpoint"]) for run in row.get("runs", []))
        rows.append([row["point"], label, str(step), *_numbers(row), told, p_text(found, "p"), p_text(found, "p_holm")])
    return markdown(head, rows, texts=2)


def _numbers(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['n']:,}", percent(row["mean"]), interval_text(row["interval"])]


def _best_line(best: Mapping[str, Any], block: str) -> str:
    shown = f"{best['arm']} at {best['point']}, {percent(best['mean'])} {interval_text(best['interval'])} on {block}"
    if best["fair"]:
        on = {HELD_OUT: "held-out training rows"}.get(best["chosen_on"], f"the {best['chosen_on']} split")
        return f"Best of {best['among']} trained students, chosen on {on}: {shown}, where it was not chosen."
    caution = (
        f"Best of {best['among']} trained students: {shown}. It was chosen on these same {best['n']:,} examples, so "
        "its score is biased upwards, the more so the more there are: no estimate of how it does on others."
    )
    if block == VALIDATION:
        return caution
    return (
        f"{caution} To choose it elsewhere: --set 'eval.splits=[validation, {block}]' where the task has such a split, "
        "or --set data.held_out=100 --set eval.select=held_out (another cache)."
    )


def _notes(found: Mapping[str, Any]) -> str:
    text = (
        "An arm's row is its headline checkpoint. Differences, in percentage points, are to the same arm at the point "
        "compared with, on the same examples: exact McNemar test with Newcombe's interval where all scores are right "
        "or wrong, else the paired bootstrap. "
    )
    if found["compared"]:
        text += f"p (Holm) is adjusted over all {found['compared']} of them; what two points made alike counts once. "
    return text + "`the same`: its answers are those of the other, so there is nothing to compare."


def held_out_mean(scores: Sequence[float]) -> float | None:
    """Over the seeds of an arm; None where nothing was chosen on held-out rows."""
    return statistics.fmean(scores) if scores else None
