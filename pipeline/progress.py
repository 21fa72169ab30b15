"""Progress with an ETA, on a terminal and in a log file. Called by every loop that lasts."""

import io
import sys

from tqdm import tqdm

_LINE_EVERY_S = 10.0


class Progress(tqdm):  # type: ignore[type-arg]
    """tqdm with a note: on a terminal one line is redrawn, elsewhere a line is written every 10 s.

    total: units of work in all; done: units there already at the start (they do not count into the rate).
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        live = sys.stdout.isatty()
        super().__init__(
            desc=label,
            total=total,
            initial=done,
            unit=f" {unit}",
            file=sys.stdout if live else _Lines(),
            mininterval=0.1 if live else _LINE_EVERY_S,
            dynamic_ncols=live,
            ncols=None if live else 0,
        )

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` is shown behind the ETA."""
        if note:
            self.set_postfix_str(note, refresh=False)
        self.update(count)

    def show(self, done: int) -> None:
        """So many units are done in all: fewer than before, where a worker died with some of them unsaved."""
        self.update(done - self.n)


class _Lines(io.TextIOBase):
    """Standard output for a progress bar that is not on a terminal: every redraw is a line of its own."""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        if line:
            print(line, flush=True)
        return len(text)


def progress(label: str, total: int, unit: str, done: int = 0) -> Progress:
    """A context manager: `with progress("stage 1", 30, "shards") as bar: bar.advance(1, note="...")`."""
    return Progress(label, total, unit, done)
