"""Stage 3: a checkpoint that fails is left out and told, and the table is the same wherever it was generated."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path

import promised
import pytest
import torch
import toys
from toy_adapters import write_checkpoint

from pipeline.errors import RunError
from pipeline.handout import DEATHS
from pipeline.recipe import Recipe, load_recipe
from pipeline.run_dir import RunDir
from stage3_eval import executor_ray, predictions
from stage3_eval.__main__ import main
from stage3_eval.blocks import Blocks
from stage3_eval.evaluate import ModelRun
from stage3_eval.executor_ray import RemoteAnswers
from stage3_eval.generate.hf import HFEngine
from stage3_eval.subject import Subject


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Two checkpoints of each of two arms, scored by the local executor: `run` as it was before, `scored` after."""
    root = tmp_path_factory.mktemp("trained")
    recipe = load_recipe(str(toys.tiny_recipe(root)))
    for arm, seed in (("sft", 10), ("distill", 20)):
        for step in (2, 4):
            write_checkpoint(RunDir.of(recipe), arm, step, root / "model", seed + step)
    shutil.copytree(root / "run", root / "scored")
    assert main(["--recipe", str(root / "recipe.yaml"), "--set", f"run_dir={root / 'scored'}"]) == 0
    return root


@pytest.fixture
def run(clean, tmp_path) -> Path:
    """The trained run's folder, to be changed."""
    shutil.copytree(clean / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def arguments(clean, run):
    return ["--recipe", str(clean / "recipe.yaml"), "--set", f"run_dir={run}"]


def table(run):
    return (run / "report" / "table.md").read_text(encoding="utf-8")


def answered(run):
    """Every prediction, by file: names carry the identity, lines behind the header are the answers."""
    return {
        str(path.relative_to(run)): dict(predictions.load(path).predictions)
        for path in (run / "predictions").rglob("*.zst")
    }


def test_a_damaged_checkpoint_is_left_out_told_and_tried_again(clean, run, arguments, capsys):
    adapter = RunDir(run).arm("toy", "sft").checkpoint(4) / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-1] + b"\x00")
    assert main(arguments) == 3
    err = capsys.readouterr().err
    assert "1 conditions are missing" in err and f"toy/sft@4: {adapter}: it is not what was written" in err
    assert "**Missing, since it could not be generated:**" in table(run) and "- toy/sft@4: " in table(run)
    results = json.loads((run / "report" / "results.json").read_text(encoding="utf-8"))
    rows = results["students"]["toy"]["blocks"]["test"]["gsm8k"]["strict"]["rows"]
    assert list(results["missing"]) == ["toy/sft@4"] and list(rows) == ["zero_shot", "few_shot", "sft", "distill"]
    assert results["students"]["toy"]["headline"]["sft"]["step"] == 2
    adapter.write_bytes(whole)
    before = answered(run)
    assert main(shlex.split(err.splitlines()[-1])[3:]) == 0
    assert "40 of 48 answers are there" in capsys.readouterr().out and before.items() <= answered(run).items()
    assert table(run) == table(clean / "scored") and answered(run) == answered(clean / "scored")


def test_a_checkpoint_and_a_baseline_that_cannot_be_generated_are_left_out(run, arguments, monkeypatch, capsys):
    real, tries = HFEngine.generate, []

    def generate(self, prompts, adapter, *rest):
        if max(map(len, prompts)) > 100 or (adapter is not None and "distill" in str(adapter)):
            tries.append(1)
            raise RuntimeError(f"CUDA error {len(tries)}")
        return real(self, prompts, adapter, *rest)

    monkeypatch.setattr(HFEngine, "generate", generate)
    assert main(arguments) == 3
    err = capsys.readouterr().err
    assert "3 conditions are missing" in err and len(tries) == 3
    assert "toy/few_shot: RuntimeError: CUDA error 1" in err and "toy/distill@2: RuntimeError: CUDA error" in err
    results = json.loads((run / "report" / "results.json").read_text(encoding="utf-8"))
    assert list(results["students"]["toy"]["blocks"]["test"]["gsm8k"]["strict"]["rows"]) == ["zero_shot", "sft"]


