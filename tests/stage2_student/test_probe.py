"""The probe of stage 2 takes real steps on stage 1's sample and leaves nothing behind."""

import json
import shutil

import pytest
import toys

from pipeline.errors import ModelError, RecipeError
from pipeline.recipe import load_recipe
from stage2_student import probe as under_test
from stage2_student.__main__ import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipe, and a folder with a small cache as stage 1's probe leaves it."""
    folder = tmp_path_factory.mktemp("probe")
    path = toys.tiny_recipe(folder, data={"train_limit": 10}, teacher={"shots": 0}, eval={"baselines": ["zero_shot"]})
    recipe = load_recipe(str(path))
    (folder / "out").mkdir()
    shutil.move(toys.fill_cache(recipe), folder / "out" / "cache")
    return folder, path


def test_every_arm_is_timed_and_nothing_is_saved(made, monkeypatch):
    folder, path = made
    taken = []
    real = under_test.take_step

    def counted(*args):
        measured = real(*args)
        taken.append((args[4].run.arm, args[7], measured["loss"]))
        return measured

    monkeypatch.setattr(under_test, "take_step", counted)
    assert main(["--recipe", str(path), "--probe", "2", "--probe-out", str(folder / "out")]) == 0
    found = json.loads((folder / "out" / "toy.json").read_text(encoding="utf-8"))
    assert set(found["step_s"]) == {"sft", "distill"} and all(s > 0 for s in found["step_s"].values())
    assert (found["examples"], found["dropped"], found["steps_timed"]) == (10, 0, 2)
    assert [(arm, step) for arm, step, _ in taken] == [(a, s) for a in ("sft", "distill") for s in range(3)]
    assert len({loss for *_, loss in taken}) == 6  # each step another batch, each arm its own loss
    assert not (folder / "run").exists() and not (folder / "cache").exists()


def test_what_stage_2_would_refuse_is_refused(made):
    folder, path = made
    probe = ["--probe", "1", "--probe-out", str(folder / "out")]
    with pytest.raises(RecipeError, match="unknown student 'tox'"):
        main(["--recipe", str(path), *probe, "--student", "tox"])
    with pytest.raises(ModelError, match="float16, whose gradients underflow"):
        main(["--recipe", str(path), *probe, "--set", "students.toy.dtype=float16"])
