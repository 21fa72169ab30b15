"""A shard that fails in this process: recorded, told with its reason and the command, and the others go on."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time

import pytest
import torch
import toys

from cache_schema.errors import StorageError
from cache_schema.reader import CacheReader
from cache_schema.writer import CacheWriter
from pipeline.errors import RecipeError
from pipeline.fingerprint import Experiment
from pipeline.recipe import load_recipe
from stage1_teacher import executor
from stage1_teacher.__main__ import main
from stage1_teacher.capture import Capture
from stage1_teacher.plan import planned
from stage1_teacher.teacher import CausalTeacher


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A cache made in one go, 11 shards of 2 examples: the oracle of the others."""
    folder = tmp_path_factory.mktemp("clean")
    assert main(["--recipe", str(toys.tiny_recipe(folder, cache={"shard_examples": 2}))]) == 0
    return folder


@pytest.fixture
def arguments(clean, tmp_path):
    """The command line that fills a cache of the test's own."""
    return ["--recipe", str(clean / "recipe.yaml"), "--set", f"cache.dir={tmp_path / 'cache'}"]


def data_files(cache):
    """Names carry the SHA-256 of the content."""
    return sorted(path.name for path in (cache / "shards").glob("*.parquet"))


def retry(stderr):
    """The arguments of the command that the end report names."""
    (line,) = [line for line in stderr.splitlines() if "python -m stage1_teacher" in line]
    return shlex.split(line)[3:]


def poison(monkeypatch, shards, error=lambda: RuntimeError("cannot read this")):
    """Make the capture of some shards of 2 fail."""
    real = Capture.shard

    def capture(self, examples, report=lambda done: None):
        if int(re.sub(r"\D", "", examples[0].id)) in bad:
            raise error()
        return real(self, examples, report)

    bad = set(shards)
    monkeypatch.setattr(Capture, "shard", capture)


def first_examples(clean, shards):
    """The number in the id of the first example of each shard, by which `poison` knows it."""
    rows = Experiment(load_recipe(str(clean / "recipe.yaml"))).training_set.cached
    return [int(re.sub(r"\D", "", rows[2 * shard].id)) for shard in shards]


def test_failed_shards_are_told_and_the_command_retries_just_those(clean, arguments, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, first_examples(clean, [3, 7]))
    assert main(arguments) == 3
    err = capsys.readouterr().err
    assert "shard 3 failed: RuntimeError: cannot read this (at test_local.py:" in err
    assert "2 of 11 shards are missing" in err and retry(err)[-4:] == ["--shard", "3", "--shard", "7"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "shards").iterdir()}
    assert len(kept) == 2 * 9 and not (tmp_path / "cache" / "sealed.json").exists()
    monkeypatch.undo()
    assert main(retry(err)) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert data_files(tmp_path / "cache") == data_files(clean / "cache")
    assert CacheReader.open(tmp_path / "cache").sealed


def test_an_error_of_the_teacher_names_the_examples_in_its_batch(clean, arguments, monkeypatch, capsys):
    real, bad = CausalTeacher.top_k, first_examples(clean, [5])[0]
    example = next(
        e for e in Experiment(load_recipe(arguments[1])).training_set.cached if int(re.sub(r"\D", "", e.id)) == bad
    )

    def top_k(self, batch, *rest):
        text = self.decode([token for item in batch for token in item.input_ids])
        if example.prompt in text:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, *rest)

    tokenizer = Experiment(load_recipe(arguments[1])).teacher_tokenizer
    monkeypatch.setattr(CausalTeacher, "decode", lambda self, ids: tokenizer.decode(ids), raising=False)
    monkeypatch.setattr(CausalTeacher, "top_k", top_k)
    assert main([*arguments, "--set", "runtime.batch_tokens=1"]) == 3
    err = capsys.readouterr().err
    assert f"shard 5 failed: example {example.id}: its" in err and "do not fit into memory" in err
    assert "1 of 11 shards are missing" in err


def test_the_same_error_three_times_in_a_row_stops(arguments, tmp_path, monkeypatch, capsys):
    tries = []

    def broken(self, *rest):
        tries.append(1)
        raise RuntimeError(f"device-side assert {len(tries)}")

    monkeypatch.setattr(CausalTeacher, "top_k", broken)
    assert main(arguments) == 3
    err = capsys.readouterr().err
    assert len(tries) == 3
    assert "was given no more work: 3 in a row failed alike: RuntimeError: device-side assert 3" in err
    assert "not tried: shard 3, shard 4" in err and "11 of 11 shards are missing" in err


