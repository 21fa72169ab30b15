"""What a command says, and to whom: to a person, to a script that wants the result alone, or to a machine.

    --quiet   stdout has the result alone
    --json    stdout has one JSON object a line, flushed; whatever else a command says goes to stderr
              {"event": "progress", "command", "stage", "done", "total", "unit", "rate", "eta_s", "note"}
              {"event": "result", "command", "exit_code", ...}: the last line, with "error" where there is one

Errors are on stderr in each. A command that starts others hands its way of speaking down through the environment, so
that their lines stand between its own: "command" tells whose a line is. Called by `cli`, `progress` and every command.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

VARIABLE = "LOGITBANK_OUTPUT"
PLAIN, QUIET, JSON = "plain", "quiet", "json"


class _Said(io.TextIOBase):
    """Standard output while it is not for everything that is printed: keeps that, and passes it on where `to` is."""

    def __init__(self, to: TextIO | None) -> None:
        self.text, self._to = "", to

    def write(self, text: str) -> int:
        self.text += text
        if self._to is not None:
            self._to.write(text)
        return len(text)

    def flush(self) -> None:
        if self._to is not None:
            self._to.flush()

    def fileno(self) -> int:
        """Of what is printed past Python: stderr's."""
        return sys.stderr.fileno()


class _State:
    """Of this process. stdout: the real one, None where nothing stands in its place. result: for machines. told: to
    people."""

    mode, command = PLAIN, ""
    stdout: TextIO | None = None
    said: _Said | None = None
    result: dict[str, Any] | None = None
    told = False


_state = _State()


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--quiet` and `--json` to a parser or a sub-command."""
    either = parser.add_mutually_exclusive_group()
    about = {
        QUIET: "print errors and the result alone",
        JSON: "print one JSON object a line: progress, then the result",
    }
    for mode, text in about.items():
        either.add_argument(f"--{mode}", dest="output", action="store_const", const=mode, help=text)


def choose(args: argparse.Namespace) -> None:
    """Speak as a parsed command line asks, else as whoever started this process does. `whole` ends it."""
    asked = getattr(args, "output", None) or os.environ.get(VARIABLE, PLAIN)
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else ""
    _state.command = " ".join(filter(None, (name, getattr(args, "command", None))))
    _state.mode = asked if asked in (QUIET, JSON) else PLAIN
    os.environ[VARIABLE] = _state.mode
    sys.stdout, _state.stdout = _state.stdout or sys.stdout, None
    if _state.mode != PLAIN:
        _state.stdout, _state.said = sys.stdout, _Said(sys.stderr if _state.mode == JSON else None)
        sys.stdout = _state.said


def mode() -> str:
    """How this process speaks: PLAIN, QUIET or JSON."""
    return _state.mode


def event(name: str, **fields: Any) -> None:
    """One line for a machine; nothing unless it was asked for."""
    if _state.mode == JSON and _state.stdout is not None:
        line = {"event": name, "command": _state.command, **fields}
        _state.stdout.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        _state.stdout.flush()


def result(text: str, **fields: Any) -> None:
    """What the command was called for: `text` for people, `fields` for machines, or the text where there are none.

    A command that never tells a result has all that it prints for one.
    """
    print(text, file=_state.stdout if _state.mode == QUIET else None, flush=True)
    _state.told = True
    facts(**(fields or {"text": text}))


def facts(**fields: Any) -> None:
    """More of the result, for machines alone."""
    _state.result = (_state.result or {}) | fields


def stdout() -> TextIO:
    """The real one, whatever stands in its place."""
    return _state.stdout or sys.stdout


@contextmanager
def whole() -> Iterator[None]:
    """Around a command: what `choose` changes is changed back at the end."""
    above = os.environ.get(VARIABLE)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        os.environ.update({} if above is None else {VARIABLE: above})
        if _state.stdout is not None:
            sys.stdout = _state.stdout
        _state.mode, _state.stdout, _state.said, _state.result, _state.told = PLAIN, None, None, None, False


def finish(code: int, error: str | None = None) -> None:
    """Tell the result, when the exit code is known. error: what was said of it on stderr."""
    said = _state.said.text if _state.said is not None else ""
    if _state.mode == JSON:
        fields = _state.result if _state.result is not None else {"text": said} if error is None else {}
        event("result", exit_code=code, **fields, **({} if error is None else {"error": error}))
    elif _state.mode == QUIET and _state.stdout is not None and not _state.told and code == 0:
        _state.stdout.write(said)
        _state.stdout.flush()
