"""Stage 1 with an encoder-decoder as its user runs it: stopped, killed and resumed; refused by kind; told by task."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import toys

from cache_schema.errors import CacheError
from cache_schema.reader import CacheReader
from pipeline.errors import UserError
from stage1_teacher.__main__ import main
from stage1_teacher.teacher import Seq2SeqTeacher

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A cache made in one go, 6 shards of 4 examples: the oracle of the others."""
    folder = tmp_path_factory.mktemp("seq2seq")
    toys.tiny_tokenizer(folder / "model")
    toys.tiny_t5(folder / "model", pad_token_id=1, decoder_start_token_id=1, eos_token_id=0)
    path = toys.tiny_recipe(
        folder,
        teacher={"kind": "seq2seq", "shots": 0},
        cache={"store_ids": False, "temperatures": [1.2], "shard_examples": 4},
        arms={"distill": None, "uld": {"ce": 1.0, "uld": 0.5, "temperature": 1.2}},
        eval={"baselines": ["zero_shot"]},
        runtime={"batch_tokens": 150},
    )
    assert main(["--recipe", str(path)]) == 0
    return path


def shard_names(cache: Path) -> list[str]:
    """Names carry the SHA-256 of the content."""
    return sorted(path.name for path in (cache / "shards").glob("*.parquet"))


def test_stopped_inside_a_shard_and_resumed_has_the_same_bytes(clean, monkeypatch):
    cache, real, batches = clean.parent / "stopped", Seq2SeqTeacher.answer_logits, []

    def interrupted(self: Any, batch: Any, context_ids: Any) -> Any:
        batches.append(len(batch))
        if len(batches) == 8:
            raise KeyboardInterrupt
        return real(self, batch, context_ids)

    arguments = ["--recipe", str(clean), "--set", f"cache.dir={cache}"]
    monkeypatch.setattr(Seq2SeqTeacher, "answer_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    committed = shard_names(cache)
    assert 0 < len(committed) < 6 and not (cache / "sealed.json").exists()
    monkeypatch.undo()
    assert main(arguments) == 0
    assert shard_names(cache) == shard_names(clean.parent / "cache") and set(committed) < set(shard_names(cache))


@pytest.mark.slow
def test_killed_and_resumed_has_the_same_bytes_as_never_killed(clean):
    def stage1(cache: Path) -> subprocess.Popen[str]:
        command = ["-m", "stage1_teacher", "--recipe", str(clean), "--set", f"cache.dir={cache}"]
        return subprocess.Popen(
            [sys.executable, *command, "--set", "cache.shard_examples=1"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    cache, whole = clean.parent / "killed", clean.parent / "whole"
    process = stage1(cache)
    deadline = time.monotonic() + 120
    while len(list((cache / "shards").glob("?????.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache / "sealed.json").exists()
    for folder in (cache, whole):
        again = stage1(folder)
        out, _ = again.communicate(timeout=120)
        assert again.returncode == 0, out
    assert shard_names(cache) == shard_names(whole)


def test_a_complete_cache_says_what_it_has_and_needs_no_teacher(clean, monkeypatch, capsys):
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher was constructed")

    monkeypatch.setattr(Seq2SeqTeacher, "__init__", never)
    monkeypatch.setattr("stage1_teacher.teacher.load_seq2seq_lm", never)
    assert main(["--recipe", str(clean)]) == 0
    out = capsys.readouterr().out
    totals = CacheReader.open(clean.parent / "cache").totals()
    assert "the teacher is not loaded" in out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in rows[-1].split("|")[1:6]] == [
        "gsm8k",
        "24",
        "0",
        f"{totals.positions.input:,}",
        f"{totals.positions.written:,}",
    ]
    assert CacheReader.open(clean.parent / "cache").manifest.provenance["rows"]["truncated_contexts"] == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.kind=causal"], "is an encoder-decoder (t5), but teacher.kind is causal; --set teacher.kind=seq2seq"),
        (["teacher.dtype=float16"], "overflow; --set teacher.dtype=bfloat16"),
        (["teacher.thinking=false"], "it has no chat template; set teacher.thinking=null"),
        (["cache.store_ids=true", "cache.dir={cache}"], "store_ids"),
    ],
)
def test_what_does_not_fit_is_refused(clean, tmp_path, overrides, words):
    settings = ["cache.dir={tmp}/new", *overrides]
    places = {"tmp": tmp_path, "cache": clean.parent / "cache"}
    with pytest.raises((UserError, CacheError)) as raised:
        main(["--recipe", str(clean), *(part for s in settings for part in ("--set", s.format(**places)))])
    assert words in str(raised.value)
    assert not (tmp_path / "new").exists()
