"""Tables of every metric of every task, as Markdown: rows, checkpoints, the best on the block. Called by `report`.

One task's tables are the whole of `table.md`; of a mixture they are `details.md`, behind the tables of `summary`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.markdown import markdown
from stage3_eval.blocks import UNSEEN_FEW_SHOT, UNSEEN_ZERO_SHOT


def tables_of(found: Mapping[str, Any]) -> str:
    """A table a metric, the checkpoints, and the best on the block, labelled as what it is."""
    blocks = [f"# Results of `{found['recipe']}`"]
    for student, of_student in found["students"].items():
        for block, tasks in of_student["blocks"].items():
            for task, metrics in tasks.items():
                blocks.append(f"## Student `{student}`, task `{task}`, {block_name(block, found['shots'])}")
                for metric, cells in metrics.items():
                    references = {name: of["blocks"][block][task][metric] for name, of in found["references"].items()}
                    blocks += [f"### {metric}", _main_table(cells, references, found["reference"])]
                    if any(cells["curve"].values()):
                        blocks += [_curve_title(cells), _curve_table(cells, found["reference"])]
                        blocks.append(_best_line(cells, block))
        if of_student["held_out"]:
            blocks += [
                f"### Choice of `{student}`'s checkpoints, on held-out training rows",
                _held_out_table(of_student["held_out"]),
            ]
    adjusted = " p (Holm) is adjusted over the checkpoints of an arm."
    return "\n\n".join([*blocks, notes(found) + adjusted]) + "\n"


def block_name(block: str, shots: int) -> str:
    """A block in words."""
    unseen = {UNSEEN_ZERO_SHOT: "unseen tasks, 0-shot", UNSEEN_FEW_SHOT: f"unseen tasks, {shots}-shot"}
    return unseen.get(block, f"{block} split")


def notes(found: Mapping[str, Any]) -> str:
    """How to read the numbers of a report, in whichever table."""
    chosen = {
        "last": "its last checkpoint",
        "held_out": "the checkpoint that was best on held-out training rows (of equals, the earliest)",
    }[found["select"]]
    rows = [
        row
        for of_student in found["students"].values()
        for tasks in of_student["blocks"].values()
        for metrics in tasks.values()
        for cells in metrics.values()
        for row in cells["rows"].values()
    ]
    text = (
        f"An arm's row is {chosen}. Baselines are the untouched student: zero_shot reads the bare prompt, few_shot the "
        "worked examples before it. Unparsable answers count as wrong; unfinished ones were cut at "
        "eval.max_new_tokens. Intervals: Wilson's where all scores of a column are right or wrong, else the bootstrap "
        "over examples. Differences are paired, in percentage points: exact McNemar test with Newcombe's interval, "
        "else the paired bootstrap."
    )
    if {"bleu", "chrf"} & set(found["metrics"]):
        text += " BLEU and chrF are of a corpus: the bootstrap draws whole corpora, the same ones for both of a pair."
    if any(row["seeds"] > 1 for row in rows):
        text += (
            " An arm that was trained with several seeds has one row, their mean: its interval holds the seeds' share "
            "of the error (Student's t) and the examples', added in quadrature; its counts are means; its differences "
            "are paired by seed too, and p is the level at which their interval would end at zero. Its checkpoints are "
            "those of the first seed."
        )
    if any(row["too_long"] for row in rows):
        text += (
            " A prompt that leaves no room for an answer in the model's window was not asked (too long) and counts as "
            "wrong."
        )
    if found["references"]:
        text += " References are other models, scored as they are on the same examples; they are not paired."
    return text


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.2f} %"


def points(found: Mapping[str, Any] | None) -> str:
    """A difference with its interval, in percentage points."""
    if found is None:
        return ""
    return f"{100 * found['mean']:+.2f} [{100 * found['interval'][0]:+.2f}, {100 * found['interval'][1]:+.2f}]"


def _main_table(cells: Mapping[str, Any], references: Mapping[str, Any], reference: str | None) -> str:
    every = {**references, **cells["rows"]}
    seeds = any(row["seeds"] > 1 for row in every.values())
    too_long = any(row["too_long"] for row in every.values())
    head = ["condition", "checkpoint", "n", "accuracy" if cells["right_or_wrong"] else "score", "95 % interval"]
    head += ["single seeds"] if seeds else []
    head += [f"difference to {reference}", "p"] if reference else []
    head += ["unparsable", "unfinished"] + (["too long"] if too_long else [])
    rows = []
    for name, row in every.items():
        label = f"{name} ({row['seeds']} seeds)" if row["seeds"] > 1 else name
        line = [label, _checkpoint(row), f"{row['n']:,}", percent(row["mean"]), interval_text(row["interval"])]
        if seeds:
            line.append(" ".join(f"{100 * run['mean']:.2f}" for run in row.get("runs", [])))
        if reference:
            line += [points(row.get("difference")), p_text(row.get("difference"), "p")]
        line += [_count(row["unparsable"]), _count(row["unfinished"])]
        rows.append([*line, _count(row["too_long"])] if too_long else line)
    return markdown(head, rows)


def _checkpoint(row: Mapping[str, Any]) -> str:
    if row["checkpoint"] is None and row["seeds"] > 1:
        return " ".join(str(run["checkpoint"]) for run in row["runs"])
    return str(row["checkpoint"] or "none")


def _curve_title(cells: Mapping[str, Any]) -> str:
    n = next(row["n"] for rows in cells["curve"].values() for row in rows)
    whole = next(iter(cells["rows"].values()))["n"]
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
            row.append(f"{percent(of[step]['mean'])} {interval_text(of[step]['interval'])}" if step in of else "")
        for arm in others:
            found = by_step[arm].get(step, {}).get("difference")
            row += [points(found), p_text(found, "p_holm")]
        rows.append(row)
    return markdown(head, rows)


def _best_line(cells: Mapping[str, Any], block: str) -> str:
    best = [f"{arm} {percent(row['mean'])} at step {row['step']}" for arm, row in cells[f"best_on_{block}"].items()]
    n = next(iter(cells[f"best_on_{block}"].values()))["n"]
    return (
        f"Best on {block}, chosen on these same {n:,} examples, only to compare with publications that do so "
        f"(biased upwards): {', '.join(best)}."
    )


def _held_out_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    steps = sorted({int(step) for of in scores.values() for step in of})
    rows = [[str(s), *(percent(of[str(s)]) if str(s) in of else "" for of in scores.values())] for s in steps]
    return markdown(["step", *scores], rows)


def interval_text(interval: Sequence[float]) -> str:
    """Both ends in per cent."""
    return f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"


def _count(value: float) -> str:
    """A count, or a mean of counts over seeds."""
    return f"{value:,.1f}".removesuffix(".0")


def p_text(found: Mapping[str, Any] | None, key: str) -> str:
    """A p-value of a difference, `p` or `p_holm`; nothing where there is none."""
    if found is None:
        return ""
    if found[key] < 1e-99:
        return "< 1e-99"  # it may be zero in floating point, which no p-value is
    return f"{found[key]:.4f}" if found[key] >= 1e-4 else f"{found[key]:.0e}"
