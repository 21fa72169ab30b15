"""Pocket yes-or-no questions about little stories made on the spot, in the manner of BoolQ.

A raw row:
    {"passage": "At the café, Leo hid a green flute at 2:30. It was a long day…",
     "question": "Was Leo alone?", "answer": true}

A question is about company, the weather, the hour, or about a person with a thing or a place, one of which is wrong
where the answer is no. Three answers in five are no. Rows come from `pipeline.pocket.stories`, as `pocket_qa` tells.
"""

from collections.abc import Iterator

from pipeline.pocket.stories import split_rows
from pipeline.tasks import Example, NoOptions, Row, Task
from pipeline.tasks.classification import score_accuracy

LABELS = ("no", "yes")


def rows(split: str, options: NoOptions) -> Iterator[Row]:
    """The split's questions, in order."""
    return split_rows("yesno", split)


def to_example(row: Row, index: int, options: NoOptions) -> Example:
    """The story, then the question; `yes` or `no`."""
    prompt = f"{row['passage']}\n\n{row['question']} Answer yes or no."
    return Example(f"pocket-yesno-{index:05d}", "pocket_yesno", prompt, LABELS[row["answer"]], labels=LABELS)


TASK = Task(
    name="pocket_yesno",
    version=1,
    summary="generated stories and questions answered yes or no",
    source=rows,
    to_example=to_example,
    score=score_accuracy,
    metrics=("accuracy", "label_likelihood"),
)
