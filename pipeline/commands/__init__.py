"""The sub-commands of the front door, one file each, named as they are typed.

A file gives HELP (one line), EXAMPLES (what `--help` ends with), `add_arguments(parser)` and `run(args) -> exit code`.
They are imported for `--help`: nothing heavy at the top.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

NAMES = ("run", "plan", "show", "status", "recipes", "sweep", "export", "completion")


def modules(names: Sequence[str] = NAMES) -> dict[str, ModuleType]:
    """The files of this folder by the names of their commands."""
    return {name: import_module(f"pipeline.commands.{name}") for name in names}
