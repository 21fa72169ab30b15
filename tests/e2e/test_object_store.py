"""A cache in a bucket, from stage 1 to stage 2, as its user runs it. The oracle is the same run on a disk."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import promised
import pytest
import s3
import toys

from cache_schema.__main__ import main as cache_main
from pipeline.__main__ import main as pipeline_main
from pipeline.errors import RunError
from pipeline.recipe import load_recipe
from pipeline.run_dir import RunDir
from stage1_teacher.__main__ import main as stage1
from stage2_student.__main__ import main as stage2

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # boto's and moto's


@pytest.fixture(scope="module")
def bucket():
    """An S3 server with an empty bucket, and the environment that leads to it."""
    with s3.Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in s3.ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bank")
        yield client


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Both stages on a disk."""
    folder = tmp_path_factory.mktemp("local")
    recipe = toys.tiny_recipe(folder, cache={"shard_examples": 2}, arms={"sft": None})
    assert stage1(["--recipe", str(recipe)]) == 0
    assert stage2(["--recipe", str(recipe)]) == 0
    return folder


def hashes(client, prefix: str) -> dict[str, str]:
    listed = client.list_objects_v2(Bucket="bank", Prefix=prefix).get("Contents", [])
    return {
        item["Key"].removeprefix(prefix): hashlib.sha256(
            client.get_object(Bucket="bank", Key=item["Key"])["Body"].read()
        ).hexdigest()
        for item in listed
        if item["Key"].endswith(".parquet")
    }


def adapters(run_dir: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run_dir.rglob("adapter_model.safetensors"))
    }


@pytest.mark.slow
@pytest.mark.promise(promised.EQUAL)
def test_stage1_killed_while_it_writes_to_a_bucket(local, bucket, tried):
    """SIGKILL once some shards are committed; the second run makes the rest, and the objects are the disk's files."""
    command = [sys.executable, "-m", "stage1_teacher", "--recipe", str(local / "recipe.yaml")]
    cache = ["--set", "cache.dir=s3://bank/killed"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*command, *cache], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while bucket.list_objects_v2(Bucket="bank", Prefix="killed/shards/")["KeyCount"] < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "Contents" not in bucket.list_objects_v2(Bucket="bank", Prefix="killed/sealed.json")
    assert stage1(["--recipe", str(local / "recipe.yaml"), *cache]) == 0
    files = {
        f"shards/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in local.glob("cache/shards/*.parquet")
    }
    assert hashes(bucket, "killed/") == files
    assert cache_main(["verify", "s3://bank/killed"]) == 0
    tried(1, "kills of stage 1 over S3")


def test_a_student_of_a_cache_in_a_bucket(local, bucket, tmp_path, capsys):
    """Its adapters are those of the cache on disk; copies stay below their bound; the commands name the URL."""
    arguments = ["--recipe", str(local / "recipe.yaml")]
    there = ["--set", "cache.dir=s3://bank/plain", "--set", f"runtime.copies={tmp_path / 'copies'}"]
    settings = [*there, "--set", "runtime.copies_gb=0.00002", "--set", f"run_dir={tmp_path / 'run'}"]
    assert stage1([*arguments, *settings]) == 0
    assert stage2([*arguments, *settings]) == 0
    mine = RunDir.of(load_recipe(arguments[1], settings[1::2])).root
    assert adapters(mine) == adapters(local / "run") != {}
    kept = [path.stat().st_size for path in (tmp_path / "copies").iterdir()]
    assert kept and sum(kept) <= 20_000 < sum(path.stat().st_size for path in local.glob("cache/shards/*.parquet"))
    capsys.readouterr()
    assert pipeline_main(["status", *arguments, *settings]) == 0
    assert "cache    s3://bank/plain: sealed; examples 22 in" in capsys.readouterr().out
    assert pipeline_main(["show", *arguments, *settings, "--field", "cache.dir"]) == 0
    assert capsys.readouterr().out == "s3://bank/plain\n"


def test_a_store_without_conditional_writes_takes_one_process(local, monkeypatch, capsys):
    arguments = ["--recipe", str(local / "recipe.yaml"), "--set", "cache.dir=memory://alone/cache"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"no conditional writes(.|\n)*next: run one process"):
        stage1(arguments)
    monkeypatch.delenv("WORLD_SIZE")
    assert stage1(arguments) == 0
    assert "let no other process write to it" in capsys.readouterr().out
