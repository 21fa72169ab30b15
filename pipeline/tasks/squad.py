"""SQuAD 1.1, questions whose answer is a span of a paragraph (Rajpurkar et al. 2016, arXiv 1606.05250), CC BY-SA 4.0.

A raw row:
    {"id": "57274b35f1498d1400e8f5d6", "title": "Private_school",
     "context": "Ergänzungsschulen are secondary or post-secondary (non-tertiary) schools, which are run by ...",
     "question": "How are ergänzungsschulen funded?", "answers": {"text": ["tuition"], "answer_start": [494]}}

The official test set is hidden: our test is the official validation set, with its several answers to a question. The
first one is the answer to learn from.

A cut context may lose the answer: of the 2,000 training rows that were tried 14 are cut, and 2 of them lose it. Such
rows stay, as they would in any pipeline with a window, and are marked `answer_cut` in `Example.extra`.
"""

from typing import Any

from pipeline.tasks import Example, HubSource, Row, Task, texts
from pipeline.tasks.context import ContextOptions, first_words
from pipeline.tasks.squad_metrics import score_answer


def to_example(row: Row, index: int, options: ContextOptions) -> Example:
    """The title, the paragraph and the question; the first answer, with all different ones as references."""
    answers = tuple(dict.fromkeys(texts(row["answers"]["text"])))
    if not answers:
        raise ValueError("no answer: SQuAD 1.1 has none without, SQuAD 2.0 does")
    context, cut = first_words(row["context"], options.max_context_words)
    title = row["title"].replace("_", " ")
    extra: dict[str, Any] = {"answer_cut": True} if cut and answers[0] not in context else {}
    return Example(
        id=f"squad-{index:05d}",
        task="squad",
        prompt=f"From an article about {title}:\n\n{context}\n\nQuestion: {row['question'].strip()}\n\nAnswer:",
        answer=answers[0],
        references=answers,
        truncated=cut,
        extra=extra,
    )


TASK = Task(
    name="squad",
    version=1,
    summary="questions answered by a span of a paragraph",
    source=HubSource("rajpurkar/squad", None, {"train": "train", "test": "validation"}),
    to_example=to_example,
    score=score_answer,
    metrics=("f1", "exact_match"),
    options=ContextOptions,
)