@pytest.mark.parametrize(("number", "tries"), [(errno.ENOSPC, 1), (errno.EROFS, 1), (errno.EIO, 11)])
def test_what_cannot_be_written_anywhere_stops_at_once(arguments, monkeypatch, capsys, number, tries):
    """A full disk stops at once, and EIO of one file does not; two kinds of it in turn, so that none comes thrice."""
    tried = []

    def refuse(self, shard, *rest):
        tried.append(shard)
        raise StorageError(f"writing failed {'ab'[shard % 2]}") from OSError(number, os.strerror(number))

    monkeypatch.setattr(CacheWriter, "commit", refuse)
    if tries == 1:
        with pytest.raises(StorageError, match="writing failed a"):
            main(arguments)
    else:
        assert main(arguments) == 3
        assert "shard 10 failed: as shard 0" in capsys.readouterr().err
    assert tried == list(range(tries))


def test_one_shard_alone(arguments, tmp_path, capsys):
    assert main([*arguments, "--shard", "4", "--shard", "9"]) == 0
    assert "the shards asked for are there; 9 others of 11 are missing" in capsys.readouterr().out
    assert [name[:5] for name in data_files(tmp_path / "cache")] == ["00004", "00009"]
    with pytest.raises(RecipeError, match="--shard 11: the cache has the shards 0 to 10"):
        main([*arguments, "--shard", "11"])


def test_a_shard_that_there_is_not_is_refused_of_a_complete_cache_too(clean):
    recipe = ["--recipe", str(clean / "recipe.yaml")]
    assert main([*recipe, "--shard", "10"]) == 0
    with pytest.raises(RecipeError, match="--shard 999: the cache has the shards 0 to 10"):
        main([*recipe, "--shard", "999"])


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 0), (errno.EROFS, 2)])
def test_a_heartbeat_that_fails_once_costs_no_shard(clean, arguments, tmp_path, monkeypatch, number, code):
    """Each shard's second claim, its renewal after a batch, fails; where nothing can be written it stops all."""
    real, claims = CacheWriter.claim, []

    def claim(self, shard):
        claims.append(shard)
        if claims.count(shard) == 2:
            raise StorageError("claiming failed") from OSError(number, os.strerror(number))
        return real(self, shard)

    monkeypatch.setattr(CacheWriter, "claim", claim)
    if code:
        with pytest.raises(StorageError, match="claiming failed"):
            main(arguments)
        return
    assert main(arguments) == 0
    assert max(map(claims.count, claims)) >= 2 and data_files(tmp_path / "cache") == data_files(clean / "cache")


