"""GSM8K, grade-school mathematics in words (Cobbe et al. 2021, arXiv 2110.14168), MIT licence.

A raw row:
    {"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. ...",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\n... in April and May.\\n#### 72"}

The answer is kept raw by default, calculator marks `<<48/2=24>>` included, as published; the option
`strip_calculator_marks` removes them (it is part of the cache's identity, like every option).
"""

import re

from pydantic import BaseModel, ConfigDict, Field

from pipeline.tasks import Example, HubSource, Row, Scores, Task
from pipeline.tasks.numbers import score_number

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


class Options(BaseModel):
    """Options of the task, under `data.tasks.gsm8k.options`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    strip_calculator_marks: bool = Field(False, description="remove the <<48/2=24>> marks from the answers")


def to_example(row: Row, index: int, options: Options) -> Example:
    """The bare question is the prompt; the worked solution, ending `#### n`, is the answer."""
    answer = row["answer"]
    if options.strip_calculator_marks:
        answer = _CALCULATOR_MARK.sub("", answer)
    return Example(id=f"gsm8k-{index:05d}", task="gsm8k", prompt=row["question"], answer=answer)


def score(prediction: str, example: Example) -> Scores:
    """`strict` reads the `#### n` mark, `flexible` the last number; both compare as decimals."""
    return score_number(prediction, example.answer)


TASK = Task(
    name="gsm8k",
    version=1,
    summary="grade-school word problems, worked answers ending `#### n`",
    source=HubSource("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    to_example=to_example,
    score=score,
    metrics=("strict", "flexible"),
    options=Options,
)
