"""`python -m pipeline show`: a recipe as it is understood, and an example as teacher and student will see it.

What is printed is a recipe itself: where each value came from stands in a comment behind it, and the example in
comments below. An example needs the data and the tokenizers, no weights.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.cli import EXIT_INCOMPLETE, add_recipe_arguments, recipe_of
from pipeline.errors import RecipeError, UserError, unknown_name
from pipeline.output import facts

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

HELP = "a recipe as it is understood, and one example token by token"
EXAMPLES = (
    "python -m pipeline show",
    "python -m pipeline show --recipe pocket-uld --example 7",
    "python -m pipeline show --recipe gsm8k-qwen3 --set train.lr=1e-4 --no-example",
    "python -m pipeline show --keys",
    "python -m pipeline show --field cache.dir",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--recipe`, `--set`, `--keys`, `--field`, and which example."""
    add_recipe_arguments(parser)
    parser.add_argument("--keys", action="store_true", help="every key with its type, default and meaning")
    parser.add_argument("--field", metavar="KEY", help="one value alone, for example cache.dir or run_dir")
    parser.add_argument("--example", type=int, default=0, metavar="N", help="which of the cached examples (0)")
    parser.add_argument("--full", action="store_true", help="the worked examples before it token by token too")
    parser.add_argument("--no-example", action="store_true", help="the recipe alone")


def run(args: argparse.Namespace) -> int:
    """Print the keys, one value, or recipe and example; 3 where there is no example to show."""
    if args.keys:
        from pipeline.recipe import describe_keys

        keys = describe_keys()
        for key, kind, default, meaning in keys:
            print(f"{key:<32} {kind}\n{'':<8}default {default}. {meaning}")
        facts(keys=[dict(zip(("key", "type", "default", "meaning"), row, strict=True)) for row in keys])
        return 0
    recipe = recipe_of(args)
    facts(recipe=recipe.model_dump(mode="json"))
    if args.field is not None:
        value = _field(recipe, args.field)
        print(value)
        facts(field=args.field, value=value)
        return 0
    from pipeline.origins import commented, origins

    where = origins(args.recipe, args.overrides, recipe)
    facts(origins={".".join(path): origin for path, origin in where.items()})
    print(commented(recipe, where), flush=True)
    return 0 if args.no_example else _example(recipe, args.example, args.full)


def _example(recipe: "Recipe", index: int, full: bool) -> int:
    """Print an example as comments; 3, and why, where its data or a tokenizer is not there."""
    from pipeline.fingerprint import Experiment
    from pipeline.looking import look, told

    try:
        found = look(Experiment(recipe), index)
    except RecipeError:
        raise
    except UserError as error:
        print(f"no example to show: {error}\n  the recipe alone: --no-example", file=sys.stderr)
        return EXIT_INCOMPLETE
    facts(example=asdict(found))
    print("\n".join(["", *(f"# {line}".rstrip() for line in told(found, full).split("\n"))]))
    return 0


def _field(recipe: "Recipe", key: str) -> str:
    """One value of a recipe as text; `cache.dir` and `run_dir` are answered with the folder really used."""
    if key == "cache.dir":
        from pipeline.fingerprint import Experiment

        return str(Experiment(recipe).cache_dir)
    if key == "run_dir":
        from pipeline.run_dir import RunDir

        return str(RunDir.of(recipe).root)
    node: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            raise RecipeError(f"--field {key}: " + unknown_name("key", part, node if isinstance(node, dict) else []))
        node = node[part]
    return node if isinstance(node, str) else json.dumps(node)