def test_where_nothing_can_be_generated_there_is_no_report(run, arguments, monkeypatch, capsys):
    def generate(self, *rest):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(HFEngine, "generate", generate)
    assert main(arguments) == 3
    err = capsys.readouterr().err
    assert err.count("RuntimeError: CUDA error (at") == 3 + 3  # three were tried, the other three say why not
    assert "not tried, since 3 in a row failed alike" in err and not (run / "report").exists()


def test_a_disk_that_refuses_stops_at_the_first_condition(run, arguments, monkeypatch):
    saved = []

    def refuse(file, *rest):
        saved.append(file.path)
        raise RunError(f"{file.path}: cannot be written: No space left on device")

    monkeypatch.setattr(predictions, "save", refuse)
    with pytest.raises(RunError, match="No space left"):
        main(arguments)
    assert len(saved) == 1


def actors() -> list[int]:
    """The workers on this machine that generate now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::RemoteAnswers.work"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def kill_in_work(run, count, killed):
    """Kill workers at work, one after another has begun. No condition is hit three times, or it would be left out: what
    was hit comes next, so when two more are written it is among them."""
    written = lambda: len(list((run / "predictions").rglob("*.zst")))  # noqa: E731
    at_last = 0
    while len(killed) < count:
        if len(killed) == DEATHS - 1 and written() < at_last + 2:
            time.sleep(0.01)
            continue
        for pid in actors():
            if pid not in killed:
                time.sleep(0.1)
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                at_last = written()
                time.sleep(1)
                break


@pytest.mark.slow
@pytest.mark.promise(promised.DEAD_WORKER)
@pytest.mark.parametrize("kills", [1, 3])
def test_the_clusters_table_is_the_local_one_whoever_dies(cluster, clean, run, arguments, capsys, tried, kills):
    killed: list[int] = []
    killer = threading.Thread(target=kill_in_work, args=(run, kills, killed), daemon=True)
    killer.start()
    assert main([*arguments, "--executor", "ray", "--set", "runtime.workers=2"]) == 0
    out = capsys.readouterr().out
    assert table(run) == table(clean / "scored") and answered(run) == answered(clean / "scored")
    assert len(killed) == kills == out.count("died with") and "2 workers on a Ray cluster" in out
    assert main([*arguments, "--executor", "ray"]) == 0  # all is there: no cluster is needed
    assert "workers on a Ray cluster" not in capsys.readouterr().out
    tried(kills, "workers of a Ray cluster killed while they generated")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_out_on_a_cluster_too(cluster, clean, run, arguments, capsys):
    adapter = RunDir(run).arm("toy", "sft").checkpoint(4) / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x00")
    assert main([*arguments, "--executor", "ray", "--set", "runtime.workers=2"]) == 3
    assert f"toy/sft@4: {adapter}: it is not what was written" in capsys.readouterr().err
    assert "- toy/sft@4: " in table(run)


class OtherRows(RemoteAnswers):
    """The real worker, on a machine whose rows have the same numbers and ask something else."""

    def __init__(self, recipe, folder):
        read = Recipe.model_validate_json(recipe)
        data = read.data.model_copy(update={"dir": f"{read.data.dir}-elsewhere"})
        super().__init__(read.model_copy(update={"data": data}).model_dump_json(), folder)


class OneWorkerHere:
    """In place of a cluster: one worker, in this process."""

    def __init__(self, recipe, worker, arguments):
        self.worker = worker(*arguments)

    def __enter__(self):
        assert self.worker.start() == ""
        return self

    def __exit__(self, *_):
        pass

    def run(self, handout, missing, size, show, extra):
        while (unit := handout.next(0)) is not None:
            for outcome in self.worker.work(unit, False, extra(unit)):
                handout.settle(0, outcome)


@pytest.mark.parametrize("worker", [RemoteAnswers, OtherRows])
def test_answers_to_other_questions_are_not_scored(clean, run, arguments, monkeypatch, capsys, worker):
    """A worker whose rows differ answers under the same numbers: its answers are no answers to ours."""
    data = clean / "data-elsewhere" / "gsm8k"
    toys.write_jsonl(data / "train.jsonl", toys.rows(30, start=500))
    toys.write_jsonl(data / "test.jsonl", toys.rows(8, start=700))
    monkeypatch.setattr(executor_ray, "Cluster", OneWorkerHere)
    monkeypatch.setattr(executor_ray.Crew.__init__, "__defaults__", (worker,))
    code = main([*arguments, "--executor", "ray"])
    err = capsys.readouterr().err
    if worker is RemoteAnswers:  # the control: with the same rows all is well
        assert code == 0 and table(run) == table(clean / "scored")
        return
    assert code == 3 and "6 conditions are missing" in err
    assert re.search(
        r"toy/sft@4: its worker says that it is done, but answers .* are not in \S+/predictions/toy: ", err
    )
    assert not (run / "report").exists()


def test_an_answer_to_another_question_is_none_wherever_it_came_from(run, arguments, capsys):
    """Scores are looked up by id; so what is handed to them must be of these prompts."""
    assert main(arguments) == 0
    recipe = load_recipe(arguments[1], [arguments[3]])
    found = ModelRun(recipe, "toy", Blocks(recipe))
    (job,) = found.jobs_of([("sft@2", "test", False)])
    assert len(found.answers.of(*job[:2]).predictions) == 8
    file = found.answers.files["sft@2", "test"]
    first = file.predictions[job.examples[0].id]
    predictions.save(file, [dataclasses.replace(first, prompt="of another row")], {})
    found.answers.forget([job])
    assert sorted(found.answers.of(*job[:2]).predictions) == sorted(e.id for e in job.examples[1:])


def test_a_worker_that_does_not_see_the_checkpoints_asks_for_a_shared_folder(clean, run, arguments):
    """Its machine has another disk: what the driver has found, it has not."""
    recipe = load_recipe(arguments[1], [arguments[3]])
    worker = RemoteAnswers(recipe.model_dump_json(), str(Path.cwd()))
    assert worker.start() == ""
    shutil.rmtree(RunDir(run).arm("toy", "sft").checkpoint(4))
    (outcome,) = worker.work("sft@4", False, ("toy", [("sft@4", "test", False)]))
    assert outcome.state == "failed" and re.search(
        r"toy/sft@4: expected its checkpoint under \S+/run, found sft@2, distill@2, distill@4; does every machine see "
        r"this folder\?; on \S+$",
        outcome.reason,
    )


def test_a_model_that_cannot_be_loaded_is_tried_once_and_listed(clean, run, arguments, monkeypatch, capsys):
    """Not once for every checkpoint that steps in; and the report of the others says that it is missing."""
    real, tries = Subject.load, []

    def load(self, *rest):
        if self.name == "toy":
            tries.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *rest)

    monkeypatch.setattr(Subject, "load", load)
    reference = f"eval.references={{plain: {{model: {clean / 'model'}, dtype: float32}}}}"
    assert main([*arguments, "--set", reference, "--set", "eval.select=held_out", "--set", "data.held_out=6"]) == 3
    err = capsys.readouterr().err
    assert len(tries) == 1 and "6 conditions are missing" in err and err.count("OutOfMemoryError: CUDA out of") == 6
    assert "- toy/zero_shot: OutOfMemoryError: CUDA out of memory" in table(run)
    results = json.loads((run / "report" / "results.json").read_text(encoding="utf-8"))
    assert list(results["references"]) == ["plain"] and not results["students"] and len(results["missing"]) == 6