@pytest.mark.parametrize("world", ["1", "2"])
def test_of_torchrun_a_process_that_is_given_no_more_waits_for_the_others(arguments, monkeypatch, capsys, world):
    """torchrun ends the others, in the middle of their shards, when one fails. A process by itself ends at once."""
    experiment = Experiment(load_recipe(arguments[1], [arguments[3]]))
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: other.pid)
        assert CacheWriter.open(experiment.cache_dir, *planned(experiment, ["stage1_teacher"])).claim(1)
    monkeypatch.setattr(executor, "LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr(executor, "QUIET_S", 0.2)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(CausalTeacher, "top_k", lambda *_: (_ for _ in ()).throw(RuntimeError("device-side assert")))
    codes = []
    process = threading.Thread(target=lambda: codes.append(main(arguments)))
    process.start()
    process.join(3 if world == "2" else 100)
    waits = process.is_alive()
    other.kill()
    other.wait()
    process.join(100)
    assert waits == (world == "2") and codes == [3]
    out = capsys.readouterr().out
    assert ("no more shards are tried here: 3 in a row failed alike" in out) == waits
    assert "shards that other processes have claimed" not in out  # nothing of theirs would be taken over


def test_shards_of_others_are_waited_for_and_taken_over(clean, arguments, tmp_path, monkeypatch, capsys):
    """Another process claims shard 6 and dies of it a second later; we end when the cache is whole."""
    monkeypatch.setattr(executor, "LOOK_AGAIN_S", 0.1)
    experiment = Experiment(load_recipe(arguments[1], [arguments[3]]))
    CacheWriter.open(experiment.cache_dir, *planned(experiment, ["stage1_teacher"]))
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(os, "getpid", lambda: other.pid)
    assert CacheWriter.open(experiment.cache_dir, *planned(experiment, ["stage1_teacher"])).claim(6)
    monkeypatch.undo()
    monkeypatch.setattr(executor, "LOOK_AGAIN_S", 0.1)
    seen = []

    def kill_later():
        while len(data_files(tmp_path / "cache")) < 10:
            time.sleep(0.01)
        time.sleep(0.3)
        seen.extend(data_files(tmp_path / "cache"))
        other.kill()
        other.wait()

    killer = threading.Thread(target=kill_later)
    killer.start()
    assert main(arguments) == 0
    killer.join()
    assert "waiting for 1 shards that other processes have claimed" in capsys.readouterr().out
    assert len(seen) == 10 and not any(name.startswith("00006") for name in seen)
    assert data_files(tmp_path / "cache") == data_files(clean / "cache")


def test_the_claim_of_a_worker_known_to_be_dead_is_passed_over(arguments, tmp_path):
    """On another machine nobody can tell, so its claim would stand for a quarter of an hour; the driver can."""
    experiment = Experiment(load_recipe(arguments[1], [arguments[3]]))
    writer = CacheWriter.open(experiment.cache_dir, *planned(experiment, ["stage1_teacher"]))
    assert writer.claim(0)
    (claim,) = (tmp_path / "cache" / "claims").iterdir()
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    worker = executor.worker_of(experiment, CacheWriter.open(experiment.cache_dir, *planned(experiment, [])), [0])
    assert [outcome[:2] for outcome in worker.work(0)] == [(0, "taken")]
    assert worker.work(0, ours=True) == [] and [outcome[:2] for outcome in worker.finish()] == [(0, "done")]
    worker.close()
    assert [name[:5] for name in data_files(tmp_path / "cache")] == ["00000"]


TORCHRUN = """
import os, sys, time
from pipeline.cli import guarded
from stage1_teacher.__main__ import main
from stage1_teacher.capture import Capture

real, poisoned = Capture.shard, sys.argv[1]
def shard(self, examples, report=lambda done: None):
    if examples[0].id == poisoned:
        raise RuntimeError("cannot read this")
    if os.environ["RANK"] == "1" and not hasattr(Capture, "slept"):
        Capture.slept = time.sleep(8)
    return real(self, examples, report)
Capture.shard = shard
sys.argv = ["stage1_teacher", *sys.argv[2:]]
sys.exit(guarded(main))
"""


@pytest.mark.slow
def test_a_failed_shard_of_one_process_of_torchrun_does_not_end_the_others(clean, arguments, tmp_path):
    """torchrun kills the others when one ends with an error: so none may, while another is at work."""
    examples = Experiment(load_recipe(arguments[1])).training_set.cached
    (tmp_path / "process.py").write_text(TORCHRUN)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "process.py")]
    done = subprocess.run(
        [sys.executable, *launcher, examples[2 * 3].id, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["", *sys.path])[1:]},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert (
        "shard 3 failed: RuntimeError: cannot read this" in done.stderr and "1 of 11 shards are missing" in done.stderr
    )
    missing = {name[:5] for name in data_files(clean / "cache")} - {n[:5] for n in data_files(tmp_path / "cache")}
    assert missing == {"00003"}


def test_two_processes_that_wait_for_each_other_both_end(arguments, monkeypatch):
    """Their looks claim for a moment; that is not taken for work. A claim that lasts is."""
    monkeypatch.setattr(executor, "LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr(executor, "QUIET_S", 0.5)
    experiment = Experiment(load_recipe(arguments[1], [arguments[3]]))
    plan = planned(experiment, ["stage1_teacher"])
    writers = [CacheWriter.open(experiment.cache_dir, *plan) for _ in range(2)]
    writers[1]._claims._me = {"host": "elsewhere", "pid": 1}
    waiting = [threading.Thread(target=executor.wait_for_others, args=(w, "broken"), daemon=True) for w in writers]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join(100)
        assert not thread.is_alive()
    assert writers[1].claim(5)
    waiting = threading.Thread(target=executor.wait_for_others, args=(writers[0], "broken"), daemon=True)
    waiting.start()
    waiting.join(2)
    assert waiting.is_alive()
    writers[1].release(5)
    waiting.join(100)
    assert not waiting.is_alive()
