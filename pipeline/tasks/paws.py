"""PAWS-Wiki, pairs of sentences of the same words that mean the same or not (Zhang et al. 2019, arXiv 1904.01130); free
for any purpose, with a request to name Google LLC as the source.

A raw row:
    {"id": 4182, "sentence1": "The album contains remixes of the material that was originally mixed by Nurse ...",
     "sentence2": "The album contains remixes of the material that was originally released by Nurse ...", "label": 0}

The texts come with a space before each punctuation mark, and keep it.
"""

from pipeline.tasks import Example, HubSource, NoOptions, Row, Task
from pipeline.tasks.classification import label_of, options_block, score_accuracy

LABELS = ("no", "yes")


def to_example(row: Row, index: int, options: NoOptions) -> Example:
    """The two sentences and the two answers to choose from; `yes` where they mean the same."""
    pair = f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}"
    return Example(
        id=f"paws-{index:05d}",
        task="paws",
        prompt=f"{pair}\n\nDo both sentences say the same?\n{options_block(LABELS)}\n\nAnswer:",
        answer=label_of(LABELS, row["label"]),
        labels=LABELS,
    )


TASK = Task(
    name="paws",
    version=1,
    summary="whether two sentences of the same words mean the same",
    source=HubSource(
        "google-research-datasets/paws",
        "labeled_final",
        {"train": "train", "validation": "validation", "test": "test"},
    ),
    to_example=to_example,
    score=score_accuracy,
    metrics=("accuracy", "label_likelihood"),
)
