"""ANLI, whether a premise entails a sentence, from three rounds against models (Nie et al. 2020, arXiv 1910.14599),
CC BY-NC 4.0: not for commerce.

A raw row:
    {"uid": "...", "premise": "Tipp FM (Tipperary Local Radio), licensed since 1989 by the Broadcasting ...",
     "hypothesis": "County Tipperary is in Ireland", "label": 0, "reason": ""}

The three rounds count as one task, in their order.
"""

from pipeline.tasks import Example, HubSource, Row, Task
from pipeline.tasks.classification import label_of, options_block, score_accuracy
from pipeline.tasks.context import ContextOptions, first_words

LABELS = ("Yes", "It's impossible to say", "No")  # entailment, neutral, contradiction: the numbers of the rows


def to_example(row: Row, index: int, options: ContextOptions) -> Example:
    """The premise, whether the hypothesis follows, and the three answers to choose from; one of them."""
    premise, cut = first_words(row["premise"], options.max_context_words)
    question = f'Does it follow from this that "{row["hypothesis"].strip()}"?'
    return Example(
        id=f"anli-{index:05d}",
        task="anli",
        prompt=f"{premise}\n\n{question}\n{options_block(LABELS)}\n\nAnswer:",
        answer=label_of(LABELS, row["label"]),
        labels=LABELS,
        truncated=cut,
    )


TASK = Task(
    name="anli",
    version=1,
    summary="whether a sentence follows from a premise: yes, no, or impossible to say",
    source=HubSource(
        "facebook/anli",
        "plain_text",
        {
            "train": "train_r1+train_r2+train_r3",
            "validation": "dev_r1+dev_r2+dev_r3",
            "test": "test_r1+test_r2+test_r3",
        },
    ),
    to_example=to_example,
    score=score_accuracy,
    metrics=("accuracy", "label_likelihood"),
    options=ContextOptions,
)
