"""What is to be scored of one student: the untouched model, and every complete checkpoint of every arm.

A condition is `zero_shot`, `few_shot` (the untouched student reading the teacher's worked examples), or
`<run>@<step>`, where a run is one training of an arm: `distill`, and `distill~1`, ... for its repeats.
Called by `evaluate` and `answers`. Reads JSON only; loads no model.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.recipe import ArmRun, Recipe
from pipeline.run_dir import ArmDir, RunDir
from stage3_eval.blocks import Block
from stage3_eval.predictions import kept_conditions

ZERO_SHOT, FEW_SHOT = "zero_shot", "few_shot"
# What an arm's record of its settings leaves out: it changes no adapter but by rounding, or says how many there are.
_SETTINGS_OF_OTHERS = {"micro_batch_size", "repeats"}


@dataclass(frozen=True)
class Condition:
    """One thing that answers the prompts. Baselines and references have neither run, step nor adapter."""

    name: str
    run: str | None = None
    step: int | None = None
    adapter: Path | None = None
    adapter_sha256: str | None = None

    @property
    def few_shot(self) -> bool:
        """Whether the teacher's worked examples stand before each prompt."""
        return self.name == FEW_SHOT


@dataclass(frozen=True)
class TrainedRun:
    """The checkpoints of one training of an arm, by step, and what `arm.json` says they were trained with."""

    name: str
    arm: str
    checkpoints: Mapping[int, Condition]
    trained_with: Mapping[str, Any]

    @property
    def last(self) -> int:
        return max(self.checkpoints)

    @property
    def is_first(self) -> bool:
        """Whether it is the arm's first seed, whose checkpoints make the curve."""
        return self.name == self.arm


def baselines(recipe: Recipe) -> list[Condition]:
    """The untouched student's conditions, zero_shot first."""
    return [Condition(name) for name in (ZERO_SHOT, FEW_SHOT) if name in recipe.eval.baselines]


def asked(condition: Condition, block: Block) -> bool:
    """Whether a block is for a condition: the teacher's worked examples are none of an unseen task."""
    return not (condition.few_shot and block.unseen)


def find_runs(
    recipe: Recipe, run_dir: RunDir, student: str, arguments: Sequence[str]
) -> tuple[list[TrainedRun], dict[str, str]]:
    """The trainings that have a checkpoint, in the recipe's order; and what is missing, training or checkpoint -> why.

    arguments: the `--recipe` and `--set` of this run, for the commands named in the sentences.
    Raises RunError where one was trained with other settings than the recipe's, or its arm.json cannot be read.
    """
    runs: list[TrainedRun] = []
    lacking: dict[str, str] = {}
    train = shlex.join(["python", "-m", "stage2_student", *arguments])
    for run in recipe.arm_runs:
        folder = run_dir.arm(student, run.name)
        sound, damaged = _checkpoints(folder, run.name)
        lacking |= damaged
        checkpoints = {c.step: c for c in sound if c.step and c.step <= recipe.train.steps}
        if not checkpoints:
            lacking[run.name] = f"no checkpoint yet; to train it: {train}"
            continue
        found = TrainedRun(run.name, run.arm, checkpoints, _trained_with(folder, recipe, student, run))
        if found.last < recipe.train.steps:
            lacking[run.name] = f"trained to step {found.last} of {recipe.train.steps} so far; to go on: {train}"
        runs.append(found)
    return runs, lacking


def kept_runs(recipe: Recipe, run_dir: RunDir, student: str) -> list[TrainedRun]:
    """The trainings whose predictions were kept, without their checkpoints: for scoring where the model is not.

    Raises RunError as `find_runs` does, where what they were trained with is still known.
    """
    steps: dict[str, dict[int, Condition]] = {}
    for name in kept_conditions(run_dir, student):
        of, at, step = name.rpartition("@")
        if at and step.isdecimal() and int(step) <= recipe.train.steps:
            steps.setdefault(of, {})[int(step)] = Condition(name, of, int(step))
    runs = []
    for run in recipe.arm_runs:
        if run.name in steps:
            folder = run_dir.arm(student, run.name)
            trained_with = _trained_with(folder, recipe, student, run) if folder.identity.is_file() else {}
            runs.append(TrainedRun(run.name, run.arm, dict(sorted(steps[run.name].items())), trained_with))
    return runs


