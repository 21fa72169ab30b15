"""XSum, news articles summarised in one sentence (Narayan et al. 2018, arXiv 1808.08745). The articles are the BBC's,
and their licence is not stated: for use where they are, not for passing on.

A raw row:
    {"id": "...", "document": "Prison Link Cymru had 1,099 referrals in 2015-16 and said some ex-offenders were ...",
     "summary": "..."}

Articles are long: at 320 words about half are cut (662 of the 1,426 training rows that were tried).
"""

from pipeline.tasks import Example, HubSource, Row, Task
from pipeline.tasks.context import ContextOptions, first_words


def to_example(row: Row, index: int, options: ContextOptions) -> Example:
    """The article, then what to do with it; the one-sentence summary."""
    document, cut = first_words(row["document"], options.max_context_words)
    return Example(
        id=f"xsum-{index:06d}",
        task="xsum",
        prompt=f"{document}\n\nSummarize this article in one sentence.\n\nSummary:",
        answer=row["summary"],
        truncated=cut,
    )


TASK = Task(
    name="xsum",
    version=1,
    summary="news articles and their one-sentence summaries",
    source=HubSource(
        "EdinburghNLP/xsum",
        None,
        {"train": "train", "validation": "validation", "test": "test"},
        revision="refs/convert/parquet",
    ),
    to_example=to_example,
    metrics=("rouge_l", "bert_score"),
    options=ContextOptions,
)
