"""`python -m pipeline recipes`: the recipes that come with the project."""

import argparse

HELP = "the recipes that come with the project"
EXAMPLES = ("python -m pipeline recipes",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    """Print each with the first line of its file."""
    from pipeline.recipe import RECIPES_DIR, recipe_names

    for name in recipe_names():
        first = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<16} {first.removeprefix('#').strip()}")
    return 0
