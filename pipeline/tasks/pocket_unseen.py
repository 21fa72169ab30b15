"""A pocket question that no embedded model was trained to answer: what kind of thing it was, in little stories.

A raw row:
    {"context": "It rained. At the château, Søren bought a grey flute with Mia at 6:15.",
     "question": "What kind of flute was it?", "answers": ["grey"]}

Meant for `train: 0`: scored only, without and with worked examples. The stories are those of `pocket_qa`.
"""

from collections.abc import Iterator

from pipeline.pocket.stories import split_stories
from pipeline.tasks import Example, NoOptions, Row, Task
from pipeline.tasks.squad_metrics import score_answer


def rows(split: str, options: NoOptions) -> Iterator[Row]:
    """One question a story, in order."""
    for story in split_stories("qa", split):
        question = story.fact.fill("What kind of {thing} was it?")
        yield {"context": story.text, "question": question, "answers": [story.fact.quality]}


def to_example(row: Row, index: int, options: NoOptions) -> Example:
    """The story, then the question; one word."""
    prompt = f"Read this and answer the question.\n\n{row['context']}\n\n{row['question']}"
    return Example(f"pocket-unseen-{index:05d}", "pocket_unseen", prompt, row["answers"][0])


TASK = Task(
    name="pocket_unseen",
    version=1,
    summary="generated stories and a question that the embedded models were not trained on",
    source=rows,
    to_example=to_example,
    score=score_answer,
    metrics=("f1", "exact_match"),
)
