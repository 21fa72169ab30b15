"""What a step of each student would cost, measured: `python -m stage2_student --probe 3 --probe-out FOLDER`.

`python -m pipeline plan` starts it once for each student, after stage 1's probe has left a cache of its sample in
FOLDER/cache; FOLDER/<student>.json is what it finds. The steps are real ones, of one process, on batches of that
cache; nothing is saved.
"""

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from cache_schema.reader import CacheReader
from pipeline.errors import RunError
from pipeline.fingerprint import Experiment
from pipeline.progress import progress
from pipeline.recipe import ArmRun
from pipeline.run_dir import RunDir
from stage2_student.arms import ArmPlan, StudentPlan, alignment_of, students
from stage2_student.batches import Collator
from stage2_student.group import Group
from stage2_student.loading import loader
from stage2_student.student import Student
from stage2_student.train import flat_gradients, take_step
from stage2_student.usable import Usable, lengths, usable_rows


def probe(experiment: Experiment, group: Group, steps: int, out: Path, name: str | None = None) -> None:
    """Time `steps` steps of each arm of each student (of `name` alone), after one that is not counted.

    Raises as stage 2 would: a student that cannot be trained is found here.
    """
    reader = CacheReader.open(out / "cache")
    recipe = experiment.recipe
    for plan in students(experiment, name):
        started = time.perf_counter()
        student = Student(plan.source, recipe.students[plan.name], recipe.train.seed, group.accelerator.device)
        load_s = time.perf_counter() - started
        found = lengths(reader, plan.prompts, range(len(reader)), student.vocab_size)
        usable = usable_rows(found, plan.prompts, student.window)
        step_s = {}
        with progress(f"{plan.name} steps", len(recipe.arms) * (steps + 1), "steps") as bar:
            for arm in recipe.arms:
                step_s[arm] = _step_seconds(experiment, group, reader, student, plan, usable, arm, steps, bar.advance)
        result = {
            "load_s": load_s,
            "step_s": step_s,
            "steps_timed": steps,
            "examples": len(usable.rows),
            "dropped": usable.dropped,
            "longest": usable.longest,
            "peak_bytes": _peak_bytes(group.accelerator.device),
        }
        try:
            (out / f"{plan.name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"--probe-out {out}: cannot be written: {error.strerror}; name another folder") from None
        del student


def _step_seconds(
    experiment: Experiment,
    group: Group,
    reader: CacheReader,
    student: Student,
    plan: StudentPlan,
    usable: Usable,
    arm: str,
    steps: int,
    advance: Any,
) -> float:
    """The mean of the timed steps, loading included: the loop hides it behind the step before, where it can."""
    recipe = experiment.recipe
    losses, settings = recipe.arms[arm], recipe.train
    run = ArmRun(arm, arm, settings.seed)
    of_arm = ArmPlan(plan, run, {}, RunDir.of(recipe).arm(plan.name, arm), 0)
    collator = Collator(reader, plan.prompts, student.vocab_size, losses, alignment_of(losses, settings))
    load = loader(collator, usable, settings, run.seed, group.rank, group.ranks)
    student.reset(run.seed)
    parameters = student.parameters.values()
    gradients = flat_gradients(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    taken = []
    for step in range(steps + 1):
        started = time.perf_counter()
        take_step(group, student, optimizer, gradients, of_arm, losses, settings, step, load(step))  # reads its loss
        taken.append(time.perf_counter() - started)
        advance(1)
    return sum(taken[1:]) / steps


def _peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: of the GPU, else of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
