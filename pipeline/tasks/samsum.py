"""SAMSum, chats with a summary by a linguist (Gliwa et al. 2019, arXiv 1911.12237), CC BY-NC-ND 4.0: not for commerce.

A raw row:
    {"id": "13729076", "summary": "Mazie and her girlfriends are having a drink tonight. Lee doesn't like some ...",
     "dialogue": "Mazie: Me and mah girls are having a drink tonight.\\nLee: Oh really? Where?\\nMazie: ..."}

Line breaks are `\\r\\n` in some copies and `\\n` in others; the task reads both as `\\n`. An empty field of the Hub's
comma-separated files is null and is read as empty.
"""

from pipeline.tasks import Example, HubSource, Row, Task
from pipeline.tasks.context import ContextOptions, first_words


def to_example(row: Row, index: int, options: ContextOptions) -> Example:
    """The chat, then what to do with it; the summary."""
    dialogue, cut = first_words((row["dialogue"] or "").replace("\r\n", "\n"), options.max_context_words)
    return Example(
        id=f"samsum-{index:05d}",
        task="samsum",
        prompt=f"{dialogue}\n\nSummarize what was said in a few sentences.\n\nSummary:",
        answer=row["summary"] or "",
        truncated=cut,
    )


TASK = Task(
    name="samsum",
    version=1,
    summary="chats and their summaries",
    source=HubSource("knkarthick/samsum", None, {"train": "train", "validation": "validation", "test": "test"}),
    to_example=to_example,
    metrics=("rouge_l", "bert_score"),
    options=ContextOptions,
)
