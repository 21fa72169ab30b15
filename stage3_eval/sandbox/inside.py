"""What runs inside the sandbox: `sandbox.run` starts Python there with this text. The standard library alone.

It reads a request from stdin, one JSON object, and answers with JSON, a line each: `"ready"` before any code that is
not ours, then the value of each expression, evaluated one after the other. It stops at the first that raises.

    limits: {name of a resource: value}      code: source texts, run in turn in one namespace
    given: {name: a value as it was answered, still as JSON text}      expressions: source texts

A value is answered as plain data: null, booleans, numbers and texts as themselves; containers and the other numbers as
an object of one key, their type; anything else as {"other": ""}, which equals nothing. Whoever reads an answer must
not believe it: the code that was run shares this process, and can write what it likes.
"""

import json
import os
import resource
import sys
from collections.abc import Set
from decimal import Decimal
from fractions import Fraction
from types import ModuleType
from typing import Any


def plain(value: Any) -> Any:
    """A value as JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Fraction):
        return {"fraction": [value.numerator, value.denominator]}
    if isinstance(value, Decimal):
        return {"decimal": str(value)}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return {"list": [plain(part) for part in value]}
    if isinstance(value, tuple):
        return {"tuple": [plain(part) for part in value]}
    if isinstance(value, Set):
        return {"set": [plain(part) for part in value]}
    if isinstance(value, dict):
        return {"dict": [[plain(key), plain(part)] for key, part in value.items()]}
    return {"other": ""}


def value_of(found: Any) -> Any:
    """The value that `plain` wrote. Anything malformed raises."""
    if not isinstance(found, dict):
        return found
    ((kind, content),) = found.items()
    if kind == "dict":
        return {value_of(key): value_of(part) for key, part in content}
    if kind in ("list", "tuple", "set"):
        return {"list": list, "tuple": tuple, "set": frozenset}[kind](value_of(part) for part in content)
    if kind in ("complex", "fraction"):
        return {"complex": complex, "fraction": Fraction}[kind](*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    return Decimal(content) if kind == "decimal" else object()


def main() -> None:
    """Answer the request on what is stdout now; the code itself gets /dev/null."""
    request = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    sys.set_int_max_str_digits(0)
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    print('"ready"', file=answers, flush=True)
    module = sys.modules["program"] = ModuleType("program")  # found there by whoever looks for a class's module
    names = module.__dict__
    names |= {name: value_of(json.loads(text)) for name, text in request["given"].items()}
    for code in request["code"]:
        exec(compile(code, "program", "exec"), names)  # noqa: S102 (this is the sandbox)
    for expression in request["expressions"]:
        value = plain(eval(compile(expression, "test", "eval"), names))  # noqa: S307 (likewise)
        print(json.dumps(value), file=answers, flush=True)


if __name__ == "__main__":
    main()
