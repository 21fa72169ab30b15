"""An arm's metrics in Weights & Biases, Trackio or MLflow, through accelerate's tracker classes. Called by `metrics`.

`train.trackers` names them; each package is imported only then, and finds its server or folder as it always does
(WANDB_*, TRACKIO_DIR, MLFLOW_TRACKING_URI). They are for looking at: `metrics.jsonl` has everything, a tracker that
fails while an arm is trained is left out from there, and none is part of an arm's identity.

An arm is one run of the project `logitbank`. Its name there is kept in `trackers.json`, so that an arm that goes on
goes on there too; a step that is taken again, since the checkpoint lay before it, is not sent again.
"""

import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from cache_schema.atomic import publish
from pipeline.errors import RunError, first_line
from pipeline.run_dir import ArmDir

PROJECT = "logitbank"
PACKAGES = {"wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}  # tracker -> what pip installs


def check_installed(names: Sequence[str]) -> None:
    """Raise RunError naming what to install where a tracker's package is missing. Imports none."""
    missing = [name for name in names if name in PACKAGES and find_spec(name) is None]
    if missing:
        packages = " ".join(PACKAGES[name] for name in missing)
        raise RunError(
            f"train.trackers: {', '.join(missing)} cannot be used, since a package is not installed; "
            f"pip install {packages}, or --set 'train.trackers=[tensorboard]'"
        )


class Trackers:
    """The open runs of one arm. names: of trackers, tensorboard aside. config: what the arm is. sent: the last step
    that is there already. A context manager.

    Raises RunError where one cannot be started; OSError where trackers.json cannot be written.
    """

    def __init__(self, names: Sequence[str], folder: ArmDir, config: Mapping[str, Any], sent: int) -> None:
        self._sent: dict[str, int] = {}  # of a run that was begun before
        self._open: dict[str, Any] = {}
        self._failed: list[Any] = []
        run_dir, _, student, arm = folder.root.absolute().parts[-4:]
        kept = _kept(folder.trackers)
        for name in (name for name in names if name in PACKAGES):
            self._sent[name] = sent if name in kept else 0
            try:
                tracker, kept[name] = _started(name, f"{run_dir}/{student}/{arm}", kept.get(name))
                self._open[name] = tracker
                tracker.store_init_configuration(_flat(config))
            except Exception as error:
                self.close()
                raise RunError(
                    f"train.trackers: {name} cannot be started: {first_line(error)}\n  next: set it up as its own "
                    "documentation says, or leave it out: --set 'train.trackers=[tensorboard]'; to begin a new run "
                    f"there, remove {folder.trackers}"
                ) from None
        if self._open:
            publish(folder.trackers, (json.dumps(kept, indent=1) + "\n").encode())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One step's numbers."""
        for name in list(self._open):
            if step > self._sent[name]:
                self._do(name, lambda tracker: tracker.log(dict(values), step=step))

    def close(self) -> None:
        """Send what is left, and end the runs."""
        for name in list(self._open):
            self._do(name, lambda tracker: tracker.finish())
        for tracker in self._failed:  # what it had before the error may still be on its way
            with suppress(Exception):
                tracker.finish()
        self._open, self._failed = {}, []

    def _do(self, name: str, call: Callable[[Any], object]) -> None:
        """A tracker's error is said once, and it is not asked again: training is worth more."""
        try:
            call(self._open[name])
        except Exception as error:
            self._failed.append(self._open.pop(name))
            print(f"train.trackers: {name} is left out from here: {first_line(error)}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _started(name: str, shown: str, kept: str | None) -> tuple[Any, str]:
    """A tracker whose run is open, and what that run is found by later. kept: the same of an earlier time."""
    from accelerate.tracking import MLflowTracker, TrackioTracker, WandBTracker

    own = kept or f"{shown.replace('/', '-')}-{secrets.token_hex(3)}"
    tracker: Any
    if name == "mlflow":
        tracker = MLflowTracker(PROJECT, run_id=kept, run_name=shown)
        tracker.start()
        return tracker, str(tracker.tracker.info.run_id)
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        tracker = WandBTracker(project, id=own, name=shown, resume="allow")
    else:
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        tracker = TrackioTracker(project, name=own, resume="allow", auto_log_gpu=False, auto_log_cpu=False)
    tracker.start()
    return tracker, own


def _kept(path: Path) -> dict[str, str]:
    """tracker -> its run, of an earlier time; nothing where the file cannot be read, which begins new runs."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {name: run for name, run in found.items() if isinstance(run, str)}
    return {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """`{"train": {"lr": 1}}` as `{"train.lr": 1}`: trackers show a table."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str | int | float | bool) else json.dumps(value)
    return found
