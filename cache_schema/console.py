"""What `python -m cache_schema` says, and to whom: a person, a script that wants the result alone, or a machine.

    --quiet   stdout has the result alone: what is bad, and the verdict
    --json    stdout has one JSON object a line, {"event": "progress", ...} and at last {"event": "result", ...}; the
              rest goes to stderr

Called by `__main__`. `pipeline.output` says the same of the other commands, which this package imports nothing of.
"""

from __future__ import annotations

import io
import json
import sys
import time
from contextlib import redirect_stdout
from types import TracebackType
from typing import Any, TextIO

PLAIN, QUIET, JSON = "plain", "quiet", "json"
_LINE_EVERY_S, _EVENT_EVERY_S, _REDRAWN_EVERY_S = 10.0, 1.0, 0.1


class Console:
    """A context: inside, what is printed goes where the mode has it. command: whose lines they are."""

    def __init__(self, mode: str, command: str) -> None:
        self.mode, self.command = mode, f"cache_schema {command}"
        self._stdout: TextIO = sys.stdout
        self._kept = io.StringIO()
        self._fields: dict[str, Any] = {}
        self._told = False
        self._began = self._shown = 0.0
        self._redirected: redirect_stdout[Any] | None = None

    def __enter__(self) -> Console:
        self._stdout = sys.stdout
        if self.mode != PLAIN:
            self._redirected = redirect_stdout(sys.stderr if self.mode == JSON else self._kept)
            self._redirected.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._redirected is not None:
            self._redirected.__exit__(kind, error, trace)

    def result(self, text: str, **fields: Any) -> None:
        """A line of the result: text for people, fields for machines."""
        print(text, file=self._stdout if self.mode == QUIET else None)
        self._told = True
        self.facts(**fields)

    def facts(self, **fields: Any) -> None:
        """More of the result, for machines alone."""
        self._fields |= fields

    def progress(self, done: int, total: int) -> None:
        """So many shards of so many are looked at: with rate and ETA on stderr, redrawn or a line now and then."""
        now = time.monotonic()
        self._began = self._began or now  # the first call is after the first shard, so that one counts not
        live = sys.stderr.isatty()
        every_s = _EVENT_EVERY_S if self.mode == JSON else _REDRAWN_EVERY_S if live else _LINE_EVERY_S
        if self.mode == QUIET or (done < total and now - (self._shown or self._began) < every_s):
            return
        self._shown = now
        rate = (done - 1) / (now - self._began) if done > 1 and now > self._began else None
        eta_s = 0.0 if done >= total else (total - done) / rate if rate else None
        if self.mode == JSON:
            shown = {"stage": self.command, "done": done, "total": total, "unit": "shards", "rate": rate}
            self._event("progress", **shown, eta_s=eta_s, note="")
            return
        pace = f", {rate:.3g} shards/s" if rate else ""
        left = f", ETA {int(eta_s) // 60:02}:{int(eta_s) % 60:02}" if eta_s else ""
        line = f"shard {done} of {total}{pace}{left}"
        if live:
            print(f"\r{line:<60}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done < total:  # where nothing lasts, a log needs no line
            print(line, file=sys.stderr, flush=True)

    def finish(self, code: int, error: str | None = None) -> int:
        """Tell the result, now that the exit code is known; the code. error: what was said of it on stderr."""
        if self.mode == JSON:
            self._event("result", exit_code=code, **self._fields, **({} if error is None else {"error": error}))
        elif self.mode == QUIET and not self._told and error is None:
            self._stdout.write(self._kept.getvalue())
        return code

    def _event(self, name: str, **fields: Any) -> None:
        line = json.dumps({"event": name, "command": self.command, **fields}, ensure_ascii=False, default=str)
        print(line, file=self._stdout, flush=True)
