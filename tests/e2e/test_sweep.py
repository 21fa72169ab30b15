"""A sweep of a tiny recipe: from one cache, each thing made once, gone on with where it stopped, and compared."""

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import toys

from cache_schema.errors import CacheError
from pipeline.__main__ import main
from pipeline.errors import UserError

ROOT = Path(__file__).parent.parent.parent
OVER = ["--over", "train.lr=1e-3,2e-2", "--over", "arms.distill.logit_mse=0.25,1"]


class Stages:
    """The stages of a sweep in this process, one after another: their command lines are recorded, their mains run."""

    def __init__(self):
        self.ran, self.broken = [], ()

    def run(self, command, stdout=None):
        _, _, module, *arguments = command
        self.ran.append((module, " ".join(arguments)))
        if any(module == of and text in " ".join(arguments) for of, text in self.broken):
            return 9
        name = f"{module}.__main__" if "." not in module else module
        try:
            return import_module(name).main(arguments)
        except (UserError, CacheError) as error:
            print(error, file=sys.stderr)
            return 2

    def of(self, module):
        return [arguments for ran, arguments in self.ran if ran == module]


@pytest.fixture
def stages(monkeypatch):
    stages = Stages()
    monkeypatch.setattr("pipeline.commands.sweep.run_stage", stages.run)
    return stages


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep of four points, in this process; its folder, what ran, and what was printed."""
    folder, stages = tmp_path_factory.mktemp("sweep"), Stages()
    recipe = toys.tiny_recipe(folder, data={"eval_limit": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.commands.sweep.run_stage", stages.run)
        assert main(["sweep", "--recipe", str(recipe), *OVER]) == 0
    return folder, stages


def comparison(folder):
    return json.loads((folder / "run-sweep" / "comparison.json").read_text(encoding="utf-8"))


def adapters(folder, arm):
    """Point -> the bytes of an arm's last adapter, of all points."""
    pattern = f"run-sweep/*/students/toy/{arm}/checkpoints/step-000004/adapter_model.safetensors"
    return {path.parts[-7]: path.read_bytes() for path in sorted(folder.glob(pattern))}


def test_stage_1_runs_once_and_the_others_once_a_point(swept):
    folder, stages = swept
    modules = [module for module, _ in stages.ran]
    assert modules == ["stage1_teacher", *["stage2_student", "stage3_eval"] * 4, "stage3_eval.sweep"]
    assert len(list(folder.glob("cache*"))) == 1


def test_what_points_would_make_alike_is_made_once(swept):
    """Two learning rates make two adapters of sft, whatever the weight of the other arm; distill has four."""
    folder, _ = swept
    sft, distill = adapters(folder, "sft"), adapters(folder, "distill")
    assert (len(sft), len(set(sft.values()))) == (4, 2)
    assert (len(distill), len(set(distill.values()))) == (4, 4)
    metrics = list(folder.glob("run-sweep/*/students/toy/sft/metrics.jsonl"))
    assert len({path.stat().st_ino for path in metrics}) == 2
    for condition, made in (("zero_shot", 1), ("few_shot", 1), ("sft@4", 2), ("distill@4", 4)):
        files = list(folder.glob(f"run-sweep/*/predictions/toy/{condition}/*.jsonl.zst"))
        assert (len(files), len({path.stat().st_ino for path in files})) == (4, made), condition


def test_what_was_taken_is_what_the_point_makes_alone(swept, tmp_path):
    """The control: a point run by itself, by the command that a sweep names, has the same numbers to the last digit."""
    folder, stages = swept
    last = comparison(folder)["points"][-1]
    arguments = stages.of("stage2_student")[-1].split()
    settings = [f"run_dir={tmp_path / 'alone'}" if a.startswith("run_dir=") else a for a in arguments]
    for module in ("stage2_student", "stage3_eval"):
        assert import_module(f"{module}.__main__").main(settings) == 0
    made, alone = (
        json.loads((Path(d) / "report" / "results.json").read_text()) for d in (last["run_dir"], tmp_path / "alone")
    )
    assert made["students"] == alone["students"]


