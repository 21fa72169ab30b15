"""What every command line shares: `--recipe`, `--set`, errors without a traceback, exit codes. Imports nothing heavy.

Exit codes: 0 all that was asked for is there; 2 a mistake that stops everything, said on stderr; 3 what could be done
is done, but something is missing, listed with the command that tries it again; 130 and 143 stopped by SIGINT and
SIGTERM, see `stopping`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schema.errors import CacheError
from pipeline import output
from pipeline.errors import RecipeError, UserError
from pipeline.stopping import Stopped, how_to_go_on, listening

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

EXIT_USER_ERROR = 2
EXIT_INCOMPLETE = 3


def examples(lines: Sequence[str]) -> dict[str, Any]:
    """What a parser's constructor takes so that its `--help` ends with these command lines."""
    shown = "examples:\n" + "\n".join(f"  {line}" for line in lines)
    return {"epilog": shown, "formatter_class": argparse.RawDescriptionHelpFormatter}


def recipe_parser(prog: str, description: str, shown: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser that knows `--recipe NAME-or-FILE`, any number of `--set key=value`, `--quiet` and `--json`. shown: its
    examples."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description, **examples(shown))
    add_recipe_arguments(parser)
    output.add_output_arguments(parser)
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


def add_executor_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--executor`, another spelling of `--set runtime.executor=...`."""
    parser.add_argument(
        "--executor",
        dest="overrides",
        action="append",
        type="runtime.executor={}".format,
        metavar="local|ray|ray://HOST:PORT",
        help="where stages 1 and 3 work: in this process, or on the workers of a Ray cluster (local)",
    )


def add_probe_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--probe N` and `--probe-out`, by which `python -m pipeline plan` has a stage measured."""
    parser.add_argument("--probe", type=positive, metavar="N", help=what)
    parser.add_argument("--probe-out", metavar="FOLDER", help="where the findings of --probe go")


def probe_folder(args: argparse.Namespace) -> Path:
    """The folder that `--probe-out` names. Raises RecipeError without it."""
    if args.probe_out is None:
        raise RecipeError("--probe: --probe-out <folder> is missing; or let `python -m pipeline plan` do it all")
    return Path(args.probe_out)


def positive(text: str) -> int:
    """A whole number of 1 or more, as an argument's type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {number}")
    return number


def recipe_of(args: argparse.Namespace) -> "Recipe":
    """The recipe a parsed command line asks for."""
    from pipeline.recipe import load_recipe

    return load_recipe(args.recipe, args.overrides)


def recipe_arguments(args: argparse.Namespace) -> list[str]:
    """The same `--recipe` and `--set` again, for a child process or for a hint to the user."""
    return ["--recipe", args.recipe, *(part for override in args.overrides for part in ("--set", override))]


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, taken; from here on the command speaks as it asks, see `output`."""
    args = parser.parse_args(argv)
    output.choose(args)
    return args


def guarded(main: Callable[[Sequence[str] | None], int]) -> int:
    """Run a command line's main: users' mistakes end on stderr with exit code 2, signals as `stopping` says."""
    with output.whole():
        try:
            output.choose(argparse.Namespace())  # as a parent does, until the command line says otherwise
            with listening():
                code = main(None)
            output.finish(code)
        except (UserError, CacheError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = EXIT_USER_ERROR
            output.finish(code, str(error))
        except BrokenPipeError:  # `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), output.stdout().fileno())
            code = 0
        except KeyboardInterrupt as stop:
            told = how_to_go_on()
            print(told, end="\n" if told else "", file=sys.stderr)
            code = stop.code if isinstance(stop, Stopped) else 130
            output.finish(code, told or "stopped")
    return code
