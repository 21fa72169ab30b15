"""The whole way, as a user walks it: run, run again, train once more from the cache alone, score once more."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toys

import stage1_teacher.__main__
import stage2_student.__main__
import stage3_eval.__main__
from cache_schema.errors import FingerprintMismatch, IncompleteCache
from pipeline.__main__ import main as pipeline_main
from pipeline.errors import RunError, UserError

ROOT = Path(__file__).parent.parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny recipe, run whole in child processes; its folder and what was printed."""
    folder = tmp_path_factory.mktemp("run")
    recipe = toys.tiny_recipe(folder)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", "--recipe", str(recipe)],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture
def no_teacher(monkeypatch):
    """Any attempt to construct a teacher fails the test."""

    def never(*args, **kwargs):
        raise AssertionError("the teacher was constructed")

    monkeypatch.setattr("stage1_teacher.teacher.CausalTeacher.__init__", never)
    monkeypatch.setattr("stage1_teacher.teacher.load_teacher", never)


def run_all(recipe):
    """The three stages in this process, in their order."""
    return [
        stage.main(["--recipe", str(recipe)])
        for stage in (stage1_teacher.__main__, stage2_student.__main__, stage3_eval.__main__)
    ]


def test_a_run_ends_with_the_table_and_the_pictures(finished):
    folder, out = finished
    for words in (
        "=== stage 1 of 3",
        "sealed, examples 22 in",
        "=== stage 3 of 3",
        "| few_shot ",
        "all three stages took",
    ):
        assert words in out
    report = folder / "run" / "report"
    pictures = sorted(p.name for p in report.glob("*.png"))
    assert len(pictures) == 3 and all(str(report / name) in out for name in pictures)
    results = json.loads((report / "results.json").read_text(encoding="utf-8"))
    rows = results["students"]["toy"]["blocks"]["test"]["gsm8k"]["strict"]["rows"]
    assert list(rows) == ["zero_shot", "few_shot", "sft", "distill"]
    assert {row["n"] for row in rows.values()} == {8}
    assert (report / "table.md").read_text(encoding="utf-8").count("| distill ") >= 2


def test_running_again_finds_all_of_it_and_changes_nothing(finished, no_teacher, capsys):
    folder, _ = finished
    kept = ["cache", "run/students", "run/predictions"]
    before = {p: p.stat().st_mtime_ns for name in kept for p in (folder / name).rglob("*") if p.is_file()}
    assert run_all(folder / "recipe.yaml") == [0, 0, 0]
    out = capsys.readouterr().out
    assert "the teacher is not loaded" in out and "toy/distill: done" in out
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_deleted_student_is_trained_again_from_the_cache_alone(finished, no_teacher):
    folder, _ = finished
    adapter = folder / "run/students/toy/distill/checkpoints/step-000004/adapter_model.safetensors"
    first = adapter.read_bytes()
    shutil.rmtree(folder / "run" / "students")
    assert run_all(folder / "recipe.yaml") == [0, 0, 0]
    assert adapter.read_bytes() == first


def test_status_and_show_tell_what_is_there(finished, capsys):
    folder, _ = finished
    assert pipeline_main(["status", "--recipe", str(folder / "recipe.yaml")]) == 0
    out = capsys.readouterr().out
    assert "sealed" in out and "toy/sft: step-000004 of 4 steps" in out and "not there yet" not in out
    assert f"report   {folder / 'run' / 'report' / 'report.html'}\n" in out
    assert pipeline_main(["show", "--recipe", str(folder / "recipe.yaml"), "--field", "cache.dir"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "cache")


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["cache.top_k=8", "run_dir={folder}/other"], FingerprintMismatch, r"cache\.top_k\s+cache: 16\s+asked for: 8"),
        (["train.lr=0.5"], RunError, r"train\.lr: trained with 0\.001, now asked for 0\.5"),
        (["run_dir={folder}/recipe.yaml"], UserError, "is a file|found a file"),
    ],
)
def test_what_does_not_belong_together_is_refused(finished, overrides, error, words):
    folder, _ = finished
    settings = [part for o in overrides for part in ("--set", o.format(folder=folder))]
    with pytest.raises(error, match=words):
        stage2_student.__main__.main(["--recipe", str(folder / "recipe.yaml"), *settings])


def test_an_incomplete_cache_names_its_missing_shards(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "cache", tmp_path / "cache")
    (tmp_path / "cache" / "sealed.json").unlink()
    (tmp_path / "cache" / "shards" / "00001.json").unlink()
    settings = ["--set", f"cache.dir={tmp_path / 'cache'}", "--set", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(IncompleteCache, match=r"1 of 3 shards are missing \(1\)(.|\n)*stage1_teacher"):
        stage2_student.__main__.main(["--recipe", str(folder / "recipe.yaml"), *settings])


def test_a_missing_interpreter_is_named(finished):
    folder, _ = finished
    with pytest.raises(RunError, match=r"runtime\.python\.stage1_teacher: .* Python interpreter, found /no/python"):
        pipeline_main(
            [
                "run",
                "--recipe",
                str(folder / "recipe.yaml"),
                "--set",
                "runtime.python={stage1_teacher: /no/python}",
            ]
        )