def test_a_finished_sweep_only_compares(swept, stages, capsys):
    folder, _ = swept
    recipe = str(folder / "recipe.yaml")
    assert (
        main(["sweep", "--recipe", recipe, *OVER, "--against", "train.lr=.02", "--against", "arms.distill.logit_mse=1"])
        == 0
    )
    assert [module for module, _ in stages.ran] == ["stage3_eval.sweep"]
    assert comparison(folder)["against"] == "train.lr=0.02 arms.distill.logit_mse=1"
    assert capsys.readouterr().out.count(": finished") == 4


def test_the_comparison_says_what_is_compared(swept, stages):
    folder, _ = swept
    assert main(["sweep", "--recipe", str(folder / "recipe.yaml"), *OVER]) == 0
    found = comparison(folder)
    table = found["students"]["toy"]["test"]["tables"]["gsm8k"]
    assert list(table["baselines"]) == ["zero_shot", "few_shot"]
    rows = {(row["point"], row["arm"]): row for row in table["rows"]}
    assert len(rows) == 8 and {row["n"] for row in rows.values()} == {4}
    shown = {key: (row["same"], row["difference"] is None) for key, row in rows.items()}
    first, second, third, fourth = [point["point"] for point in found["points"]]
    assert [shown[first, arm] for arm in ("sft", "distill")] == [(False, True)] * 2, "the point compared with"
    assert [shown[second, arm] for arm in ("sft", "distill")] == [(True, True), (False, False)]
    assert all(shown[point, arm] == (False, False) for point in (third, fourth) for arm in ("sft", "distill"))
    assert found["compared"] == 4, "sft at the other rate was trained once, and is compared once"
    best = found["students"]["toy"]["test"]["best"]
    assert (best["chosen_on"], best["fair"], best["among"]) == ("test", False, 6)
    text = (folder / "run-sweep" / "comparison.md").read_text(encoding="utf-8")
    assert "chosen on these same 4 examples" in text and text.count("| distill ") == 4


def test_another_sweep_of_the_same_cache_runs_only_what_is_new(swept, stages):
    folder, _ = swept
    over = ["--over", "train.lr=1e-3", "--over", "arms.distill.logit_mse=0.25,2"]
    assert main(["sweep", "--recipe", str(folder / "recipe.yaml"), *over]) == 0
    (trained,) = stages.of("stage2_student")
    assert "arms.distill.logit_mse=2" in trained


def test_a_failed_point_does_not_stop_the_others(swept, stages, tmp_path, capsys):
    folder, _ = swept
    copy = tmp_path / "sweep"
    shutil.copytree(folder / "cache", copy / "cache")
    recipe = toys.tiny_recipe(copy, data={"eval_limit": 4}, train={"steps": 2})
    stages.broken = [("stage2_student", "seed=1")]
    over = ["--over", "train.seed=0,1,2"]
    assert main(["sweep", "--recipe", str(recipe), *over]) == 3
    told = capsys.readouterr().err
    assert "1 of 3 points are not finished" in told and "stage 2 stopped with exit code 9" in told
    again = next(line.strip() for line in told.splitlines() if line.strip().startswith("python -m pipeline run"))
    assert "train.seed=1" in again and "run_dir=" in again
    found = comparison(copy)
    assert [bool(point["missing"]) for point in found["points"]] == [False, True, False]
    assert len(found["students"]["toy"]["test"]["tables"]["gsm8k"]["rows"]) == 4
    stages.broken, stages.ran = (), []
    assert main(["sweep", "--recipe", str(recipe), *over]) == 0
    (trained,) = stages.of("stage2_student")
    assert "train.seed=1" in trained
    assert len(comparison(copy)["students"]["toy"]["test"]["tables"]["gsm8k"]["rows"]) == 6


