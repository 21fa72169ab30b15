"""What every command line shares: `--recipe`, `--set`, errors without a traceback, and progress with an ETA."""

import argparse
import io
import sys
from collections.abc import Callable, Sequence

from tqdm import tqdm

from cache_schema.errors import CacheError
from pipeline.errors import UserError
from pipeline.recipe import Recipe, load_recipe

EXIT_USER_ERROR = 2
_LINE_EVERY_S = 10.0


def recipe_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that knows `--recipe NAME-or-FILE` and any number of `--set key=value`."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    add_recipe_arguments(parser)
    return parser


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--recipe` and `--set` to a parser or a sub-command."""
    parser.add_argument(
        "--recipe", default="pocket", metavar="NAME-or-FILE", help="a built-in recipe, or a .yaml file (pocket)"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, for example train.lr=1e-4; may be given often",
    )


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe a parsed command line asks for."""
    return load_recipe(args.recipe, args.overrides)


def recipe_arguments(args: argparse.Namespace) -> list[str]:
    """The same `--recipe` and `--set` again, for a child process or for a hint to the user."""
    return ["--recipe", args.recipe, *(part for override in args.overrides for part in ("--set", override))]


def guarded(main: Callable[[Sequence[str] | None], int]) -> int:
    """Run a command line's main: users' mistakes end on stderr with exit code 2, an interrupt with 130."""
    try:
        return main(None)
    except (UserError, CacheError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, run the same command again to go on", file=sys.stderr)
        return 130


class Progress(tqdm):
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
            bar_format="{desc}: {n_fmt}/{total_fmt}{unit} ({percentage:.0f} %) {rate_noinv_fmt}, {elapsed}<{remaining}{postfix}",
        )

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` is shown behind the ETA."""
        if note:
            self.set_postfix_str(note, refresh=False)
        self.update(count)


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
