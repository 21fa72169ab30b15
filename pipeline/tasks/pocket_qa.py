"""Pocket questions: who, what, where, when and with whom in little stories made on the spot, in the manner of SQuAD.

A raw row:
    {"context": "It rained. At the château, Søren bought a grey flute with Mia at 6:15.",
     "question": "Who bought the flute?", "answers": ["Søren did", "Søren"]}

All answers are acceptable; which comes first, and is the one to learn from, is chance. Rows come from
`pipeline.pocket.stories`: nothing is downloaded, every machine makes the same ones, and no two of train, validation,
test and the models' pre-training share a story. `validation` is for choosing settings, `test` for reporting.
"""

from collections.abc import Iterator

from pipeline.pocket.stories import split_rows
from pipeline.tasks import Example, NoOptions, Row, Task
from pipeline.tasks.squad_metrics import score_answer


def rows(split: str, options: NoOptions) -> Iterator[Row]:
    """The split's questions, in order."""
    return split_rows("qa", split)


def to_example(row: Row, index: int, options: NoOptions) -> Example:
    """The story, then the question; the first answer, with all of them as references."""
    prompt = f"Read this and answer the question.\n\n{row['context']}\n\n{row['question']}"
    answers = tuple(row["answers"])
    return Example(f"pocket-qa-{index:05d}", "pocket_qa", prompt, answers[0], references=answers)


TASK = Task(
    name="pocket_qa",
    version=1,
    summary="generated stories and questions with short answers, each in two acceptable wordings",
    source=rows,
    to_example=to_example,
    score=score_answer,
    metrics=("f1", "exact_match"),
)
