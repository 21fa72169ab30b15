"""What there is to do, and whether a run folder may be gone on with. Called by `__main__`; loads no model.

An arm's identity is everything that decides its adapter. It is written to `arm.json` when training starts; a run with
another identity is refused there, never mixed. How many processes share the work, in which micro-batches and on which
device, changes sums by rounding only and is provenance: kept in each checkpoint's state.json.
"""

import fcntl
import json
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cache_schema.atomic import create
from cache_schema.manifest import differences
from pipeline.alignment import VERSION
from pipeline.errors import ModelError, RecipeError, RunError, unknown_name
from pipeline.fingerprint import Experiment
from pipeline.models import ModelSource, load_config, load_tokenizer, locate, tokenizer_digest
from pipeline.prompts import PromptBuilder
from pipeline.recipe import ArmRun
from pipeline.run_dir import ArmDir, RunDir
from pipeline.sections import KEPT_APART, Alignment, Arm, Train
from stage2_student.checkpoint import complete_steps, storage_errors, sweep
from stage2_student.order import BLOCK, WINDOW

# The keys of `train` that are no part of an arm's identity: repeats are arms of their own, each with its own seed,
# alignment stands beside the loss that needs it, and trackers only show.
NO_IDENTITY = {"micro_batch_size", "repeats", "alignment", *KEPT_APART}


@dataclass(frozen=True)
class StudentPlan:
    """A student as far as it can be known without loading its weights."""

    name: str
    source: ModelSource
    prompts: PromptBuilder


@dataclass(frozen=True)
class ArmPlan:
    """One training of one arm: its identity, its folder, and how many steps a complete checkpoint has already."""

    student: StudentPlan
    run: ArmRun
    identity: dict[str, Any]
    folder: ArmDir
    done: int

    @property
    def label(self) -> str:
        return f"{self.student.name}/{self.run.name}"


def students(experiment: Experiment, student: str | None = None) -> list[StudentPlan]:
    """The students asked for. Raises RecipeError for an unknown name, ModelError for one that cannot be trained."""
    recipe, plans = experiment.recipe, []
    for name in _chosen("student", student, recipe.students):
        settings = recipe.students[name]
        if settings.dtype == "float16":
            raise ModelError(
                f"students.{name}.dtype is float16, whose gradients underflow without loss scaling; "
                "set it to bfloat16 or float32"
            )
        source = locate(settings.model, settings.revision)
        if (config := load_config(source)).is_encoder_decoder:
            raise ModelError(
                f"students.{name}.model {source.location} is an encoder-decoder ({config.model_type}); students are "
                "decoders: choose one, or score it as it is under eval.references"
            )
        prompts = PromptBuilder(load_tokenizer(source), recipe.teacher.thinking, require_switch=False)
        plans.append(StudentPlan(name, source, prompts))
    return plans


def plan(experiment: Experiment, student: str | None = None, arm: str | None = None) -> list[ArmPlan]:
    """The arms asked for, with all their repeats, in the recipe's order.

    Raises as `students` does, and RunError where a folder holds an arm that was trained with other settings.
    """
    recipe, run_dir = experiment.recipe, RunDir.of(experiment.recipe)
    chosen = _chosen("arm", arm, recipe.arms)
    plans = []
    for of_student in students(experiment, student):
        for run in (run for run in recipe.arm_runs if run.arm in chosen):
            folder = run_dir.arm(of_student.name, run.name)
            identity = arm_identity(experiment, of_student, run)
            _check_identity(folder, identity)
            plans.append(ArmPlan(of_student, run, identity, folder, newest(folder)))
    return plans


def newest(folder: ArmDir) -> int:
    """The step of the newest complete checkpoint; 0 where there is none."""
    return max(complete_steps(folder.checkpoints), default=0)


