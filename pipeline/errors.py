"""The exceptions a user can cause: caught by every command line, printed without a traceback, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The message says what, where, found and expected, and the next command."""


class RecipeError(UserError):
    """A recipe or a `--set` override that does not pass its check."""


class DataError(UserError):
    """A task's rows are missing, empty or malformed."""


class ModelError(UserError):
    """A model, a tokenizer or a chat template that cannot serve what the recipe asks of it."""


class RunError(UserError):
    """A run folder whose content does not belong to this recipe, or cannot be read or written."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a misspelt `name`: the nearest known one, then all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [k for k in known if k.startswith(name)]
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{name}'.{hint} Known: {', '.join(known) or 'none'}."


def first_line(error: Exception) -> str:
    """What a library's error says, without the pages that may follow."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
