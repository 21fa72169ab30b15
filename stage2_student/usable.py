"""Which rows of a cache a student can train on, found before the order of training is built. Called by `train`.

Only the text, the student's tokenizer, its window and its vocabulary decide, so every arm of a student trains on the
same rows. Reading and tokenising a whole cache takes long, so each process of a group measures a part of it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cache_schema.reader import CacheReader
from cache_schema.schema import TEXT
from pipeline.errors import DataError
from pipeline.prompts import PromptBuilder


@dataclass(frozen=True)
class Usable:
    """The rows of a cache that a student can read whole: `rows` are row numbers, the same for all its arms.

    too_long: beyond its window. unreadable: its tokenizer or template fails on them, or has a token that the model has
    no row for, or makes nothing of the prompt. longest: tokens of the longest example, prompt and answer together.
    """

    rows: list[int]
    too_long: int
    unreadable: int
    longest: int

    @property
    def dropped(self) -> int:
        return self.too_long + self.unreadable


def lengths(
    reader: CacheReader,
    prompts: PromptBuilder,
    rows: Sequence[int],
    vocab_size: int | None = None,
    report: Callable[[], object] = lambda: None,
) -> list[int]:
    """The student's tokens of each of these rows, prompt and answer together; 0 where it cannot read it.

    vocab_size: ids that it has (None: any). report: called after each row.
    """
    found = []
    for index in rows:
        (row,) = reader.read([index], TEXT)
        encoded = prompts.try_encode(row.prompt, row.answer)
        if encoded is None or encoded.answer_start == 0 or max(encoded.input_ids) >= (vocab_size or math.inf):
            found.append(0)
        else:
            found.append(len(encoded.input_ids))
        report()
    return found


def usable_rows(lengths: Sequence[int], prompts: PromptBuilder, window: int | None) -> Usable:
    """Drop what cannot be read and what does not fit a window of `window` tokens. Raises DataError if nothing is left.

    lengths: of all rows of the cache, in order.
    """
    rows = [index for index, length in enumerate(lengths) if length and (window is None or length <= window)]
    unreadable = sum(not length for length in lengths)
    if not rows:
        found = "the cache has no rows" if not lengths else f"it can read none of the {len(lengths)} examples at all"
        if unreadable < len(lengths):
            shortest = min(length for length in lengths if length)
            found = f"the shortest of {len(lengths)} examples has {shortest} tokens"
        raise DataError(
            f"no example fits the student {prompts.tokenizer.name_or_path}, which reads {window} tokens: {found}; "
            "use a student with a longer window, or a task with shorter examples"
        )
    return Usable(rows, len(lengths) - len(rows) - unreadable, unreadable, max(lengths))
