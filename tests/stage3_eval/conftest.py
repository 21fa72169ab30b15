"""A tiny trained run for the tests of stage 3: a real model and real adapters, random, on disk."""

import shutil
from pathlib import Path

import pytest
import toys
from toy_adapters import write_checkpoint

from pipeline.recipe import Recipe, load_recipe
from pipeline.run_dir import RunDir


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with a tiny recipe, its rows, and two checkpoints of each arm. Do not write to it: copy it."""
    root = tmp_path_factory.mktemp("trained")
    recipe = load_recipe(str(toys.tiny_recipe(root)))
    for arm, seed in (("sft", 10), ("distill", 20)):
        for step in (2, 4):
            write_checkpoint(RunDir.of(recipe), arm, step, root / "model", seed + step)
    return root


@pytest.fixture
def run(trained, tmp_path) -> "TinyRun":
    """A copy of the trained run that a test may change; its recipe reads the shared model and rows."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return TinyRun(trained, tmp_path / "run")


class TinyRun:
    """The recipe file of the shared run with a run folder of its own."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.model, self.folder = root / "model", folder
        self.arguments = ["--recipe", str(root / "recipe.yaml"), "--set", f"run_dir={folder}"]

    def sets(self, *overrides: str) -> list[str]:
        """The command line's arguments with some more overrides."""
        return [*self.arguments, *(part for override in overrides for part in ("--set", override))]

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(self.arguments[1], [f"run_dir={self.folder}", *overrides])
