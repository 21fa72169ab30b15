"""Stage 2: train the students from the cache.

    python -m stage2_student --recipe pocket [--set key=value]... [--student NAME] [--arm NAME] [--alignment]

Several processes: set runtime.processes, or start it through `torchrun --standalone --nproc_per_node N -m
stage2_student ...` oneself; several machines: NODES.md, beside this file. Called again it goes on from the newest
checkpoints, or says that all is done. An arm that fails does not stop the others; the end names it, with the command
that tries it again, and the exit code is 3. With --alignment it only reports how many of each student's answer
positions have a teacher.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from cache_schema.errors import CacheError
from pipeline.cli import (
    EXIT_INCOMPLETE,
    add_probe_arguments,
    guarded,
    parsed,
    probe_folder,
    recipe_arguments,
    recipe_of,
    recipe_parser,
)
from pipeline.errors import UserError
from pipeline.output import facts, result
from pipeline.stopping import ANSWERED, Stopped, deferred, requested, tell_sessions

if TYPE_CHECKING:
    from pipeline.fingerprint import Experiment
    from pipeline.recipe import Recipe
    from stage2_student.arms import ArmPlan
    from stage2_student.group import Group
    from stage2_student.train import Failed


EXAMPLES = (
    "python -m stage2_student",
    "python -m stage2_student --recipe pocket-uld --alignment",
    "python -m stage2_student --recipe flan-uld --student gpt2-medium --arm distill --set train.lr=1e-4",
    "torchrun --standalone --nproc_per_node 8 -m stage2_student --recipe gsm8k-qwen3",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = recipe_parser("stage2_student", "Stage 2: train the students from the cache.", EXAMPLES)
    parser.add_argument("--student", metavar="NAME", help="this student alone")
    parser.add_argument("--arm", metavar="NAME", help="this arm alone, with its repeats")
    parser.add_argument(
        "--alignment", action="store_true", help="only print the share of answer positions that have a teacher, by task"
    )
    add_probe_arguments(parser, "time so many steps of each arm and save nothing: what `pipeline plan` asks for")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Find what is left to do, then train it. The teacher is never loaded; models are, only if something is left."""
    args = parsed(parser(), argv)
    recipe = recipe_of(args)

    from pipeline.fingerprint import Experiment
    from stage2_student.arms import plan
    from stage2_student.trackers import check_installed

    experiment = Experiment(recipe)
    if args.probe is not None:
        from stage2_student.probe import probe

        probe(experiment, _joined(recipe), args.probe, probe_folder(args), args.student)
        return 0
    if args.alignment:
        _report_alignment(experiment, args.student)
        return 0
    group = _joined(recipe) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    with group.agree() if group is not None else nullcontext():
        check_installed(recipe.train.trackers)
        arms = plan(experiment, args.student, args.arm)
        reader = experiment.open_cache() if group is not None else None
    if group is not None and reader is not None:  # before anything is decided: each has a run folder of its own, maybe
        arms = group.same_plan(arms, reader)
    left = [arm for arm in arms if arm.done < recipe.train.steps]
    several = group is None and recipe.runtime.processes > 1
    if (group is None or group.main) and not (left and several):
        for arm in arms:
            state = "done" if arm not in left else f"to go on from step {arm.done}" if arm.done else "to be trained"
            say = print if left else result
            say(f"{arm.label}: {state} ({recipe.train.steps} steps) {arm.folder.root}")
    if not left:
        _say_trained(arms, recipe.train.steps)
        return 0
    reader = reader or experiment.open_cache()
    if several:
        chosen = [part for name in ("student", "arm") if (v := getattr(args, name)) for part in (f"--{name}", v)]
        code = _in_processes(recipe.runtime.processes, [*recipe_arguments(args), *chosen])
        _say_trained(arms, recipe.train.steps)
        return code

    from stage2_student.train import train

    group = group or _joined(recipe)
    failed = train(recipe, reader, left, group)
    if failed and len(arms) == group.ranks == 1 and isinstance(failed[0].error, UserError | CacheError):
        raise failed[0].error  # it concerns all that was asked for
    if group.main:
        _say_trained(arms, recipe.train.steps, left)
    if failed and group.main:
        print(_failures(failed, len(left), recipe_arguments(args)), file=sys.stderr, flush=True)
    return EXIT_INCOMPLETE if failed else 0


def _joined(recipe: "Recipe") -> "Group":
    from pipeline.models import device_of
    from stage2_student.group import Group

    return Group.join(cpu=device_of(recipe).type == "cpu")


def _say_trained(arms: "Sequence[ArmPlan]", steps: int, trained: "Sequence[ArmPlan]" = ()) -> None:
    """How far each arm is, for machines; and those that were trained now, for people."""
    from stage2_student.arms import newest

    at = {arm.label: {"step": newest(arm.folder), "steps": steps, "folder": str(arm.folder.root)} for arm in arms}
    for arm in trained:
        result(f"{arm.label}: {at[arm.label]['step']} of {steps} steps are trained; {arm.folder.root}", arms=at)
    facts(arms=at)


def _failures(failed: "Sequence[Failed]", asked: int, arguments: Sequence[str]) -> str:
    """What the end says: which arms failed, why, and the commands that try those again."""
    rest = "; the others are trained" if len(failed) < asked else ""
    lines = [f"error: {len(failed)} of {asked} arms failed{rest}:"]
    lines += [f"- {failure}" for failure in failed]
    again = dict.fromkeys((failure.arm.student.name, failure.arm.run.arm) for failure in failed)
    lines.append("to try those again:")
    for student, arm in again:
        command = ["python", "-m", "stage2_student", *arguments, "--student", student, "--arm", arm]
        lines.append(f"  {shlex.join(command)}")
    return "\n".join(lines)


def _report_alignment(experiment: "Experiment", student: str | None) -> None:
    """The table of all students asked for, and each one's alignment.json."""
    from pipeline.progress import progress
    from pipeline.run_dir import RunDir
    from stage2_student import coverage
    from stage2_student.arms import students

    reader = experiment.open_cache()
    covered = {}
    for plan in students(experiment, student):
        with progress(f"{plan.name} alignment", len(reader), "examples") as bar:
            covered[plan.name] = coverage.measure(reader, plan.prompts, bar.advance)
        path = RunDir.of(experiment.recipe).alignment(plan.name)
        coverage.save(path, covered[plan.name], reader, plan.prompts)
    result(coverage.table(covered))


def _in_processes(count: int, arguments: Sequence[str]) -> int:
    """The same command line once more in `count` processes of one group; the exit code of the first that failed."""
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    def tell(signum: int) -> None:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # or it reports each as a failure
        tell_sessions(signum)

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    above = os.environ.get(ANSWERED)
    os.environ[ANSWERED] = str(os.getpid())
    handles = "--signals-to-handle=SIGHUP,SIGQUIT"  # not those that `stopping` passes on
    try:
        with deferred("", tell):
            torchrun(["--standalone", handles, f"--nproc_per_node={count}", "-m", "stage2_student", *arguments])
    except ChildFailedError as error:
        if (signum := requested()) is not None:
            raise Stopped(signum) from None
        return error.get_first_failure()[1].exitcode
    finally:  # theirs, not ours
        os.environ.pop(ANSWERED)
        os.environ.update({} if above is None else {ANSWERED: above})
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
