"""Every path of a run, named once. Stages ask here; nobody joins strings elsewhere.

runs/<name>/
  recipe.json                                       the recipe as last run
  students/<student>/alignment.json                 how many of its positions have a teacher, a task
  students/<student>/<arm>/checkpoints/step-000200/ adapter, optimizer, state
  students/<student>/<arm>/metrics.jsonl            a line a step; tensorboard/, trackers.json beside it
  predictions/<student or reference>/<condition>/   what was generated
  report/                                           report.html with its viewer.json; results.json, table.md,
                                                    details.md of a mixture, pictures
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RunError
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class ArmDir:
    """The folder of one arm of one student."""

    root: Path

    @property
    def identity(self) -> Path:
        """What this arm was trained with: settings that a resumed run must share."""
        return self.root / "arm.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def trackers(self) -> Path:
        """The names of its runs in other trackers."""
        return self.root / "trackers.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"


@dataclass(frozen=True)
class RunDir:
    """The folder of one run."""

    root: Path

    @classmethod
    def of(cls, recipe: Recipe) -> "RunDir":
        """The recipe's run folder; raises RunError where a file stands in its place."""
        root = Path(recipe.run_dir or f"runs/{recipe.name}")
        for folder in (root, *root.parents):
            if folder.exists() and not folder.is_dir():
                raise RunError(
                    f"run_dir {root}: {folder} is a file, expected a folder; move it or set run_dir=<folder>"
                )
        return cls(root)

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def alignment(self, student: str) -> Path:
        return self.root / "students" / student / "alignment.json"

    def arm(self, student: str, arm: str) -> ArmDir:
        return ArmDir(self.root / "students" / student / arm)

    def predictions(self, model: str, condition: str) -> Path:
        """model: a student or a reference. condition: a baseline, or `<run>@<step>` with a run's name of an arm."""
        return self.root / "predictions" / model / condition


def default_cache_dir(recipe: Recipe, fingerprint: str) -> str:
    """Where a recipe's cache lies: outside any run, since many students and recipes share it."""
    return f"caches/{recipe.name}-{fingerprint[:12]}"
