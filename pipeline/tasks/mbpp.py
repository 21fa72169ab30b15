"""MBPP, small Python functions described in a sentence (Austin et al. 2021, arXiv 2108.07732), CC BY 4.0.

A raw row:
    {"task_id": 11, "text": "Write a python function to remove first and last occurrence of a given character ...",
     "code": "def remove_Occ(s,ch): \\r\\n    for i in range(len(s)): ...", "test_setup_code": "",
     "test_list": ["assert remove_Occ(\\"hello\\",\\"l\\") == \\"heo\\"", ...], "challenge_test_list": [...]}

Most code has `\\r\\n` line ends and some ends in a lone `\\r`: the task makes them `\\n`, in tests and set-up too.
Nothing here runs any code.
"""

from pipeline.tasks import Example, HubSource, NoOptions, Row, Task, texts


def to_example(row: Row, index: int, options: NoOptions) -> Example:
    """The description and the first test, or nobody could know the function's name; the code.

    `extra` has what decides whether a program passes: all `tests`, and the `setup` that runs before them.
    """
    tests = [_unix(test) for test in texts(row["test_list"])]
    return Example(
        id=f"mbpp-{index:05d}",
        task="mbpp",
        prompt=f"{row['text']}\nThis test must pass:\n{tests[0]}\n\nPython code:",
        answer=_unix(row["code"]),
        extra={"tests": tests, "setup": _unix(row["test_setup_code"])},
    )


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


TASK = Task(
    name="mbpp",
    version=1,
    summary="small Python functions from a description, run against tests",
    source=HubSource(
        "google-research-datasets/mbpp", "full", {"train": "train", "validation": "validation", "test": "test"}
    ),
    to_example=to_example,
    metrics=("passes", "parses"),
)
