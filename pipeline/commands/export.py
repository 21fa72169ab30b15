"""`python -m pipeline export`: a trained student, or the cache, as a folder that others can load, with its card.

A student is an adapter in peft's layout or, merged, a whole model. The folder is written whole or not at all, and never
over anything. Stage 2 does it, in a process of its own; the cache needs no model and is copied here.
"""

import argparse
import shlex
from pathlib import Path

from pipeline.cli import add_recipe_arguments, recipe_arguments, recipe_of
from pipeline.errors import RecipeError
from pipeline.output import result
from pipeline.stages import run_stage, stage_command

HELP = "a student or the cache as a folder that others load, with its card"
EXAMPLES = (
    "python -m pipeline export --to handed-over",
    "python -m pipeline export --recipe gsm8k-qwen3 --checkpoint qwen3/distill@600 --merge --to merged",
    "python -m pipeline export --recipe gsm8k-qwen3 --to adapter --push OWNER/NAME --private",
    "python -m pipeline export --cache --to cache-for-others",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--recipe`, `--set`, `--cache`, and what stage 2 takes."""
    add_recipe_arguments(parser)
    parser.add_argument("--cache", action="store_true", help="the cache with a data card, instead of a student")
    add_export_arguments(parser)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """What is exported, and where to; `stage2_student.export` takes the same."""
    parser.add_argument(
        "--checkpoint",
        metavar="STUDENT/ARM@STEP",
        help="which; without @STEP the one the report shows (default: of the only student's distilled arm)",
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="a folder that is empty or not there")
    parser.add_argument("--merge", action="store_true", help="a whole model, not an adapter that needs its base")
    parser.add_argument("--base", metavar="NAME", help="what others load as the base model, if not the recipe's name")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hub as well; the token is HF_TOKEN's")
    parser.add_argument("--private", action="store_true", help="with --push: make the repository a private one")


def export_arguments(args: argparse.Namespace) -> list[str]:
    """The same arguments again, for a child process."""
    given = [(f"--{name}", getattr(args, name)) for name in ("checkpoint", "to", "base", "push")]
    flags = [f"--{name}" for name in ("merge", "private") if getattr(args, name)]
    return [*(part for flag, value in given if value is not None for part in (flag, value)), *flags]


def run(args: argparse.Namespace) -> int:
    """Start stage 2's export, or copy the cache."""
    recipe = recipe_of(args)
    if not args.cache:
        arguments = [*recipe_arguments(args), *export_arguments(args)]
        return run_stage(stage_command("stage2_student.export", recipe, arguments))
    for_students = [f"--{name}" for name in ("checkpoint", "merge", "base") if getattr(args, name)]
    if for_students:
        raise RecipeError(f"--cache: {', '.join(for_students)} is about a student; leave one of the two out")

    from pipeline.cache_card import export_cache
    from pipeline.handover import push

    to = Path(args.to).expanduser().absolute()
    export_cache(recipe, to, args.push or str(to))
    check = shlex.join(["python", "-m", "cache_schema", "verify", str(to)])
    result(f"cache    {to}\n         to check it: {check}", kind="cache", folder=str(to))
    if args.push:
        uploaded = push(to, args.push, kind="dataset", private=args.private)
        result(f"uploaded {uploaded}", uploaded=uploaded)
    return 0
