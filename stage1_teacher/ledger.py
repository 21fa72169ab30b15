"""What became of every position, task by task: the table that `python -m stage1_teacher` ends with.

Read from the cache itself (statuses, and the commit records of examples without a row), so that a cache made elsewhere
or long ago says the same. Only the alignment columns are read, never a logit.
"""

from collections import Counter
from collections.abc import Iterable

from cache_schema.reader import CacheReader
from cache_schema.schema import ALIGNMENT, Status
from pipeline.markdown import markdown
from pipeline.tasks import Example

LEGEND = """positions = usable + not_finite + unknown_token (this or an earlier token is unknown to the tokenizer)
+ cut (beyond the teacher's window) + no_row (of examples that could not be used at all).
truncated_contexts: examples whose context was cut to its task's limit in words, before any tokenizer.
quarantined: examples without a row; the positions of those whose row could not be read are not known, and count 0."""
_COLUMNS = (
    "examples",
    "quarantined",
    "positions",
    *(status.reason for status in Status),
    "no_row",
    "truncated_contexts",
)


def task_table(reader: CacheReader, examples: Iterable[Example]) -> str:
    """A Markdown table, one line a task and one of sums.

    positions = usable + those of each reason + no_row, the positions of examples that have no row at all (an empty
    answer, a prompt beyond the teacher's window). truncated_contexts: how many of `examples`, the planned ones, had
    their context cut to the task's word limit. Raises CorruptShard.
    """
    counts: dict[str, Counter[str]] = {}
    for example in examples:
        counts.setdefault(example.task, Counter())["truncated_contexts"] += example.truncated
    for row in reader.rows(ALIGNMENT):
        counts[row.task].update(Status(code).reason for code in row.status.tolist())
        counts[row.task].update(examples=1, positions=len(row.status))
    for record in reader.records:
        for lost in record.quarantined:
            counts[lost.task].update(examples=1, quarantined=1, positions=lost.positions, no_row=lost.positions)
    if len(counts) > 1:
        counts["all tasks"] = sum(counts.values(), Counter())
    lines = [[task, *(f"{count[name]:,}" for name in _COLUMNS)] for task, count in counts.items()]
    return markdown(["task", *_COLUMNS], lines)


def quarantine_list(reader: CacheReader, examples: Iterable[Example], shown: int = 3) -> str:
    """A line a reason, the commonest first: how many examples have no row, and the first `shown` of them; "" of none.

    What was wrong with a row that could not be read is told by `examples`, the planned ones.
    """
    lost: dict[str, list[str]] = {}
    for record in reader.records:
        for example in record.quarantined:
            lost.setdefault(example.reason, []).append(example.example_id)
    what = {e.id: str(e.extra["what"]) for e in examples if e.unusable}
    lines = []
    for reason, ids in sorted(lost.items(), key=lambda item: (-len(item[1]), item[0])):
        named = [f"{i} ({what[i]})" if i in what else i for i in ids[:shown]]
        lines.append(f"  {len(ids):,} {reason}: {', '.join(named)}{', ...' if len(ids) > shown else ''}")
    return "\n".join(["quarantined, without a row:", *lines, ""]) if lines else ""
