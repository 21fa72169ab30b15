"""Numbers in answers: found strictly or flexibly, compared as decimals. Shared by the arithmetic tasks; no task itself.

The two ways to find an answer are those of lm-evaluation-harness' gsm8k task, reported apart. They differ from it on
purpose in what counts as the same number: `18.00` is 18, `#### $18` is read, and a text such as `..` is no number.
"""

import re
from decimal import Decimal, InvalidOperation

_STRICT = re.compile(r"####\s*([-+]?\s?\$?\s?-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"[-+]?\$?-?\d[\d,]*(?:\.\d+)?|[-+]?\$?\.\d+")


def parse_number(text: str) -> Decimal | None:
    """The decimal that `text` writes, without `$`, thousands commas, spaces or a trailing period; None if it is none."""
    bare = text.replace("$", "").replace(",", "").replace(" ", "").rstrip(".")
    try:
        value = Decimal(bare)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def extract_strict(text: str) -> Decimal | None:
    """The number behind the first `####`; None where there is no such mark or no number behind it.

    The first, since a model ends its answer there: what follows would be another problem that it went on to invent.
    """
    match = _STRICT.search(text)
    return parse_number(match[1]) if match else None


def extract_flexible(text: str) -> Decimal | None:
    """The last number anywhere in the text; None where there is none."""
    found = _FLEXIBLE.findall(text)
    return parse_number(found[-1]) if found else None


def score_number(prediction: str, gold: str) -> dict[str, float | None]:
    """1.0 where the prediction's number equals the gold answer's, 0.0 where not, None where it has none.

    Raises ValueError when the gold answer itself has no `#### n` mark.
    """
    expected = extract_strict(gold)
    if expected is None:
        raise ValueError(f"the gold answer has no '#### n': {gold!r}")
    scores: dict[str, float | None] = {}
    for name, found in (("strict", extract_strict(prediction)), ("flexible", extract_flexible(prediction))):
        scores[name] = None if found is None else float(found == expected)
    return scores
