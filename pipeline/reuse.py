"""What one point of a sweep takes from another instead of making it again. Called by `commands.sweep`.

Files are linked where the file system can, else copied: no file of a checkpoint or of predictions is ever changed in
place. They are found by their identity like any others, so what does not fit would not be found.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import RunError
from pipeline.recipe import CONDITIONS
from pipeline.run_dir import RunDir
from pipeline.sweep import Point


def take(point: Point, taken: Mapping[tuple[str, ...], int], others: Sequence[Point]) -> list[str]:
    """Put there what is finished elsewhere and not here yet; what it was, for people. taken: as `sweep.sources` says.

    Raises RunError where the disk refuses.
    """
    told = []
    for item, number in taken.items():
        kind, model, arm = item if len(item) == 3 else (*item, "")
        here, there = point.run_dir, others[number].run_dir
        try:
            if kind == "arm":
                found = _take_arm(point, there, model, arm)
            else:
                runs = [run.name for run in point.recipe.arm_runs if run.arm == arm]
                found = _take_answers(here, there, model, runs or CONDITIONS)
        except OSError as error:
            raise RunError(
                f"{here.root}: what {there.root} has of {'/'.join(item)} cannot be put there: "
                f"{error.strerror or error}; make room, and run the same command"
            ) from None
        if found:
            told.append(f"{kind} of {'/'.join(item[1:])}")
    return told


def _take_arm(point: Point, there: RunDir, student: str, arm: str) -> bool:
    """The whole folders of an arm's trainings, of those that are trained to the end there and not begun here."""
    found = False
    for run in (run for run in point.recipe.arm_runs if run.arm == arm):
        source, to = there.arm(student, run.name), point.run_dir.arm(student, run.name).root
        if to.exists() or not (source.checkpoint(point.recipe.train.steps) / "state.json").is_file():
            continue
        temporary = to.with_name(f".tmp-{to.name}")  # left by a process that was killed, it is of no use
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source.root, temporary, copy_function=_link)
        temporary.rename(to)
        found = True
    return found


def _take_answers(here: RunDir, there: RunDir, model: str, of: Sequence[str]) -> bool:
    """The predictions of conditions, or of all checkpoints of trainings, by their names."""
    found = False
    for folder in there.predictions(model, CONDITIONS[0]).parent.glob("*"):
        if (folder.name.rpartition("@")[0] or folder.name) not in of:
            continue
        for path in folder.glob("*.jsonl.zst"):
            to = here.predictions(model, folder.name) / path.name
            if not to.exists():
                to.parent.mkdir(parents=True, exist_ok=True)
                _link(path, to)
                found = True
    return found


def _link(path: str | Path, to: str | Path) -> None:
    try:
        os.link(path, to)
    except FileExistsError:
        return
    except OSError:  # no links here, or none over to there
        temporary = Path(to).with_name(f".tmp-{os.getpid()}-{Path(to).name}")
        shutil.copy2(path, temporary)
        temporary.rename(to)
