"""`python -m pipeline status`: what of a recipe is there already."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli import add_recipe_arguments, recipe_of
from pipeline.output import facts

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

HELP = "what of a recipe is there already"
EXAMPLES = ("python -m pipeline status", "python -m pipeline status --recipe gsm8k-qwen3 --set run_dir=runs/slow")
add_arguments = add_recipe_arguments


def run(args: argparse.Namespace) -> int:
    """Print a line for the cache, each student and the report; nothing is loaded or changed."""
    from cache_schema.errors import NotACache
    from pipeline.fingerprint import Experiment
    from pipeline.run_dir import RunDir

    recipe = recipe_of(args)
    experiment, run_dir = Experiment(recipe), RunDir.of(recipe)
    facts(cache={"place": str(experiment.cache_dir), "shards": 0, "of": None, "sealed": False})
    try:
        reader = experiment.open_cache(require_sealed=False)
        state = "sealed" if reader.sealed else f"{len(reader.records)} of {reader.manifest.shards} shards"
        print(f"cache    {experiment.cache_dir}: {state}; examples {reader.totals().examples}")
        there = {"shards": len(reader.records), "of": reader.manifest.shards, "sealed": reader.sealed}
        facts(cache={"place": str(experiment.cache_dir), **there})
    except NotACache:
        print(f"cache    {experiment.cache_dir}: not there yet")
    arms: dict[str, dict[str, Any]] = {}
    for student in recipe.students:
        for run in recipe.arm_runs:
            found = sorted(run_dir.arm(student, run.name).checkpoints.glob("step-*/state.json"))
            last = found[-1].parent.name if found else "no checkpoint"
            other = _other_settings(run_dir.arm(student, run.name).identity, recipe, run.seed)
            step = int(found[-1].parent.name.removeprefix("step-")) if found else 0
            arms[f"{student}/{run.name}"] = {"step": step, "steps": recipe.train.steps, "other_settings": other}
            note = f"; trained with other settings: {', '.join(other)}" if other else ""
            print(f"student  {student}/{run.name}: {last} of {recipe.train.steps} steps{note}")
    report = run_dir.report / "report.html"
    if not report.is_file() and (table := run_dir.report / "table.md").is_file():
        report = table
    print(f"report   {report}{'' if report.is_file() else ': not there yet'}")
    facts(arms=arms, report=str(report) if report.is_file() else None)
    return 0


def _other_settings(arm_file: Path, recipe: "Recipe", seed: int) -> list[str]:
    """The keys of `train` that differ from those an arm was begun with; none where it was not begun."""
    try:
        begun = json.loads(arm_file.read_text(encoding="utf-8"))["train"]
    except (OSError, ValueError, KeyError):
        return []
    asked = recipe.train.model_dump(mode="json") | {"seed": seed}
    return [f"train.{key}" for key in begun if key in asked and begun[key] != asked[key]]
