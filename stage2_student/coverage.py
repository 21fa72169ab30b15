"""How many of a student's answer positions have a teacher: by task, in both alignments. Loads no model.

Called by `python -m stage2_student --alignment`, and by `train` before an arm that aligns. It reads where the teacher's
tokens lie in each answer, and none of its numbers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from cache_schema.atomic import publish
from cache_schema.reader import CacheReader
from cache_schema.schema import ALIGNMENT, Status
from pipeline.alignment import NONE
from pipeline.markdown import markdown
from pipeline.models import tokenizer_digest
from pipeline.prompts import PromptBuilder
from pipeline.sections import Alignment
from stage2_student.batches import aligned_rows, has_teachers_tokenizer
from stage2_student.checkpoint import storage_errors

LEGEND = """All shares are of the student's answer positions, end-of-sequence included.
boundary, index: those that get a usable row of the teacher by either alignment.
the same: those that get the same row by both; of the pairs that index makes, no others have read the same text.
quarantined: those that lost their row because it is not usable, by either alignment."""
MODES: tuple[Alignment, ...] = get_args(Alignment)


def _none_yet() -> dict[str, int]:
    return dict.fromkeys(MODES, 0)


@dataclass
class Coverage:
    """Counts of a student's answer positions, end-of-sequence included.

    aligned: by alignment, those that have a row in the cache; quarantined: of these, those whose row is not usable.
    agreed: those that have the same row by either, so that `index` compares what has read the same text.
    """

    examples: int = 0
    positions: int = 0
    agreed: int = 0
    aligned: dict[str, int] = field(default_factory=_none_yet)
    quarantined: dict[str, int] = field(default_factory=_none_yet)

    def __add__(self, other: "Coverage") -> "Coverage":
        def both(mine: Mapping[str, int], theirs: Mapping[str, int]) -> dict[str, int]:
            return {mode: mine[mode] + theirs[mode] for mode in MODES}

        return Coverage(
            self.examples + other.examples,
            self.positions + other.positions,
            self.agreed + other.agreed,
            both(self.aligned, other.aligned),
            both(self.quarantined, other.quarantined),
        )

    def taught(self, mode: Alignment) -> float:
        """The share of positions that have a usable row, in per cent."""
        return 100 * (self.aligned[mode] - self.quarantined[mode]) / max(1, self.positions)

    def lost(self, mode: Alignment) -> float:
        """The share of positions that would have one, were it not quarantined, in per cent."""
        return 100 * self.quarantined[mode] / max(1, self.positions)


def measure(
    reader: CacheReader, prompts: PromptBuilder, report: Callable[[], None] = lambda: None
) -> dict[str, Coverage]:
    """Task -> its coverage, in the order of their first rows; rows too long for a student's window count too, those
    that its tokenizer fails on do not.

    `report` is called after each row.
    """
    same_tokenizer = has_teachers_tokenizer(prompts, reader.manifest)
    tasks: dict[str, Coverage] = {}
    for row in reader.rows(ALIGNMENT):
        report()
        encoded = prompts.try_encode("", row.answer)  # an answer has the same tokens after any prompt
        if encoded is None:
            continue
        counts = tasks.setdefault(row.task, Coverage())
        counts.examples += 1
        counts.positions += len(encoded.answer_ids)
        rows = {mode: aligned_rows(row, encoded, mode, same_tokenizer) for mode in MODES}
        counts.agreed += int(((rows["boundary"] == rows["index"]) & (rows["index"] != NONE)).sum())
        for mode, at in rows.items():
            at = at[at != NONE]
            counts.aligned[mode] += len(at)
            counts.quarantined[mode] += int((row.status[at] != Status.USABLE).sum())
    return tasks


def total(tasks: Mapping[str, Coverage]) -> Coverage:
    """Over all tasks."""
    return sum(tasks.values(), Coverage())


def save(path: Path, tasks: Mapping[str, Coverage], reader: CacheReader, prompts: PromptBuilder) -> None:
    """Write the counts as JSON, with the cache and the tokenizer that they are of. Raises RunError."""
    content: dict[str, Any] = {
        "cache": reader.manifest.fingerprint,
        "tokenizer_sha256": tokenizer_digest(prompts.tokenizer),
        "tasks": {name: asdict(counts) for name, counts in tasks.items()},
    }
    with storage_errors(path, "writing the alignment report"):
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, (json.dumps(content, indent=1) + "\n").encode())


def summary(tasks: Mapping[str, Coverage]) -> str:
    """One line: of 2,840 answer positions 97.5 % by boundary, 99.9 % by index have a teacher; lost to quarantine ..."""
    every = total(tasks)
    shares = ", ".join(f"{every.taught(mode):.1f} % by {mode}" for mode in MODES)
    lost = ", ".join(f"{every.lost(mode):.1f} %" for mode in MODES)
    return f"of {every.positions:,} answer positions {shares} have a teacher; lost to quarantine: {lost}"


def table(students: Mapping[str, Mapping[str, Coverage]]) -> str:
    """Student -> task -> coverage, as a Markdown table with its legend."""
    head = (
        "student",
        "task",
        "examples",
        "positions",
        *(f"{mode}, %" for mode in MODES),
        "the same, %",
        "quarantined, %",
    )
    lines: list[Sequence[str]] = []
    for student, tasks in students.items():
        rows = [*tasks.items(), *([("all", total(tasks))] if len(tasks) > 1 else [])]
        for task, counts in rows:
            shares = [f"{counts.taught(mode):.1f}" for mode in MODES]
            shares.append(f"{100 * counts.agreed / max(1, counts.positions):.1f}")
            lost = " / ".join(f"{counts.lost(mode):.1f}" for mode in MODES)
            lines.append((student, task, f"{counts.examples:,}", f"{counts.positions:,}", *shares, lost))
    return f"{markdown(head, lines, texts=2)}\n\n{LEGEND}"
