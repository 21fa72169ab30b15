"""`python -m pipeline show`: a recipe as it is understood."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from pipeline.cli import add_recipe_arguments, recipe_of
from pipeline.errors import RecipeError, unknown_name
from pipeline.output import facts

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

HELP = "a recipe as it is understood, every key filled in"
EXAMPLES = (
    "python -m pipeline show --recipe gsm8k-qwen3 --set train.lr=1e-4",
    "python -m pipeline show --keys",
    "python -m pipeline show --field cache.dir",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--recipe`, `--set`, `--keys`, `--field`."""
    add_recipe_arguments(parser)
    parser.add_argument("--keys", action="store_true", help="every key with its type, default and meaning")
    parser.add_argument("--field", metavar="KEY", help="one value alone, for example cache.dir or run_dir")


def run(args: argparse.Namespace) -> int:
    """Print the recipe, its keys or one value."""
    if args.keys:
        from pipeline.recipe import describe_keys

        keys = describe_keys()
        for key, kind, default, meaning in keys:
            print(f"{key:<32} {kind}\n{'':<8}default {default}. {meaning}")
        facts(keys=[dict(zip(("key", "type", "default", "meaning"), row, strict=True)) for row in keys])
        return 0
    recipe = recipe_of(args)
    facts(recipe=recipe.model_dump(mode="json"))
    if args.field is None:
        import yaml

        print(
            yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120, default_flow_style=None), end=""
        )
        return 0
    value = _field(recipe, args.field)
    print(value)
    facts(field=args.field, value=value)
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