def check_not_stale(condition: Condition, identity: Mapping[str, Any], run_dir: RunDir, student: str) -> None:
    """Raise RunError where a kept prediction is of another adapter than the checkpoint that lies there now.

    A checkpoint that is gone is no matter: its predictions are what is left of it.
    """
    if condition.run is None or condition.step is None:
        return
    state = run_dir.arm(student, condition.run).checkpoint(condition.step) / "state.json"
    if state.is_file() and _json(state).get("adapter_sha256") != identity.get("adapter"):
        raise RunError(
            f"--rescore: the kept predictions of {student}/{condition.name} are those of another adapter than "
            f"{state.parent} holds (trained again since); run python -m stage3_eval without --rescore"
        )


def _checkpoints(folder: ArmDir, run: str) -> tuple[list[Condition], dict[str, str]]:
    """The complete checkpoints (those with a state.json), by step; and what is wrong with damaged ones, by name."""
    for path in (folder.checkpoints, *folder.checkpoints.parents):
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: found a file, expected a folder; move it away, or set run_dir=<folder>")
    found: list[Condition] = []
    damaged: dict[str, str] = {}
    for path in sorted(folder.checkpoints.glob("step-*/state.json")):
        name = f"{run}@{path.parent.name.removeprefix('step-').lstrip('0')}"
        try:
            state = _json(path)
        except RunError as error:
            damaged[name] = str(error)
            continue
        step, sha256 = state.get("step"), state.get("adapter_sha256")
        if not isinstance(step, int) or not isinstance(sha256, str) or path.parent != folder.checkpoint(step):
            damaged[name] = (
                f"{path}: expected the step of its folder and an adapter_sha256, found step {step!r} and "
                f"{sha256!r}; remove the checkpoint (rm -r {shlex.quote(str(path.parent))}) and train again"
            )
            continue
        found.append(Condition(name, run, step, path.parent, sha256))
    return found, damaged


def _trained_with(folder: ArmDir, recipe: Recipe, student: str, run: ArmRun) -> dict[str, Any]:
    """The content of arm.json. Raises RunError where it differs from the recipe in what both speak of."""
    trained = _json(folder.identity)
    settings, arm = recipe.train.model_copy(update={"seed": run.seed}), recipe.arms[run.arm]
    losses = arm.model_dump(mode="json") | {"alignment": arm.alignment or settings.alignment}
    trained_student = _section(trained, "student", folder)
    of_student = {key: value for key, value in trained_student.items() if key == "dtype"}
    of_student |= _section(trained_student, "lora", folder)
    pairs = [
        ("train", _section(trained, "train", folder), settings.model_dump(mode="json", exclude=_SETTINGS_OF_OTHERS)),
        (f"arms.{run.arm}", _section(trained, "losses", folder), losses),
        (
            f"students.{student}",
            of_student,
            {"dtype": recipe.students[student].dtype, **recipe.students[student].lora.model_dump(mode="json")},
        ),
    ]
    differing = [
        f"  {section}.{key}: trained with {found[key]!r}, the recipe says {asked[key]!r}"
        for section, found, asked in pairs
        for key in found
        if key in asked and found[key] != asked[key]
    ]
    if differing:
        raise RunError(
            "\n".join([f"{folder.root} holds an arm that was trained with other settings:", *differing])
            + "\nTwo ways out: score it with the recipe and the --set it was trained with, or train this one into "
            "another folder (--set run_dir=<folder>)"
        )
    return trained


def _section(tree: Mapping[str, Any], key: str, folder: ArmDir) -> dict[str, Any]:
    found = tree.get(key, {})
    if not isinstance(found, dict):
        raise RunError(
            f"{folder.identity}: expected a JSON object under {key!r}, found {found!r:.60}; restore the file, or "
            f"remove the arm (rm -r {shlex.quote(str(folder.root))}) and train it again"
        )
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}; restore it, or remove its folder and train again") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
