"""Pocket summaries of little talks made on the spot, in the manner of SAMSum.

A raw row:
    {"dialogue": "Tom: Any news?\\nRuth: At the park, I lost an old map at 1:15! Bye!",
     "summary": "Ruth lost a map at the park and told Tom."}

One sentence or two, and whether the quality or the place is named, is chance. Rows come from
`pipeline.pocket.stories`, as `pocket_qa` tells.
"""

from collections.abc import Iterator

from pipeline.pocket.stories import split_rows
from pipeline.tasks import Example, NoOptions, Row, Task


def rows(split: str, options: NoOptions) -> Iterator[Row]:
    """The split's talks, in order."""
    return split_rows("summary", split)


def to_example(row: Row, index: int, options: NoOptions) -> Example:
    """The talk, then what to do with it; the summary."""
    prompt = f"{row['dialogue']}\n\nSummarize this dialogue."
    return Example(f"pocket-summary-{index:05d}", "pocket_summary", prompt, row["summary"])


TASK = Task(
    name="pocket_summary",
    version=1,
    summary="generated talks and summaries of one or two sentences in chance wording",
    source=rows,
    to_example=to_example,
    metrics=("rouge_l",),
)
