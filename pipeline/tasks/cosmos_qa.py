"""Cosmos QA, what is behind a piece of a personal blog, four answers to choose from (Huang et al. 2019,
arXiv 1909.00277), CC BY 4.0. Its makers warn that the blogs may offend.

A raw row:
    {"id": "...", "context": "I was walking home from the store , when I saw an old man laying on the sidewalk , ...",
     "question": "What may happen after the young man makes his call ?",
     "answer0": "An ambulance would likely come to the scene", "answer1": "The taxi would pick up the young man",
     "answer2": "None of the above choices .", "answer3": "The bus would arrive at the stop soon", "label": 0}

The official test labels are withheld (-1 on the Hub): our test is the official validation set.
"""

from pipeline.tasks import Example, HubSource, Row, Task
from pipeline.tasks.classification import label_of, options_block, score_accuracy
from pipeline.tasks.context import ContextOptions, first_words


def to_example(row: Row, index: int, options: ContextOptions) -> Example:
    """The blog, the question and the four answers; the text of the right one, not its number."""
    context, cut = first_words(row["context"], options.max_context_words)
    labels = tuple(row[f"answer{number}"] for number in range(4))
    return Example(
        id=f"cosmos_qa-{index:05d}",
        task="cosmos_qa",
        prompt=f"{context}\n\nQuestion: {row['question']}\n{options_block(labels)}\n\nAnswer:",
        answer=label_of(labels, row["label"]),
        labels=labels,
        truncated=cut,
    )


TASK = Task(
    name="cosmos_qa",
    version=1,
    summary="what is behind a piece of a blog: four answers to choose from",
    source=HubSource(
        "allenai/cosmos_qa", None, {"train": "train", "test": "validation"}, revision="refs/convert/parquet"
    ),
    to_example=to_example,
    score=score_accuracy,
    metrics=("accuracy", "label_likelihood"),
    options=ContextOptions,
)
