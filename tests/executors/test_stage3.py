"""Stage 3: a checkpoint that fails is left out and told, and the table is the same wherever it was generated."""

import json
import os
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path

import promised
import pytest
import toys
from toy_adapters import write_checkpoint

from pipeline.errors import RunError
from pipeline.recipe import load_recipe
from pipeline.run_dir import RunDir
from stage3_eval import predictions
from stage3_eval.__main__ import main
from stage3_eval.generate.hf import HFEngine


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


def kill_in_work(count, killed):
    """Kill workers at work, one after another has begun."""
    while len(killed) < count:
        for pid in actors():
            if pid not in killed and len(killed) < count:
                time.sleep(0.1)
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                time.sleep(1)


@pytest.mark.slow
@pytest.mark.promise(promised.DEAD_WORKER)
@pytest.mark.parametrize("kills", [1, 3])
def test_the_clusters_table_is_the_local_one_whoever_dies(cluster, clean, run, arguments, capsys, tried, kills):
    killed: list[int] = []
    killer = threading.Thread(target=kill_in_work, args=(kills, killed), daemon=True)
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
