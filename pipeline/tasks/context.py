"""Long contexts are cut once, in words, before any tokenizer reads them.

Called by the tasks that have a context to cut (`boolq`, `squad`, `samsum`, `anli`, `xsum`, `cosmos_qa`). Teacher and
students therefore read the same text, whatever their tokenizers, and no question, instruction or answer is ever cut.
"""

import re

from pydantic import BaseModel, ConfigDict, Field

_WORD = re.compile(r"\S+")


class ContextOptions(BaseModel):
    """Options of a task with a context, under `data.tasks.<name>.options`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    max_context_words: int = Field(320, ge=1, description="words of the context that are kept, the first ones")


def first_words(text: str, limit: int) -> tuple[str, bool]:
    """The first `limit` words of a text, and whether that cut any. A word is what white space separates.

    What is kept is kept as it was: line breaks and double spaces too. Nothing is cut from a text of `limit` words or
    fewer. A negative `limit` is the caller's bug.
    """
    assert limit >= 0
    for number, word in enumerate(_WORD.finditer(text)):
        if number == limit:
            return text[: word.start()].rstrip(), True
    return text, False
