"""Stage 1 as its user runs it: killed and resumed, several at once, refused with a reason, and not run for nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys

from cache_schema.errors import CacheError
from cache_schema.reader import CacheReader
from pipeline.cli import guarded
from pipeline.errors import UserError
from stage1_teacher.__main__ import main

ROOT = Path(__file__).parent.parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def stage1(recipe, *extra, env=ENV, launcher=()):
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "stage1_teacher", "--recipe", str(recipe), *extra],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def shard_names(cache):
    return sorted(p.name for p in (cache / "shards").glob("*.parquet"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A cache made in one go, 11 shards of 2 examples: the oracle of the others."""
    folder = tmp_path_factory.mktemp("clean")
    recipe = toys.tiny_recipe(folder, cache={"shard_examples": 2})
    process = stage1(recipe)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "sealed, examples 22 in = 22 written + 0 quarantined" in out
    return folder


@pytest.mark.slow
def test_killed_and_resumed_has_the_same_bytes_as_never_killed(clean):
    cache = clean / "killed"
    extra = ("--set", f"cache.dir={cache}")
    process = stage1(clean / "recipe.yaml", *extra)
    deadline = time.monotonic() + 120
    while len(list((cache / "shards").glob("?????.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache / "sealed.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in (cache / "shards").glob("?????.json")}
    again = stage1(clean / "recipe.yaml", *extra)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0, out
    assert f"{len(kept)} of 11 shards are there" in out
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # what was committed was not touched
    assert shard_names(cache) == shard_names(clean / "cache")  # names carry the SHA-256 of the content


def test_two_processes_of_torchrun_share_the_work(clean):
    cache = clean / "two"
    process = stage1(
        clean / "recipe.yaml",
        "--set",
        f"cache.dir={cache}",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    )
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert CacheReader.open(cache).sealed
    assert shard_names(cache) == shard_names(clean / "cache")
    assert {r.provenance["torch"] for r in CacheReader.open(cache).records} != set()


def test_a_complete_cache_needs_no_teacher(clean, monkeypatch, capsys):
    def never(*args, **kwargs):
        raise AssertionError("the teacher was constructed")

    monkeypatch.setattr("stage1_teacher.teacher.CausalTeacher.__init__", never)
    monkeypatch.setattr("pipeline.models.load_causal_lm", never)
    monkeypatch.setattr("stage1_teacher.teacher.load_causal_lm", never)
    assert main(["--recipe", str(clean / "recipe.yaml")]) == 0
    assert "the teacher is not loaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.shots=1"], r"shots\.count\s+cache: 2\s+asked for: 1"),
        (["cache.top_k=321", "cache.dir={tmp}/k"], "top_k is 321, but the teacher's vocabulary has 320 ids"),
        (["cache.dir={tmp}/file"], "file; expected a folder|is a file"),
        (["cache.dir={tmp}/file/below"], "file; expected a folder|is a file"),
        (["cache.dir={tmp}"], "is no cache|not a cache|not empty"),
        (["teacher.model={tmp}/nothing"], "no such folder"),
        (["teacher.model={tmp}/file"], "expected a folder written by save_pretrained, found a file"),
        (["teacher.model={tmp}"], "found no config.json"),
        (["teacher.thinking=false"], "it has no chat template; set teacher.thinking=null"),
        (["data.dir={tmp}"], "expected a file of JSON lines"),
    ],
)
def test_bad_input_says_what_where_and_what_next(clean, tmp_path, overrides, words):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    settings = [part for o in overrides for part in ("--set", o.format(tmp=tmp_path))]
    with pytest.raises((UserError, CacheError), match=words):
        main(["--recipe", str(clean / "recipe.yaml"), *settings])
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"
    assert CacheReader.open(clean / "cache").sealed


def test_a_user_error_ends_with_code_2_and_no_traceback(clean, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage1_teacher", "--recipe", str(clean / "recipe.yaml"), "--set", "train.lrr=1"])
    assert guarded(main) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: recipe ") and "Did you mean 'lr'" in err and "Traceback" not in err
