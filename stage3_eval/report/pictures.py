"""The pictures of a report, drawn from `results.json` and the arms' losses. Called by `report`.

comparison: bars with 95 % intervals. curves: every checkpoint of every arm with its interval as a band, baselines as
lines. loss: the arms' cross-entropy. A mixture has too many tasks for the first two and gets one picture a block in
their place: differences, the gain of an arm over plain fine-tuning in every metric, a panel a student.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache_schema.atomic import publish
from stage3_eval.report.summary import Comparison, columns_of, comparisons
from stage3_eval.report.tables import block_name

# Okabe and Ito's palette, which colour-blind readers can tell apart; a condition has one colour everywhere.
_COLOURS = {"zero_shot": "#8c8c8c", "few_shot": "#3d3d3d", "sft": "#0072b2", "distill": "#d55e00"}
_FURTHER = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b8a500")
_DPI = 150
_MOST_TICKS = 12


def draw(
    found: Mapping[str, Any],
    losses: Mapping[str, Mapping[str, Mapping[int, float]]],
    folder: Path,
    mixture: bool,
) -> list[Path]:
    """Draw all pictures into the folder; their paths. losses: student -> run of an arm -> step -> cross-entropy."""
    import matplotlib

    matplotlib.use("Agg")
    colours = _colours(found)
    drawn = _of_blocks(found, colours, folder) if mixture else _of_tasks(found, colours, folder)
    for student, runs in losses.items():
        if any(runs.values()):
            suffix = "" if len(losses) == 1 else f"-{student}"
            title = f"{found['recipe']}: {student}, cross-entropy on the training answers"
            drawn.append(_save(_loss(runs, title, colours), folder / f"loss{suffix}.png"))
    return drawn


def _of_tasks(found: Mapping[str, Any], colours: Mapping[str, str], folder: Path) -> list[Path]:
    """A comparison and curves of each student, block and task."""
    cells = [
        (student, block, task, metrics)
        for student, of_student in found["students"].items()
        for block, tasks in of_student["blocks"].items()
        for task, metrics in tasks.items()
        if any(metric["rows"] for metric in metrics.values())
    ]
    drawn = []
    for student, block, task, metrics in cells:
        suffix = "" if len(cells) == 1 else f"-{student}-{block}-{task}"
        title = f"{found['recipe']}: {student} on {task}, {block_name(block, found['shots'])}"
        drawn.append(_save(_comparison(metrics, title, colours), folder / f"comparison{suffix}.png"))
        if any(any(metric["curve"].values()) for metric in metrics.values()):
            drawn.append(_save(_curves(metrics, title, colours), folder / f"curves{suffix}.png"))
    return drawn


def _of_blocks(found: Mapping[str, Any], colours: Mapping[str, str], folder: Path) -> list[Path]:
    """The differences of each block."""
    drawn = []
    for block in found["blocks"]:
        if comparisons(found, block):
            drawn.append(_save(_differences(found, block, colours), folder / f"differences-{block}.png"))
    return drawn


def _colours(found: Mapping[str, Any]) -> dict[str, str]:
    names = list(_COLOURS)
    for of_student in found["students"].values():
        for tasks in of_student["blocks"].values():
            for metrics in tasks.values():
                for metric in metrics.values():
                    names += [name for name in metric["rows"] if name not in names]
    further = names[len(_COLOURS) :]
    return {**_COLOURS, **{name: _FURTHER[i % len(_FURTHER)] for i, name in enumerate(further)}}


def _figure(panels: int, width: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, list(axes)


def _comparison(metrics: Mapping[str, Any], title: str, colours: Mapping[str, str]) -> Any:
    """A panel a metric, a bar a condition, with its 95 % interval and its value."""
    conditions = max(len(metric["rows"]) for metric in metrics.values())
    figure, axes = _figure(len(metrics), max(3.6, 1.0 + 0.85 * conditions))
    for axis, (name, metric) in zip(axes, metrics.items(), strict=True):
        for place, (condition, cell) in enumerate(metric["rows"].items()):
            value, (low, high) = 100 * cell["mean"], (100 * bound for bound in cell["interval"])
            axis.bar(place, value, 0.68, color=colours[condition])
            axis.errorbar(
                place, value, [[max(value - low, 0)], [max(high - value, 0)]], color="black", capsize=4, linewidth=1.2
            )
            axis.text(place, high + 1.2, f"{value:.1f}", ha="center", va="bottom", fontsize=9)
        labels = [condition.replace("_", "-") + _trained(cell) for condition, cell in metric["rows"].items()]
        axis.set_xticks(range(len(labels)), labels, fontsize=8.5)
        n = next(iter(metric["rows"].values()))["n"]
        axis.set_title(f"{name}, n = {n:,}", fontsize=10)
        axis.set_ylim(0, 108)
        axis.set_yticks(range(0, 101, 20))
    axes[0].set_ylabel(f"{_what(metrics)} (%), 95 % interval")
    figure.suptitle(title, fontsize=11)
    return figure


def _trained(row: Mapping[str, Any]) -> str:
    """Under a bar: what the row is of."""
    if not row["seeds"]:
        return "\nuntrained"
    step = f"\nstep {row['checkpoint']}" if row["checkpoint"] else "\nchosen steps"
    return step + (f", {row['seeds']} seeds" if row["seeds"] > 1 else "")


def _what(metrics: Mapping[str, Any]) -> str:
    return "accuracy" if all(metric["right_or_wrong"] for metric in metrics.values()) else "score"


def _curves(metrics: Mapping[str, Any], title: str, colours: Mapping[str, str]) -> Any:
    """A panel a metric: accuracy over the steps, intervals as bands, the untouched student as dashed lines."""
    figure, axes = _figure(len(metrics), 5.0)
    for axis, (name, metric) in zip(axes, metrics.items(), strict=True):
        for condition, cell in metric["curve_baselines"].items():
            axis.axhline(
                100 * cell["mean"],
                color=colours[condition],
                linestyle=(0, (5, 3)) if condition == "zero_shot" else (0, (1, 1.5)),
                linewidth=1.6,
                label=condition.replace("_", "-") + " (untrained)",
            )
        n = 0
        for arm, rows in metric["curve"].items():
            steps, n = [row["step"] for row in rows], rows[0]["n"]
            lows, highs = zip(*(row["interval"] for row in rows), strict=True)
            axis.fill_between(
                steps, [100 * low for low in lows], [100 * high for high in highs],
                color=colours[arm], alpha=0.15, linewidth=0,
            )  # fmt: skip
            values = [100 * row["mean"] for row in rows]
            axis.plot(steps, values, color=colours[arm], marker="o", markersize=4.5, linewidth=1.8, label=arm)
            if len(steps) <= _MOST_TICKS:
                axis.set_xticks(steps)
        axis.set_title(f"{name}, n = {n:,}", fontsize=10)
        axis.set_xlabel("training step")
        axis.margins(x=0.06)
    axes[0].set_ylabel(f"{_what(metrics)} (%), 95 % band")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _differences(found: Mapping[str, Any], block: str, colours: Mapping[str, str]) -> Any:
    """A panel a student, a line a metric of a task, a mark an arm: its mean minus another's, in points; a hollow mark
    where the other is a distilled arm too.
    """
    from matplotlib.figure import Figure

    compared = comparisons(found, block)
    series = list(dict.fromkeys((comparison.arm, comparison.to) for comparison in compared))
    students = list(dict.fromkeys(comparison.student for comparison in compared))
    columns = columns_of(found, block)
    height = 1.6 + (0.24 + 0.16 * len(series)) * len(columns)
    figure = Figure(figsize=(2.2 + 3.6 * len(students), height), layout="constrained")
    axes = figure.subplots(1, len(students), squeeze=False, sharex=True, sharey=True)[0]
    for axis, student in zip(axes, students, strict=True):
        axis.axvline(0, color="#8c8c8c", linewidth=1.0)
        axis.grid(axis="x", color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        for number, (arm, to) in enumerate(series):
            shift = 0.6 * ((number + 0.5) / len(series) - 0.5)
            label = f"{arm} - {to}"
            for place, column in enumerate(columns):
                difference = Comparison(student, arm, to).of(found, block, column)
                if difference is None:
                    continue
                mean, (low, high) = 100 * difference["mean"], (100 * bound for bound in difference["interval"])
                axis.errorbar(
                    mean, place + shift, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], color=colours[arm],
                    fmt="o", markersize=4.5, markerfacecolor=colours[arm] if to == found["reference"] else "white",
                    capsize=2.5, linewidth=1.4, label=label,
                )  # fmt: skip
                label = "_nolegend_"
        axis.set_title(student, fontsize=10)
        axis.set_xlabel("points, 95 % interval")
    axes[0].set_yticks(range(len(columns)), [column.title for column in columns], fontsize=9)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    figure.suptitle(f"{found['recipe']}: differences, {block_name(block, found['shots'])}", fontsize=11)
    return figure


def _loss(runs: Mapping[str, Mapping[int, float]], title: str, colours: Mapping[str, str]) -> Any:
    """Each step's cross-entropy, pale, and its running mean over about a fiftieth of the steps; of repeats the latter
    alone.
    """
    figure, (axis,) = _figure(1, 6.4)
    for run, losses in runs.items():
        if not losses:
            continue
        arm, repeated, _ = run.partition("~")
        colour = colours.get(arm, _FURTHER[0])
        steps, values = list(losses), list(losses.values())
        smooth = _smooth(values, max(1, len(values) // 50))
        if repeated:
            axis.plot(steps, smooth, color=colour, linewidth=0.9)
            continue
        axis.plot(steps, values, color=colour, alpha=0.28, linewidth=0.9)
        axis.plot(steps, smooth, color=colour, linewidth=1.8, label=arm)
    axis.set_xlabel("training step")
    axis.set_ylabel("cross-entropy (nats per answer token)")
    axis.set_ylim(bottom=0)
    axis.margins(x=0.02)
    axis.legend(frameon=False)
    axis.set_title(title, fontsize=11)
    return figure


def _smooth(values: list[float], half: int) -> list[float]:
    """The running mean over `half` neighbours on either side, fewer at the ends."""
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _save(figure: Any, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI, metadata={"Software": None})
    publish(path, picture.getbuffer())
    return path
