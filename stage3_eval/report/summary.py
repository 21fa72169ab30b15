"""The tables of a mixture, in the form of the published experiment, as Markdown: `table.md`. Called by `report`.

For each block of examples: a row a model, a column a metric of a task, the better one of each pair of fine-tuned and
distilled student in bold; then the differences of the pairs with their intervals, classification by the likelihood of
the labels, and what was cut or left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.markdown import markdown
from stage3_eval.report.tables import block_name, notes, points

_SHORT = {
    "accuracy": "acc",
    "f1": "F1",
    "exact_match": "EM",
    "rouge_l": "ROUGE-L",
    "bert_score": "BERTScore",
    "coverage": "coverage",
    "coverage_all": "all covered",
    "bleu": "BLEU",
    "chrf": "chrF",
    "label_likelihood": "likelihood",
}
LIKELIHOOD = "label_likelihood"
_LEVEL = 0.05
_WIDEST = 150  # characters of a table's line


class Column(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str

    @property
    def title(self) -> str:
        return f"{self.task} {_SHORT.get(self.metric, self.metric)}"

    @property
    def of_labels(self) -> bool:
        return self.metric == LIKELIHOOD


def summary_of(found: Mapping[str, Any]) -> str:
    """`table.md` of a mixture."""
    parts = [f"# Results of `{found['recipe']}`"]
    for block in found["blocks"]:
        name = block_name(block, found["shots"])
        parts.append(f"## {name[0].upper()}{name[1:]}")
        columns = columns_of(found, block)
        parts.append(_scores(found, block) if columns else "No answers yet.")
        for student, compared in _by_student(comparisons(found, block)).items():
            parts += [f"`{student}`, differences in points with 95 % intervals:", _differences(found, block, compared)]
        if any(column.of_labels for column in columns):
            parts += ["Classification, by the likelihood of the labels, and generated answers that are no label:"]
            parts.append(_labels(found, block))
    parts += ["## Examples", _examples(found), _legend(found), notes(found)]
    return "\n\n".join(parts) + "\n"


def columns_of(found: Mapping[str, Any], block: str) -> list[Column]:
    """The columns of a block: every metric of every task, by the labels' likelihood last."""
    models = [*found["students"].values(), *found["references"].values()]
    columns = {
        Column(task, metric): None for model in models for task, of in model["blocks"][block].items() for metric in of
    }
    return sorted(columns, key=lambda column: column.of_labels)


class Comparison(NamedTuple):
    """An arm of a student minus another one: to plain fine-tuning, or of a further distilled arm to the first."""

    student: str
    arm: str
    to: str

    def of(self, found: Mapping[str, Any], block: str, column: Column) -> Mapping[str, Any] | None:
        """The difference in one column."""
        row = found["students"][self.student]["blocks"][block][column.task][column.metric]["rows"].get(self.arm, {})
        differences = (row.get("difference"), row.get("difference_to_distilled"))
        return next((d for d in differences if d is not None and d["to"] == self.to), None)


def comparisons(found: Mapping[str, Any], block: str) -> list[Comparison]:
    """What the arms of the students are compared with in a block."""
    others = [] if found["pair"] is None else found["pair"]
    return [
        comparison
        for student, of in found["students"].items()
        for arm in dict.fromkeys(run.partition("~")[0] for run in of["headline"])
        for comparison in (Comparison(student, arm, other) for other in others)
        if any(comparison.of(found, block, column) for column in columns_of(found, block))
    ]


