"""CommonGen, a sentence that uses a few given words (Lin et al. 2020, arXiv 1911.03705), MIT licence.

A raw row, one of several with the same concepts:
    {"concept_set_idx": 0, "concepts": ["field", "look", "stand"],
     "target": "The player stood in the field looking at the batter."}

Rows of one `concept_set_idx` are one example: the first `target` is the answer, all of them are `references`. Rows that
have a list of `references` already are read too. The official test sentences are withheld: our test is the
official validation set.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.tasks import Example, HubSource, NoOptions, Row, Task, texts


def gather(rows: Iterable[Row]) -> Iterator[Row]:
    """One row a concept set, in the order of first appearance, with every sentence among its `references`."""
    sets: dict[Any, dict[str, Any]] = {}
    for row in rows:
        whole = sets.setdefault(row["concept_set_idx"], {**row, "references": []})
        whole["references"].extend(row.get("references") or [row["target"]])
    return iter(sets.values())


def to_example(row: Row, index: int, options: NoOptions) -> Example:
    """The words, then what to do with them; a sentence. `extra["concepts"]` is what coverage looks for."""
    concepts = texts(row["concepts"])
    return Example(
        id=f"common_gen-{index:05d}",
        task="common_gen",
        prompt=f"Words: {', '.join(concepts)}\n\nWrite one sentence that uses all of these words.\n\nSentence:",
        answer=row["target"],
        references=tuple(dict.fromkeys(row["references"])),
        extra={"concepts": concepts},
    )


TASK = Task(
    name="common_gen",
    version=1,
    summary="sentences that use all of a few given words",
    source=HubSource("allenai/common_gen", None, {"train": "train", "test": "validation"}, rows=gather),
    to_example=to_example,
    metrics=("rouge_l", "coverage", "coverage_all"),
)
