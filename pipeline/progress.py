"""How far a loop is, how fast and how long yet: a bar on a terminal, else lines. Called by every loop that lasts.

    with progress("stage 1", 30, "shards") as bar:
        bar.advance(1, note="...")
    with waiting("loading the model"):

A terminal gets a bar that is redrawn (by rich), a log file a whole line every 10 s, `--json` an object a second and
`--quiet` nothing. Of torchrun's processes the first one alone draws. A loop inside another has its bar below that
one's, and no lines in a log unless it lasts.
"""

import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

from pipeline import output

_LINE_EVERY_S = 10.0
_EVENT_EVERY_S = 1.0
_WINDOW_S = 60.0  # the rate is that of the last minute: a loop's units need not all be alike
_WAIT_IS_LONG_S = 5.0


class Pace:
    """Units done over time. clock: seconds, from anywhere."""

    def __init__(self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done = total, done
        self._clock, self._began = clock, clock()
        self._seen: deque[tuple[float, int]] = deque([(self._began, done)])

    def to(self, done: int) -> None:
        """So many are done now. Where that is fewer than before, the rate is measured anew from here; and where it is
        still what was there at the start, since a loop may begin with the loading of its model."""
        now = self._clock()
        if done < self.done or done == self._seen[0][1]:
            self._seen.clear()
        self.done = done
        if not self._seen or now - self._seen[-1][0] >= _WINDOW_S / 60:
            self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > _WINDOW_S:
            self._seen.popleft()

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return self._clock() - self._began

    @property
    def rate(self) -> float | None:
        """Units a second over the last minute, without what was there at the start; None before the first is done."""
        since, was = self._seen[0]
        seconds = self._clock() - since
        return (self.done - was) / seconds if self.done > was and seconds > 0 else None

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end, None where nobody knows."""
        if self.done >= self.total:
            return 0.0
        return (self.total - self.done) / self.rate if self.rate else None


class Display(Protocol):
    """Who is told of a loop."""

    def begin(self) -> None: ...
    def update(self, note: str) -> None: ...
    def end(self, note: str) -> None: ...


class Progress:
    """A loop's progress, a context.

    total: units of work in all; done: units there already at the start (they do not count into the rate).
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self.label, self.unit, self.pace = label, unit, Pace(total, done)
        self._note = ""
        self._display = _display(self)

    @property
    def n(self) -> int:
        """Units done."""
        return self.pace.done

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` is shown behind the ETA."""
        self._note = note or self._note
        self.show(self.pace.done + count)

    def show(self, done: int) -> None:
        """So many units are done in all: fewer than before, where a worker died with some of them unsaved."""
        self.pace.to(done)
        self._display.update(self._note)

    def __enter__(self) -> "Progress":
        self._display.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.end(self._note)


def progress(label: str, total: int, unit: str, done: int = 0) -> Progress:
    """The progress of a loop over `total` units, named in the plural."""
    return Progress(label, total, unit, done)


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """What lasts and has no parts to count: a spinner; in a log a line, if it lasts."""
    first = os.environ.get("RANK", "0") == "0"
    if output.mode() == output.PLAIN and sys.stdout.isatty() and first:
        if _Bar.outer is not None:
            with _Bar.outer.task(f"{label} ..."):
                yield
            return
        from rich.console import Console
        from rich.text import Text

        with Console(file=sys.stdout).status(Text(f"{label} ...")):
            yield
        return
    output.event("progress", stage=label, done=0, total=1, unit="", rate=None, eta_s=None, note="")
    said = threading.Timer(_WAIT_IS_LONG_S, lambda: print(f"{label} ...", flush=True))
    said.daemon = True
    if first:
        said.start()
    try:
        yield
    finally:
        said.cancel()
    output.event("progress", stage=label, done=1, total=1, unit="", rate=None, eta_s=0.0, note="")


def rate_text(rate: float | None, unit: str) -> str:
    """`12.3 steps/s`, or `2.50 s/step` where one lasts longer than a second."""
    if rate is None:
        return f"? {unit}/s"
    if rate < 1:
        return f"{1 / rate:,.3g} s/{unit.removesuffix('s')}"
    return f"{rate:,.3g} {unit}/s" if rate < 1000 else f"{rate:,.0f} {unit}/s"


def clock_text(seconds: float | None) -> str:
    """`1:02:03` or `02:03`."""
    if seconds is None:
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m:02}:{s:02}"


def _display(bar: Progress) -> Display:
    if output.mode() == output.JSON:
        return _Events(bar)
    if output.mode() == output.QUIET:
        return _Nothing()
    if sys.stdout.isatty():
        return _Bar(bar) if os.environ.get("RANK", "0") == "0" else _Nothing()
    return _Lines(bar)


class _Nothing:
    def begin(self) -> None:
        pass

    def update(self, note: str) -> None:
        pass

    def end(self, note: str) -> None:
        pass


class _Sometimes(ABC):
    """Tells at the beginning, at the end, and every so often in between."""

    every_s: float

    def __init__(self, bar: Progress) -> None:
        self.bar, self.lines = bar, 0
        self._told: tuple[float, int] | None = None

    @abstractmethod
    def tell(self, note: str) -> None:
        """Say how far it is."""

    def begin(self) -> None:
        self._tell("")

    def update(self, note: str) -> None:
        if self._told is None or time.monotonic() - self._told[0] >= self.every_s:
            self._tell(note)

    def end(self, note: str) -> None:
        if self._told is None or self._told[1] != self.bar.n:
            self._tell(note)

    def _tell(self, note: str) -> None:
        self._told = time.monotonic(), self.bar.n
        self.lines += 1
        self.tell(note)


class _Lines(_Sometimes):
    every_s = _LINE_EVERY_S
    open = 0  # bars, one inside the other

    def begin(self) -> None:
        if _Lines.open == 0:
            super().begin()
        else:
            self._told = time.monotonic(), self.bar.n
        _Lines.open += 1

    def end(self, note: str) -> None:
        _Lines.open -= 1
        if _Lines.open == 0 or self.lines:
            super().end(note)

    def tell(self, note: str) -> None:
        pace = self.bar.pace
        share = 100 * pace.done // pace.total if pace.total else 100
        times = f"{clock_text(pace.elapsed_s)}<{clock_text(pace.eta_s)}"
        behind = ", ".join(filter(None, (times, rate_text(pace.rate, self.bar.unit), note)))
        print(f"{self.bar.label}: {share}% {pace.done}/{pace.total} {self.bar.unit} [{behind}]", flush=True)


class _Events(_Sometimes):
    every_s = _EVENT_EVERY_S

    def tell(self, note: str) -> None:
        pace = self.bar.pace
        counted: dict[str, Any] = {"done": pace.done, "total": pace.total, "unit": self.bar.unit}
        output.event("progress", stage=self.bar.label, **counted, rate=pace.rate, eta_s=pace.eta_s, note=note)


class _Bar:
    """A line that is redrawn ten times a second at most; what is printed meanwhile stands above it."""

    outer: "_Bar | None" = None

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._rich: Any = None
        self._task: Any = None

    def begin(self) -> None:
        self._rich = _rich_bars() if _Bar.outer is None else _Bar.outer._rich
        self._task = self._rich.add_task(self._bar.label, total=self._bar.pace.total, completed=self._bar.n, note="")
        if _Bar.outer is None:
            _Bar.outer = self
            self._rich.start()

    def update(self, note: str) -> None:
        pace, unit = self._bar.pace, self._bar.unit
        counts = f"{pace.done:,}/{pace.total:,} {unit}"
        shown = "  ".join(filter(None, (counts, rate_text(pace.rate, unit), f"ETA {clock_text(pace.eta_s)}", note)))
        self._rich.update(self._task, completed=pace.done, note=shown)

    def end(self, note: str) -> None:
        self.update(note)
        if _Bar.outer is self:
            _Bar.outer = None
            self._rich.stop()
        else:
            self._rich.remove_task(self._task)

    @contextmanager
    def task(self, label: str) -> Iterator[None]:
        """A line below, of something that has no parts to count."""
        task = self._rich.add_task(label, total=None, note="")
        try:
            yield
        finally:
            self._rich.remove_task(task)


def _rich_bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    rest = TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1, no_wrap=True))
    texts = ("{task.description}", "{task.percentage:>3.0f}%")
    label, share = (TextColumn(text, markup=False, table_column=Column(no_wrap=True)) for text in texts)
    return Progress(label, BarColumn(20), share, rest, console=Console(file=sys.stdout), expand=True)
