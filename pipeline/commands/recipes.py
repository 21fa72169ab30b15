"""`python -m pipeline recipes`: the recipes that come with the project."""

import argparse

from pipeline.output import facts

HELP = "the recipes that come with the project"
EXAMPLES = ("python -m pipeline recipes",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    """Print each with the first line of its file."""
    from pipeline.recipe import RECIPES_DIR, recipe_names

    found = {}
    for name in recipe_names():
        first = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        found[name] = first.removeprefix("#").strip()
        print(f"{name:<16} {found[name]}")
    facts(recipes=found)
    return 0
