"""Stage 1 on a real cluster of two workers, here: the local run's bytes, whoever is killed, whatever fails."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import promised
import pytest
import toys

from cache_schema.reader import CacheReader
from cache_schema.writer import CacheWriter
from pipeline import cluster as cluster_module
from pipeline.errors import RunError
from pipeline.fingerprint import Experiment
from pipeline.handout import Handout
from pipeline.recipe import load_recipe
from stage1_teacher import executor_ray
from stage1_teacher.__main__ import main
from stage1_teacher.plan import planned

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A cache made in one go by the local executor, 20 shards of 3 examples read one by one: the oracle."""
    folder = tmp_path_factory.mktemp("clean")
    toys.write_jsonl(folder / "data" / "gsm8k" / "train.jsonl", toys.rows(62))
    toys.write_jsonl(folder / "data" / "gsm8k" / "test.jsonl", toys.rows(8, start=100))
    recipe = toys.tiny_recipe(folder, cache={"shard_examples": 3}, runtime={"batch_tokens": 1})
    assert main(["--recipe", str(recipe)]) == 0
    return folder


@pytest.fixture
def arguments(cluster, clean, tmp_path):
    """The command line that fills a cache of the test's own on the cluster."""
    settings = (f"cache.dir={tmp_path / 'cache'}", "runtime.workers=2")
    return ["--recipe", str(clean / "recipe.yaml"), *(p for s in settings for p in ("--set", s)), "--executor", "ray"]


def data_files(cache):
    """Names carry the SHA-256 of the content."""
    return sorted(path.name for path in (cache / "shards").glob("*.parquet"))


def actors() -> dict[int, str]:
    """pid -> what it does, of the workers on this machine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes().decode().strip("\0 ")
        except OSError:
            continue
        if title.startswith("ray::") and "Shards" in title:
            found[int(path.parent.name)] = title
    return found


class Killer(threading.Thread):
    """Sends SIGKILL to a worker, as often as there are moments, while the main thread drives the cluster.

    A moment is (what, delay): `claim`, its claim on a shard is there; `start`, it loads its teacher; then `delay`
    seconds more. Before the next one a shard more must be committed, and no shard is hit twice: what only kills is left
    out after three deaths, which is another test. killed: the shard that each had claimed, if any.
    """

    def __init__(self, cache: Path, moments) -> None:
        super().__init__(daemon=True)
        self.cache, self.moments, self.killed = cache, moments, []
        self.committed: dict[Path, int] = {}

    def run(self):
        seen = set()
        for what, delay in self.moments:
            while not (victim := self.victim(what, seen)):
                if (self.cache / "sealed.json").exists():
                    return
                time.sleep(0.0005)
            time.sleep(delay)
            for path in (self.cache / "shards").glob("?????.json"):
                self.committed[path] = path.stat().st_mtime_ns
            pid, shard = victim
            seen.add(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.killed.append(shard)
            records = len(data_files(self.cache))
            while len(data_files(self.cache)) <= records and not (self.cache / "sealed.json").exists():
                time.sleep(0.001)

    def victim(self, what, seen):
        if what == "start":
            return next(((pid, None) for pid, title in actors().items() if ".start" in title and pid not in seen), None)
        for path in (self.cache / "claims").glob("?????"):
            try:
                pid = json.loads(path.read_bytes())["pid"]
            except (OSError, ValueError):
                continue
            if int(path.name) in self.killed:
                continue
            if pid not in seen and not (self.cache / "shards" / f"{path.name}.json").exists():
                return pid, int(path.name)
        return None


def killed_and_compared(clean, cache, arguments, moments, out) -> int:
    """Fill a cache while workers are killed; how many died. Its bytes must be the clean run's."""
    killer = Killer(cache, moments)
    killer.start()
    assert main(arguments) == 0
    killer.join()
    assert data_files(cache) == data_files(clean / "cache")
    assert CacheReader.open(cache).sealed
    assert {path: path.stat().st_mtime_ns for path in killer.committed} == killer.committed  # none was done again
    died = re.findall(r"worker \d died with (.*) in work", out())
    assert len(died) <= len(killer.killed)  # the last may have come when there was nothing left to notice it by
    for units in died:  # the shard in work, and the one before it if its writing was not known to have ended
        assert len(units.split(", ")) <= 2
    return len(died)


@pytest.mark.promise(promised.DEAD_WORKER)
def test_a_worker_killed_in_the_middle_of_a_shard_loses_that_shard_only(clean, arguments, tmp_path, capsys, tried):
    out = lambda: capsys.readouterr().out  # noqa: E731
    count = killed_and_compared(clean, tmp_path / "cache", arguments, [("claim", 0.03)], out)
    assert count == 1
    tried(count, "workers of a Ray cluster killed in the middle of a shard")


