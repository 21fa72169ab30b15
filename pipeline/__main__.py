"""The front door: `python -m pipeline run|status|recipes|show`.

`run` starts each stage as a child process, so that a stage's GPU memory is freed before the next one begins and each
can also be run, resumed and crash alone. What is finished is found finished; `run` again is how to resume.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli import (
    EXIT_INCOMPLETE,
    add_executor_argument,
    add_recipe_arguments,
    guarded,
    recipe_arguments,
    recipe_of,
)
from pipeline.errors import RecipeError, RunError, unknown_name

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

STAGES = ("stage1_teacher", "stage2_student", "stage3_eval")


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a sub-command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline", description="Distil a language model offline.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|status|recipes|show")
    run_parser = commands.add_parser("run", help="all three stages, each in a process of its own; resumes")
    status_parser = commands.add_parser("status", help="what of a recipe is there already")
    commands.add_parser("recipes", help="the recipes that come with the project")
    show_parser = commands.add_parser("show", help="a recipe as it is understood, every key filled in")
    for sub in (run_parser, status_parser, show_parser):
        add_recipe_arguments(sub)
    add_executor_argument(run_parser)
    show_parser.add_argument("--keys", action="store_true", help="every key with its type, default and meaning")
    show_parser.add_argument("--field", metavar="KEY", help="one value alone, for example cache.dir or run_dir")
    args = parser.parse_args(argv)
    handlers = {"run": _run, "status": _status, "recipes": _recipes, "show": _show}
    return handlers[args.command](args)


def stage_command(stage: str, recipe: "Recipe", arguments: Sequence[str]) -> list[str]:
    """The command line of one stage, in the interpreter that the recipe names for it."""
    python = recipe.runtime.python.get(stage, sys.executable)  # type: ignore[call-overload]
    return [python, "-m", stage, *arguments]


def _run(args: argparse.Namespace) -> int:
    from pipeline.run_dir import RunDir

    recipe = recipe_of(args)
    run_dir = RunDir.of(recipe)
    _remember(recipe, run_dir.recipe)
    started, incomplete = time.monotonic(), False
    for number, stage in enumerate(STAGES, 1):
        command = stage_command(stage, recipe, recipe_arguments(args))
        print(f"\n=== stage {number} of 3: {shlex.join(['python', *command[1:]])}", flush=True)
        before = time.monotonic()
        try:
            code = subprocess.run(command, check=False).returncode
        except OSError as error:
            raise RunError(
                f"runtime.python.{stage}: expected a Python interpreter, found {command[0]}: {error.strerror}"
            ) from None
        incomplete |= code == EXIT_INCOMPLETE
        if code and not (stage == "stage2_student" and code == EXIT_INCOMPLETE):  # the arms that are trained are scored
            resume = shlex.join(["python", "-m", "pipeline", "run", *recipe_arguments(args)])
            print(f"\nstage {number} stopped with exit code {code}; to resume: {resume}", file=sys.stderr)
            return code
        print(f"=== stage {number} took {time.monotonic() - before:.0f} s", flush=True)
    print(f"\nall three stages took {time.monotonic() - started:.0f} s; run folder: {run_dir.root}")
    if incomplete:
        print("something is missing, see above; the same command tries it again", file=sys.stderr)
    return EXIT_INCOMPLETE if incomplete else 0


def _remember(recipe: "Recipe", path: Path) -> None:
    """Leave the resolved recipe beside its results."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}; set run_dir=<folder>") from None


def _status(args: argparse.Namespace) -> int:
    from cache_schema.errors import NotACache
    from pipeline.fingerprint import Experiment
    from pipeline.run_dir import RunDir

    recipe = recipe_of(args)
    experiment, run_dir = Experiment(recipe), RunDir.of(recipe)
    try:
        reader = experiment.open_cache(require_sealed=False)
        state = "sealed" if reader.sealed else f"{len(reader.records)} of {reader.manifest.shards} shards"
        print(f"cache    {experiment.cache_dir}: {state}; examples {reader.totals().examples}")
    except NotACache:
        print(f"cache    {experiment.cache_dir}: not there yet")
    for student in recipe.students:
        for run in recipe.arm_runs:
            found = sorted(run_dir.arm(student, run.name).checkpoints.glob("step-*/state.json"))
            last = found[-1].parent.name if found else "no checkpoint"
            other = _other_settings(run_dir.arm(student, run.name).identity, recipe, run.seed)
            note = f"; trained with other settings: {', '.join(other)}" if other else ""
            print(f"student  {student}/{run.name}: {last} of {recipe.train.steps} steps{note}")
    report = run_dir.report / "table.md"
    print(f"report   {report}{'' if report.is_file() else ': not there yet'}")
    return 0


def _other_settings(arm_file: Path, recipe: "Recipe", seed: int) -> list[str]:
    """The keys of `train` that differ from those an arm was begun with; none where it was not begun."""
    try:
        begun = json.loads(arm_file.read_text(encoding="utf-8"))["train"]
    except (OSError, ValueError, KeyError):
        return []
    asked = recipe.train.model_dump(mode="json") | {"seed": seed}
    return [f"train.{key}" for key in begun if key in asked and begun[key] != asked[key]]


def _recipes(args: argparse.Namespace) -> int:
    from pipeline.recipe import RECIPES_DIR, recipe_names

    for name in recipe_names():
        first = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<16} {first.removeprefix('#').strip()}")
    return 0


def _show(args: argparse.Namespace) -> int:
    if args.keys:
        from pipeline.recipe import describe_keys

        for key, kind, default, meaning in describe_keys():
            print(f"{key:<32} {kind}\n{'':<8}default {default}. {meaning}")
        return 0
    recipe = recipe_of(args)
    if args.field is None:
        import yaml

        print(
            yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120, default_flow_style=None), end=""
        )
        return 0
    print(_field(recipe, args.field))
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


if __name__ == "__main__":
    sys.exit(guarded(main))
