"""Metrics in other trackers: the numbers of metrics.jsonl, each step once, and never in training's way."""

import json
import shutil
from pathlib import Path

import pytest
import toys

import stage2_student.__main__ as stage2
import stage2_student.trackers
from pipeline.errors import RunError
from pipeline.recipe import load_recipe

SETTING = "train.trackers=[tensorboard, {}]"


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A tiny recipe of one arm with a sealed cache."""
    folder = tmp_path_factory.mktemp("trackers")
    recipe = toys.tiny_recipe(folder, arms={"sft": None})
    toys.fill_cache(load_recipe(str(recipe)))
    return recipe


@pytest.fixture
def arm(filled, tmp_path):
    """What trains that arm into a folder of this test, with a tracker; and the folder."""

    class Arm:
        root = tmp_path / "run" / "students" / "toy" / "distill"

        def train(self, tracker):
            return stage2.main(
                ["--recipe", str(filled), "--set", f"run_dir={tmp_path / 'run'}", "--set", SETTING.format(tracker)]
            )

        def lines(self):
            return [json.loads(line) for line in (self.root / "metrics.jsonl").read_text().splitlines()]

        def lose_the_last_checkpoint(self):
            shutil.rmtree(self.root / "checkpoints" / "step-000004")

    return Arm()


@pytest.fixture
def trackio_shown(tmp_path, monkeypatch):
    """What Trackio has of the only run: a dictionary a step. It reads its folder's name when it is imported."""
    storage = pytest.importorskip("trackio.sqlite_storage")
    utils = pytest.importorskip("trackio.utils")
    for module in (storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    def shown():
        (run,) = storage.SQLiteStorage.get_runs("logitbank")
        return storage.SQLiteStorage.get_logs("logitbank", run)

    return shown


@pytest.fixture
def mlflow_shown(tmp_path, monkeypatch):
    """The same of MLflow's folder of files, which it keeps for those who ask."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())

    def shown():
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("logitbank")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.data.params["losses.logit_mse"] == "0.5"
        steps = {}
        for name in run.data.metrics:
            for point in client.get_metric_history(run.info.run_id, name):
                assert name not in steps.setdefault(point.step, {"step": point.step}), "a step is there twice"
                steps[point.step][name] = point.value
        return [steps[step] for step in sorted(steps)]

    yield shown
    mlflow.set_tracking_uri(before)


def numbers(shown, names):
    return [{name: row[name] for name in names} for row in shown]


@pytest.mark.parametrize("tracker", ["trackio", "mlflow"])
def test_a_tracker_has_the_numbers_of_the_file_each_step_once(tracker, arm, request):
    """Trained, its last checkpoint lost, and trained again: steps 3 and 4 are taken twice."""
    shown = request.getfixturevalue(f"{tracker}_shown")
    assert arm.train(tracker) == 0
    first = arm.lines()
    assert [row["step"] for row in first] == [1, 2, 3, 4]
    assert numbers(shown(), first[0]) == first
    arm.lose_the_last_checkpoint()
    assert arm.train(tracker) == 0
    again = numbers(shown(), first[0])
    assert again == first
    alike = [name for name in first[0] if name != "tokens_per_s"]
    assert numbers(arm.lines(), alike) == numbers(first, alike)
    assert list((arm.root / "tensorboard").iterdir())


def test_a_lost_record_begins_another_run(arm, trackio_shown):
    """The control of what `trackers.json` is for. The new run has what is trained from there."""
    assert arm.train("trackio") == 0
    arm.lose_the_last_checkpoint()
    (arm.root / "trackers.json").unlink()
    assert arm.train("trackio") == 0
    with pytest.raises(ValueError, match="too many values"):
        trackio_shown()


def test_trackers_are_no_identity(arm, trackio_shown):
    assert arm.train("trackio") == 0
    before = (arm.root / "arm.json").read_bytes()
    assert b"trackers" not in before
    arm.lose_the_last_checkpoint()
    assert arm.train("tensorboard") == 0
    assert (arm.root / "arm.json").read_bytes() == before


def test_a_missing_package_is_said_before_anything_is_trained(arm, monkeypatch):
    monkeypatch.setattr(stage2_student.trackers, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"wandb cannot be used(.|\n)*pip install wandb"):
        arm.train("wandb")
    assert not arm.root.exists()
    assert arm.train("tensorboard") == 0


def test_a_tracker_that_fails_on_the_way_is_left_out(arm, trackio_shown, monkeypatch, capsys):
    tracking = pytest.importorskip("accelerate.tracking")
    log = tracking.TrackioTracker.log

    def fails_at_3(self, values, step=None):
        if step == 3:
            raise ConnectionError("the line is cut\nand more")
        log(self, values, step=step)

    monkeypatch.setattr(tracking.TrackioTracker, "log", fails_at_3)
    assert arm.train("trackio") == 0
    assert capsys.readouterr().err.count("trackio is left out from here: the line is cut\n") == 1
    assert [row["step"] for row in arm.lines()] == [1, 2, 3, 4]
    assert [row["step"] for row in trackio_shown()] == [1, 2]


def test_one_that_cannot_be_started_is_an_error_that_says_what_to_do(arm, trackio_shown, monkeypatch):
    def refuses(self):
        raise PermissionError("not logged in")

    monkeypatch.setattr("accelerate.tracking.TrackioTracker.start", refuses)
    with pytest.raises(RunError, match=r"trackio cannot be started: not logged in\n(.|\n)*leave it out: --set"):
        arm.train("trackio")
    assert not Path(arm.root / "trackers.json").exists()
    assert not list((arm.root / "checkpoints").iterdir())