def arm_identity(experiment: Experiment, student: StudentPlan, run: ArmRun) -> dict[str, Any]:
    """Everything that decides an arm's adapter, as plain JSON."""
    recipe = experiment.recipe
    settings = recipe.students[student.name]
    return {
        "cache": experiment.fingerprint,
        "student": {
            "weights": student.source.identity(),
            "dtype": settings.dtype,
            "lora": settings.lora.model_dump(mode="json"),
            "tokenizer": {"sha256": tokenizer_digest(student.prompts.tokenizer), **student.prompts.describe()},
        },
        "train": recipe.train.model_dump(mode="json", exclude=NO_IDENTITY) | {"seed": run.seed},
        "order": {"block": BLOCK, "window": WINDOW},
        "losses": _losses(recipe.arms[run.arm], recipe.train),
    }


def _losses(arm: Arm, train: Train) -> dict[str, Any]:
    """The weights of an arm's losses and what those above zero depend on; its identity must not name anything else.
    The first three are named at zero too, as they always were: another key would be another arm."""
    chosen: dict[str, Any] = {"ce": arm.ce, "logit_mse": arm.logit_mse, "kl": arm.kl} | arm.weights
    if arm.has_temperature:
        chosen["temperature"] = arm.temperature
    if arm.uld > 0:
        chosen |= {"alignment": alignment_of(arm, train), "alignment_version": VERSION}
    return chosen


def alignment_of(arm: Arm, train: Train) -> Alignment:
    """The arm's own, else that of `train`."""
    return arm.alignment or train.alignment


@contextmanager
def claimed(arm: ArmPlan) -> Iterator[None]:
    """The arm's folder is ours: arm.json is written where it is not there yet, and locked until we are done or dead;
    what a killed process left half written is swept.

    Raises RunError when another process trains this arm or has trained it since it was planned (hours ago, where
    others came first), or the folder cannot be written.
    """
    with storage_errors(arm.folder.root, f"starting {arm.label}"):
        arm.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        if not arm.folder.identity.exists():  # `create`: two that come at once must lock the same file
            create(arm.folder.identity, (json.dumps(arm.identity, indent=1) + "\n").encode())
    with arm.folder.identity.open("r+", encoding="utf-8") as file:  # NFS locks only what is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{arm.folder.root}: another process is training this arm; let it finish, or set run_dir=<folder>"
            ) from None
        _check_identity(arm.folder, arm.identity)
        if (done := newest(arm.folder)) != arm.done:
            raise RunError(
                f"{arm.folder.root}: another process trained it meanwhile, from step {arm.done} to step {done}; "
                "run the same command again: it goes on from there"
            )
        sweep(arm.folder.root)
        sweep(arm.folder.checkpoints)
        yield


def _check_identity(folder: ArmDir, identity: dict[str, Any]) -> None:
    for path in (folder.root, folder.root.parent, folder.root.parent.parent, folder.checkpoints):
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: found a file, expected a folder; move it away, or set run_dir=<folder>")
    ways_out = (
        "Two ways out: train into another folder (--set run_dir=<folder>), or remove this arm "
        f"(rm -r {shlex.quote(str(folder.root))}) and train it again"
    )
    try:
        found = json.loads(folder.identity.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if complete_steps(folder.checkpoints):
            raise RunError(
                f"{folder.root}: it has checkpoints but no arm.json that says of what.\n{ways_out}"
            ) from None
        return
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.identity}: it cannot be read: {error}.\n{ways_out}") from None
    changed = differences(found, identity)
    if changed:
        lines = [f"  {d.field}: trained with {d.cached}, now asked for {d.asked}" for d in changed]
        raise RunError(
            "\n".join([f"{folder.root} holds an arm that was trained with other settings:", *lines, ways_out])
        )


def _chosen(kind: str, name: str | None, known: Iterable[str]) -> list[str]:
    known = list(known)
    if name is None:
        return known
    if name not in known:
        raise RecipeError(f"--{kind} {name}: {unknown_name(kind, name, known)}")
    return [name]