@pytest.mark.slow
def test_without_handing_it_out_again_a_dead_workers_shard_is_missing(clean, arguments, tmp_path, monkeypatch, capsys):
    """The control of these tests: the same kill, and a driver that forgets what the dead worker had."""
    real = Handout.lost

    def forget(self, worker, why, missing):
        real(self, worker, why, ())

    monkeypatch.setattr(Handout, "lost", forget)
    killer = Killer(tmp_path / "cache", [("claim", 0.03)])
    killer.start()
    assert main(arguments) == 3
    killer.join()
    missing = {name[:5] for name in data_files(clean / "cache")} - {n[:5] for n in data_files(tmp_path / "cache")}
    assert {f"{shard:05d}" for shard in killer.killed} <= missing and 1 <= len(missing) <= 2


@pytest.mark.slow
@pytest.mark.promise(promised.DEAD_WORKER)
@pytest.mark.timeout(1500)
def test_workers_killed_at_many_moments(clean, arguments, tmp_path, capsys, tried):
    count, rng = 0, random.Random(0)
    out = lambda: capsys.readouterr().out  # noqa: E731
    for turn in range(6):
        moments = [("claim", rng.random() * 0.05) for _ in range(4)] + [("start", rng.random() * 2)] * (turn % 2)
        rng.shuffle(moments)
        cache = tmp_path / f"cache-{turn}"
        settings = [argument.replace(str(tmp_path / "cache"), str(cache)) for argument in arguments]
        count += killed_and_compared(clean, cache, settings, moments, out)
    assert count >= 20
    tried(count, "workers of a Ray cluster killed at random moments")


class PoisonedShards(executor_ray.RemoteShards):
    """The real worker, whose teacher cannot read shard 4."""

    def work(self, unit, ours, extra):
        if unit != 4:
            return super().work(unit, ours, extra)
        capture = self.shards.capture.teacher
        real = type(capture).top_k

        def refuse(*rest):
            raise RuntimeError("cannot read this")

        type(capture).top_k = refuse
        try:
            return super().work(unit, ours, extra)
        finally:
            type(capture).top_k = real


class DeadlyShards(executor_ray.RemoteShards):
    """The real worker, which dies of shard 9 whoever is asked."""

    def work(self, unit, ours, extra):
        if unit == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().work(unit, ours, extra)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("worker", "bad", "reason"),
    [
        (PoisonedShards, 4, r"RuntimeError: cannot read this \(at .*\); in the batch of train/"),
        (DeadlyShards, 9, r"3 workers died at it, the last one of: "),
    ],
    ids=["fails", "kills"],
)
def test_a_bad_shard_is_told_and_the_others_are_done(
    clean, arguments, tmp_path, monkeypatch, capsys, worker, bad, reason
):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(executor_ray.run_on_cluster, "__defaults__", (worker,))
    assert main(arguments) == 3
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    err = capsys.readouterr().err
    assert re.search(f"shard {bad} failed: {reason}", err) and "1 of 20 shards are missing" in err
    (line,) = [line for line in err.splitlines() if "python -m stage1_teacher" in line]
    assert line.endswith(f"--shard {bad}")
    monkeypatch.undo()
    assert main([*shlex.split(line)[3:], "--executor", "local"]) == 0
    assert data_files(tmp_path / "cache") == data_files(clean / "cache")


@pytest.mark.slow
def test_a_worker_killed_while_it_waits_loses_nothing(clean, arguments, tmp_path, monkeypatch, capsys):
    """A process outside the cluster has claimed shard 19: the workers have nothing to do until it dies."""
    experiment = Experiment(load_recipe(arguments[1], [arguments[3]]))
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    monkeypatch.setattr(os, "getpid", lambda: other.pid)
    assert CacheWriter.open(experiment.cache_dir, *planned(experiment, ["stage1_teacher"])).claim(19)
    monkeypatch.undo()

    def kill_both():
        while len(data_files(tmp_path / "cache")) < 19:
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(next(iter(actors())), signal.SIGKILL)
        time.sleep(0.5)
        other.kill()
        other.wait()

    killer = threading.Thread(target=kill_both)
    killer.start()
    assert main(arguments) == 0
    killer.join()
    assert data_files(tmp_path / "cache") == data_files(clean / "cache")


def test_a_worker_whose_machine_has_another_teacher_is_refused(clean, tmp_path):
    """What a worker makes of the recipe must be what the cache was begun with. Started here, without a cluster."""
    recipe = load_recipe(str(clean / "recipe.yaml"), [f"cache.dir={tmp_path / 'cache'}"])
    experiment = Experiment(recipe)
    CacheWriter.open(experiment.cache_dir, *planned(experiment, ["stage1_teacher"]))
    assert executor_ray.RemoteShards(recipe.model_dump_json(), str(Path.cwd()), [], [0]).start() == ""
    other = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"shots": 1})})
    refused = executor_ray.RemoteShards(other.model_dump_json(), str(Path.cwd()), [], [0]).start()
    assert re.search(r"^on \S+: the cache at (.|\n)*shots\.count\s+cache: 2\s+asked for: 1", refused)


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"Ray is not installed here; pip install 'logitbank\[ray\]'"):
        cluster_module.connect("ray")
