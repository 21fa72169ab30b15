"""The front door: `python -m pipeline COMMAND`. Each command is a file in `pipeline/commands`."""

import argparse
import sys
from collections.abc import Sequence

from pipeline.cli import examples, guarded, parsed
from pipeline.commands import modules
from pipeline.output import add_output_arguments


def parser() -> argparse.ArgumentParser:
    """The command line with every sub-command. Nothing heavy is imported for it."""
    door = argparse.ArgumentParser(prog="python -m pipeline", description="Distil a language model offline.")
    found = modules()
    commands = door.add_subparsers(dest="command", required=True, metavar="|".join(found))
    for name, module in found.items():
        about = (module.__doc__ or "").partition(": ")[2]
        command = commands.add_parser(name, help=module.HELP, description=about, **examples(module.EXAMPLES))
        module.add_arguments(command)
        add_output_arguments(command)
        command.set_defaults(run=module.run)
    return door


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a sub-command."""
    args = parsed(parser(), argv)
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(guarded(main))