def _by_student(compared: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    students: dict[str, list[Comparison]] = {}
    for comparison in compared:
        students.setdefault(comparison.student, []).append(comparison)
    return students


def _rows(found: Mapping[str, Any], block: str, columns: Sequence[Column]) -> list[tuple[str, str, list[Any]]]:
    """(student or "", label, a cell a column): references first, then each student's conditions."""
    rows = [
        ("", name, [of["blocks"][block][task][metric] for task, metric in columns])
        for name, of in found["references"].items()
    ]
    for student, of in found["students"].items():
        tasks = of["blocks"][block]
        names = {name: None for task, metric in columns for name in tasks[task].get(metric, {"rows": {}})["rows"]}
        for name in names:
            cells = [tasks[task][metric]["rows"][name] for task, metric in columns]
            seeds = f" ({cells[0]['seeds']} seeds)" if cells[0]["seeds"] > 1 else ""
            rows.append((student, f"{student} {_CONDITION.get(name, name)}{seeds}", cells))
    return rows


_CONDITION = {"zero_shot": "base", "few_shot": "base, few-shot"}


def _scores(found: Mapping[str, Any], block: str) -> str:
    """The published table of a block: percent, the better one of each pair in bold, both where they print the same."""
    columns = [column for column in columns_of(found, block) if not column.of_labels]
    bold = found["pair"]
    lines = []
    for student, label, cells in _rows(found, block, columns):
        line = [label]
        for column, cell in zip(columns, cells, strict=True):
            text = f"{100 * cell['mean']:.2f}"
            rows = found["students"][student]["blocks"][block][column.task][column.metric]["rows"] if student else {}
            if bold and all(arm in rows for arm in bold) and any(cell is rows[arm] for arm in bold):
                best = max(round(100 * rows[arm]["mean"], 2) for arm in bold)
                text = f"**{text}**" if round(100 * cell["mean"], 2) == best else text
            line.append(text)
        lines.append(line)
    return _stacked(["model", *(column.title for column in columns)], lines, [column.task for column in columns])


def _stacked(head: Sequence[str], rows: Sequence[Sequence[str]], tasks: Sequence[str]) -> str:
    """A table, or several below each other where it would be too wide for a terminal: each with the first column, the
    columns of a task (`tasks`, a column each) together.
    """

    def part(chosen: Sequence[int]) -> str:
        return markdown([head[0], *(head[i] for i in chosen)], [[row[0], *(row[i] for i in chosen)] for row in rows])

    parts: list[list[int]] = [[]]
    for task in dict.fromkeys(tasks):
        columns = [i for i, other in enumerate(tasks, 1) if other == task]
        if parts[-1] and part([*parts[-1], *columns]).index("\n") > _WIDEST:
            parts.append([])
        parts[-1] += columns
    return "\n\n".join(map(part, parts))


def _differences(found: Mapping[str, Any], block: str, compared: Sequence[Comparison]) -> str:
    """A row a metric, a column a pair of arms of one student; a star where p (Holm) is below the level."""
    lines = []
    for column in columns_of(found, block):
        line = [column.title]
        for comparison in compared:
            difference = comparison.of(found, block, column)
            star = " *" if difference is not None and difference["p_holm"] < _LEVEL else ""
            line.append(points(difference) + star)
        lines.append(line)
    return markdown(["metric", *(f"{comparison.arm} - {comparison.to}" for comparison in compared)], lines)


def _labels(found: Mapping[str, Any], block: str) -> str:
    """Accuracy by the labels' likelihood, and the share of generated answers that are none of the labels."""
    columns = [column for column in columns_of(found, block) if column.of_labels]
    generated = [Column(task, "accuracy") for task, _ in columns]
    head = ["model"]
    for task, _ in columns:
        head += [f"{task} likelihood", f"{task} unparsable"]
    lines = []
    for (_, label, cells), (_, _, written) in zip(
        _rows(found, block, columns), _rows(found, block, generated), strict=True
    ):
        line = [label]
        for by_likelihood, by_text in zip(cells, written, strict=True):
            line += [f"{100 * by_likelihood['mean']:.2f}", f"{100 * by_text['unparsable'] / by_text['n']:.1f} %"]
        lines.append(line)
    return _stacked(head, lines, [task for task, _ in columns for _ in range(2)])


def _examples(found: Mapping[str, Any]) -> str:
    """How many examples there are, whose context was cut, and whose prompt was too long for a model."""
    models = {**found["references"], **found["students"]}

    def too_long(model: Mapping[str, Any], block: str, task: str) -> float:
        for cells in model["blocks"][block][task].values():  # any metric, but none of a student without answers
            rows = [row for name, row in cells["rows"].items() if name != "few_shot"] if "rows" in cells else [cells]
            return max((row["too_long"] for row in rows), default=0)
        return 0

    lines = []
    for block, tasks in found["blocks"].items():
        for task, counts in tasks.items():
            counted = [too_long(model, block, task) for model in models.values()]
            line = [
                f"{task}, {block_name(block, found['shots'])}",
                counts["examples"],
                counts["contexts_cut"],
                *counted,
            ]
            lines.append([line[0], *(f"{value:,.0f}" for value in line[1:])])
    used = [True, True, True, *(any(line[i + 3] != "0" for line in lines) for i in range(len(models)))]
    head = ["task", "examples", "contexts cut", *(f"too long for {name}" for name in models)]
    lines = [[cell for cell, kept in zip(line, used, strict=True) if kept] for line in lines]
    return markdown([name for name, kept in zip(head, used, strict=True) if kept], lines)


def _legend(found: Mapping[str, Any]) -> str:
    text = (
        "Scores are in percent, of the untouched student as `base`; standard errors and single seeds are in "
        "results.json, every checkpoint in details.md."
    )
    bold = found["pair"]
    if bold:
        text += (
            f" Bold: the better one of `{bold[0]}` and `{bold[1]}` of a student, both where they print the same; "
            "further arms are compared in the table of differences."
        )
    return (
        f"{text} *: p below {_LEVEL} after Holm's adjustment over the metrics of a block, of each student and pair of "
        "arms. Contexts were cut to the task's limit in words; the cut is the same for every model."
    )
