"""Tasks whose answer is one of a few labels: how the labels stand in a prompt, and how a generated one is read.

Called by `boolq`, `anli`, `paws` and `cosmos_qa`. What is scored here is the label that was written. The other reading,
which label the model finds likelier, needs the model and lives in stage 3 (`label_likelihood`); the two are reported
apart.
"""

import string
from collections.abc import Sequence

from pipeline.tasks import Example, Scores


def options_block(labels: Sequence[str]) -> str:
    """The labels as FLAN lists them: `OPTIONS:`, then one a line."""
    return "\n".join(["OPTIONS:", *(f"- {label}" for label in labels)])


def label_of(labels: Sequence[str], index: int) -> str:
    """The label with this number. Raises ValueError where there is none, as -1 in test sets without their labels."""
    if not 0 <= index < len(labels):
        raise ValueError(
            f"label {index}, but the labels are numbered 0 to {len(labels) - 1}; -1 marks a row whose label is "
            "withheld: leave such rows out, or take a split that has them"
        )
    return labels[index]


def score_accuracy(prediction: str, example: Example) -> Scores:
    """`accuracy`: whether the label that was written is the right one; None where it is none of the labels.

    Case, outer punctuation and white space do not count: ` Yes.` is `yes`. A label with anything else around it (`yes,
    because ...`) is none: to guess what was meant is another metric.
    """
    written = _bare(prediction)
    if written not in {_bare(label) for label in example.labels}:
        return {"accuracy": None}
    return {"accuracy": float(written == _bare(example.answer))}


def _bare(label: str) -> str:
    return " ".join(label.casefold().split()).strip(string.punctuation + " ")