def test_points_of_two_caches_are_not_compared(tmp_path, stages, monkeypatch):
    """The training rows changed between two calls: the finished point is of the old cache, the new one of another."""
    monkeypatch.chdir(tmp_path)
    few = {"cache": {"dir": None}, "train": {"steps": 2}, "eval": {"baselines": ["zero_shot"]}}
    recipe = toys.tiny_recipe(tmp_path, data={"eval_limit": 4}, **few)
    assert main(["sweep", "--recipe", str(recipe), "--over", "train.lr=1e-3"]) == 0
    toys.write_jsonl(tmp_path / "data" / "gsm8k" / "train.jsonl", toys.rows(24, start=40))
    assert main(["sweep", "--recipe", str(recipe), "--over", "train.lr=1e-3,2e-2"]) == 3
    assert len(list((tmp_path / "caches").iterdir())) == 2
    found = comparison(tmp_path)
    old, new = (point["missing"] for point in found["points"])
    assert old == {} and "only points of one cache are compared" in new["toy"] and "rm -r" in new["toy"]
    assert {row["point"] for row in found["students"]["toy"]["test"]["tables"]["gsm8k"]["rows"]} == {"train.lr=0.001"}


def test_another_untouched_student_has_a_row_of_its_own(tmp_path, stages):
    """Where a swept key changes its answers too; where it does not, it has one row (above)."""
    recipe = toys.tiny_recipe(tmp_path, data={"eval_limit": 4})
    assert main(["sweep", "--recipe", str(recipe), "--over", "eval.max_new_tokens=2,3"]) == 0
    (table,) = comparison(tmp_path)["students"]["toy"]["test"]["tables"].values()
    names = list(table["baselines"])
    assert len(names) == 2 * len({name.partition(",")[0] for name in names})
    assert [name for name in names if name.endswith(", eval.max_new_tokens=3")] == [
        f"{name}, eval.max_new_tokens=3" for name in names if "," not in name
    ]


def test_a_point_that_is_not_trained_to_the_end_says_so(swept, tmp_path, stages):
    """Its row is of an earlier step than the others'."""
    folder, _ = swept
    shutil.copytree(folder / "cache", tmp_path / "cache")
    recipe = toys.tiny_recipe(tmp_path, data={"eval_limit": 4}, arms={"sft": None})
    over = ["--over", "train.seed=0,1"]
    assert main(["sweep", "--recipe", str(recipe), *over]) == 0
    (point,) = (Path(of["run_dir"]) for of in comparison(tmp_path)["points"] if of["settings"] == {"train.seed": 1.0})
    shutil.rmtree(point / "predictions" / "toy" / "distill@4")
    assert main(["sweep", "--recipe", str(recipe), *over]) == 3
    first, second = (of["missing"] for of in comparison(tmp_path)["points"])
    assert (first, second) == ({}, {"toy/distill": "its last answers are of step 2 of 4"})


def test_nothing_starts_where_a_point_is_wrong(swept, stages):
    folder, _ = swept
    for over in ("train.lr=1e-3,-1", "cache.top_k=8,16", "train.nosuch=1"):
        with pytest.raises(UserError):
            main(["sweep", "--recipe", str(folder / "recipe.yaml"), "--over", over])
    assert stages.ran == []


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(tmp_path):
    """In processes of their own, two at a time; killed after the first point's students are trained."""
    recipe = toys.tiny_recipe(tmp_path, data={"eval_limit": 4})
    command = [sys.executable, "-m", "pipeline", "sweep", "--recipe", str(recipe), *OVER, "--jobs", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    first = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        while not adapters(tmp_path, "distill"):
            assert first.poll() is None
    finally:
        os.killpg(first.pid, 9)
        first.wait()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(set(adapters(tmp_path, "sft").values())) == 2
    assert len(set(adapters(tmp_path, "distill").values())) == 4
    found = comparison(tmp_path)
    assert not any(point["missing"] for point in found["points"])
    assert all((Path(point["run_dir"]) / "sweep.log").stat().st_size for point in found["points"])
