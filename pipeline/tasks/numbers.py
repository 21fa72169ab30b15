"""Reading the number out of a worked answer, and comparing it as a decimal.

Called by the tasks whose answers end `#### n` (`gsm8k`, `pocket_math`).

Two readings, reported apart. *Strict* takes the number after the first `####`: a model that stops at end-of-sequence
writes the mark once, and one that runs on (into a question of its own, say) is judged by its first answer, as
lm-evaluation-harness does. *Flexible* takes the last number of the text, whatever stands around it. Both forgive what
changes no value: thousands commas, `$`, a closing full stop, `18.00` for 18.
"""

import re
from decimal import Decimal

_MARKED = re.compile(r"####[^\S\n]*([-+]?[^\S\n]*\$?[^\S\n]*[-+]?[0-9.,]+)")
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_ANYWHERE = re.compile(rf"(?:(?<![0-9)])-\$?|\$-)?(?:{_DIGITS}(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)")
_WRITTEN = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")


def parse_number(text: str) -> Decimal | None:
    """The value of a written number (`-1,234.50`, `$18`, `18.`, `.5`), or None if `text` is not one number."""
    bare = re.sub(r"[\s,$]", "", text).removesuffix(".")
    return Decimal(bare) if _WRITTEN.fullmatch(bare) else None


def extract_strict(text: str) -> Decimal | None:
    """The number after the first `####`, on the same line; None where there is no mark or no number follows it."""
    found = _MARKED.search(text) if "####" in text else None
    if found is None or text.find("####") != found.start():
        return None
    return parse_number(found.group(1))


def extract_flexible(text: str) -> Decimal | None:
    """The last number anywhere in the text, or None where there is none. A minus counts unless it subtracts (`7-3`)."""
    found = _ANYWHERE.findall(text)
    return parse_number(found[-1]) if found else None


def score_number(prediction: str, answer: str) -> dict[str, float | None]:
    """`strict` and `flexible`: 1 where the prediction's number equals the answer's, 0 where not, None where none.

    Raises ValueError if `answer`, the reference, has no strict number: then the data is at fault, not the prediction.
    """
    expected = extract_strict(answer)
    if expected is None:
        raise ValueError(f"the reference answer has no number after ####: {answer[-80:]!r}")
    found = {"strict": extract_strict(prediction), "flexible": extract_flexible(prediction)}
    return {name: None if value is None else float(value == expected) for name, value in found.items()}
