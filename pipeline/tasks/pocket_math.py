"""Pocket word problems: arithmetic stories made on the spot, for the model that comes with this repository.

A raw row:
    {"question": "Ana has 6 boxes of 14 pens. She loses 27. How many pens are left?",
     "answer": "6 * 14 = 84. 84 - 27 = 57.\\n#### 57"}

Rows come from `pipeline.pocket.problems` by seed: nothing is downloaded, every machine makes the same ones, and no two
of train, validation, test and the model's pre-training share a problem. `validation` is for choosing settings, `test`
for reporting.
"""

from collections.abc import Iterator

from pipeline.pocket.documents import prompt_of
from pipeline.pocket.problems import split_problems
from pipeline.tasks import Example, NoOptions, Row, Scores, Task
from pipeline.tasks.numbers import score_number


def rows(split: str, options: NoOptions) -> Iterator[Row]:
    """The split's problems, in order, with worked answers."""
    for problem in split_problems(split):
        yield {"question": problem.question, "answer": problem.worked}


def to_example(row: Row, index: int, options: NoOptions) -> Example:
    """The question with the cue that pre-training put after it; the worked solution, ending `#### n`, is the answer."""
    return Example(
        id=f"pocket-{index:05d}", task="pocket_math", prompt=prompt_of(row["question"]), answer=row["answer"]
    )


def score(prediction: str, example: Example) -> Scores:
    """`strict` reads the `#### n` mark, `flexible` the last number; both compare as decimals."""
    return score_number(prediction, example.answer)


TASK = Task(
    name="pocket_math",
    version=1,
    summary="generated word problems of two or three calculations, worked answers ending `#### n`",
    source=rows,
    to_example=to_example,
    score=score,
    metrics=("strict", "flexible"),
)
