"""BoolQ, naturally asked yes-or-no questions about a passage (Clark et al. 2019, arXiv 1905.10044), CC BY-SA 3.0.

A raw row:
    {"question": "are bok choy and pak choi the same", "answer": true,
     "passage": "Bok choy, pak choi or pok choi (Chinese: 上海青; ...) is a type of Chinese cabbage. ..."}

The official test answers are withheld: our test is the official validation set.
"""

from pipeline.tasks import Example, HubSource, Row, Task
from pipeline.tasks.classification import label_of, options_block, score_accuracy
from pipeline.tasks.context import ContextOptions, first_words

LABELS = ("no", "yes")


def to_example(row: Row, index: int, options: ContextOptions) -> Example:
    """The passage, the question and the two answers to choose from; `yes` or `no`."""
    passage, cut = first_words(row["passage"], options.max_context_words)
    return Example(
        id=f"boolq-{index:05d}",
        task="boolq",
        prompt=f"{passage}\n\nQuestion: {row['question']}?\n{options_block(LABELS)}\n\nAnswer:",
        answer=label_of(LABELS, int(row["answer"])),
        labels=LABELS,
        truncated=cut,
    )


TASK = Task(
    name="boolq",
    version=1,
    summary="yes-or-no questions about a passage",
    source=HubSource("google/boolq", None, {"train": "train", "test": "validation"}),
    to_example=to_example,
    score=score_accuracy,
    metrics=("accuracy", "label_likelihood"),
    options=ContextOptions,
)
