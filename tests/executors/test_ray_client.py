"""`--executor ray://HOST:PORT`, a driver that is no part of the cluster, and RAY_ADDRESS, one that joins it. A head of
its own is started for them here."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys

from pipeline import cluster
from pipeline.cli import EXIT_INCOMPLETE
from pipeline.errors import RunError

ray = pytest.importorskip("ray")
ROOT = Path(__file__).parent.parent.parent
ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # of the head and the driver alike
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def address(tmp_path):
    """Of a cluster of two processors: where its client server listens, and what RAY_ADDRESS would say."""
    port, gcs = free_port(), free_port()
    where = Path("/tmp") / f"r{os.getpid()}"  # Ray's sockets need a short path
    start = ["start", "--head", "--block", f"--port={gcs}", f"--ray-client-server-port={port}", "--num-cpus=2"]
    quiet = ["--object-store-memory=80000000", "--include-dashboard=false", "--disable-usage-stats"]
    program = [sys.executable, "-m", "ray.scripts.scripts", *start, *quiet, f"--temp-dir={where}"]
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(program, cwd=ROOT, env=ENV, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 90
    host = None
    while host is None and time.monotonic() < deadline and head.poll() is None:
        found = re.search(r"Local node IP: (\S+)(.|\n)*Ray runtime started", (tmp_path / "head.log").read_text())
        host = found and found[1]
        time.sleep(0.2)
    assert host, (tmp_path / "head.log").read_text()
    host = re.sub(chr(27) + r".[0-9;]*m", "", host)
    yield f"ray://{host}:{port}", f"{host}:{gcs}"
    head.terminate()
    head.wait(60)
    shutil.rmtree(where, ignore_errors=True)


@pytest.mark.slow
def test_a_client_of_a_cluster_makes_the_local_executors_cache_and_table(address, tmp_path):
    recipe = toys.tiny_recipe(tmp_path, cache={"shard_examples": 4})

    def call(stage, *extra, env=ENV, code=0):
        done = subprocess.run(
            [sys.executable, "-m", stage, "--recipe", str(recipe), *extra],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    client, ray_address = address
    on_cluster = ["--executor", client, "--set", "runtime.workers=2"]
    there = ["--set", f"cache.dir={tmp_path / 'there'}", "--set", f"run_dir={tmp_path / 'run-there'}"]
    assert "2 workers on a Ray cluster of 1 machines" in call("stage1_teacher", *there, *on_cluster)
    call("stage1_teacher")
    names = [sorted(p.name for p in (tmp_path / d / "shards").glob("*.parquet")) for d in ("cache", "there")]
    assert names[0] == names[1] and len(names[0]) == 6
    joined = ["--set", f"cache.dir={tmp_path / 'joined'}", "--executor", "ray"]
    env = ENV | {"RAY_ADDRESS": ray_address}
    assert "1 workers on a Ray cluster of 1 machines, each with {'num_cpus': 2}" in call(
        "stage1_teacher", *joined, env=env
    )
    assert sorted(p.name for p in (tmp_path / "joined" / "shards").glob("*.parquet")) == names[0]
    assert "2 workers on a Ray cluster of 1 machines" in call(
        "stage3_eval",
        *there,
        *on_cluster,
        code=EXIT_INCOMPLETE,  # no arm is trained: the baselines alone
    )
    call("stage3_eval", code=EXIT_INCOMPLETE)
    tables = [(tmp_path / d / "report" / "table.md").read_text() for d in ("run", "run-there")]
    kept = [[line for line in table.splitlines() if "no checkpoint yet" not in line] for table in tables]
    assert kept[0] == kept[1] and len(kept[0]) == len(tables[0].splitlines()) - 2  # the commands name the settings


def test_a_cluster_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(
        ray, "init", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("connection timeout"))
    )
    with pytest.raises(RunError, match=r"no connection to the Ray cluster at ray://nowhere:1: connection timeout; see"):
        cluster.connect("ray://nowhere:1")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_pipeline_on_a_cluster_made_for_it_ends_with_the_local_table(tmp_path):
    """Stages 1 and 3 make a cluster of their own each, and end it; stage 2 runs as ever."""
    recipe = toys.tiny_recipe(tmp_path)
    for name, extra in (("local", []), ("ray", ["--executor", "ray", "--set", "runtime.workers=2"])):
        settings = ["--set", f"cache.dir={tmp_path / name / 'cache'}", "--set", f"run_dir={tmp_path / name / 'run'}"]
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "run", "--recipe", str(recipe), *settings, *extra],
            cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("2 workers on a Ray cluster of 1 machines") == (2 if extra else 0)
    tables = [(tmp_path / name / "run" / "report" / "table.md").read_text() for name in ("local", "ray")]
    assert tables[0] == tables[1]


def test_what_is_left_of_a_dead_cluster_is_not_joined_and_a_named_one_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert cluster._cluster_here() is None
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert cluster._cluster_here() == address
    assert cluster._cluster_here() is None
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RunError, match=f"no connection to the Ray cluster at {address}: nobody answers there"):
        cluster.connect("ray")
