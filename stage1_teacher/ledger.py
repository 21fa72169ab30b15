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
truncated_contexts: examples whose context was cut to its task's limit in words, before any tokenizer."""
_COLUMNS = ("examples", "positions", *(status.reason for status in Status), "no_row", "truncated_contexts")


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
            counts[lost.task].update(examples=1, positions=lost.positions, no_row=lost.positions)
    if len(counts) > 1:
        counts["all tasks"] = sum(counts.values(), Counter())
    lines = [[task, *(f"{count[name]:,}" for name in _COLUMNS)] for task, count in counts.items()]
    return markdown(["task", *_COLUMNS], lines)
