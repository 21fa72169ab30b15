"""A recipe with drawn ids through stages 1 and 2, as its user runs it: the same draws whatever the plan of the work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toys

from cache_schema.reader import CacheReader
from cache_schema.verify import verify
from pipeline.errors import RecipeError
from pipeline.recipe import load_recipe
from pipeline.run_dir import RunDir
from stage1_teacher.__main__ import main as stage1
from stage2_student.__main__ import main as stage2

ROOT = Path(__file__).parent.parent.parent
CACHE = {"selector": "sampled", "top_k": 12, "temperatures": [0.5, 1.0], "shard_examples": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sealed cache of drawn ids, 11 shards of 2 examples, and its recipe."""
    folder = tmp_path_factory.mktemp("sampled")
    train = {"steps": 60, "save_every": 60, "lr": 1e-2}
    arms = {"distill": {"logit_mse": 0.0, "ce": 0.0, "kl": 1.0, "temperature": 0.5}}
    toys.tiny_recipe(folder, cache=CACHE, train=train, arms=arms)
    assert stage1(["--recipe", str(folder / "recipe.yaml")]) == 0
    return folder


def drawn(cache):
    """example -> ids and draws of every position."""
    return {row.example_id: np.stack([row.token_ids, row.draws]) for row in CacheReader.open(cache).rows()}


def test_the_cache_is_sound_and_says_what_it_is(folder):
    report = verify(folder / "cache")
    assert report.good and report.complete and report.manifest.sampled
    for row in CacheReader.open(folder / "cache").rows():
        assert (row.draws.sum(axis=1) == 12).all() and row.log_tail is None


@pytest.mark.slow
def test_two_processes_draw_the_same_bytes(folder):
    cache = folder / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = ["-m", "stage1_teacher", "--recipe", str(folder / "recipe.yaml"), "--set", f"cache.dir={cache}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launcher, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [sorted(path.name for path in (c / "shards").glob("*.parquet")) for c in (cache, folder / "cache")]
    assert names[0] == names[1]


def test_other_shards_and_batches_change_no_draw_and_another_seed_does(folder):
    """Padding moves a logit by 1e-6 at most, and with it one draw in some thousands."""
    recipe, whole = str(folder / "recipe.yaml"), drawn(folder / "cache")

    def same(name, *overrides):
        settings = [part for o in (f"cache.dir={folder / name}", *overrides) for part in ("--set", o)]
        assert stage1(["--recipe", recipe, *settings]) == 0
        other = drawn(folder / name)
        assert other.keys() == whole.keys()
        return np.concatenate([(other[e] == whole[e]).all(axis=(0, 2)) for e in whole]).mean()

    assert same("plan", "cache.shard_examples=7", "runtime.batch_tokens=64") > 0.99
    assert same("seed", "cache.sample_seed=1") < 0.1


def test_a_student_learns_from_drawn_ids(folder):
    recipe = str(folder / "recipe.yaml")
    assert stage2(["--recipe", recipe, "--arm", "distill"]) == 0
    lines = RunDir.of(load_recipe(recipe)).arm("toy", "distill").metrics.read_text(encoding="utf-8").splitlines()
    kl = [json.loads(line)["kl"] for line in lines]
    assert len(kl) == 60 and np.mean(kl[-10:]) < 0.7 * np.mean(kl[:10])


def test_an_arm_that_needs_the_largest_logits_is_refused_before_anything_is_read(folder):
    with pytest.raises(RecipeError, match=r"arms\.distill: logit_mse needs the teacher's largest logits"):
        stage2(["--recipe", str(folder / "recipe.yaml"), "--set", "arms.distill={logit_mse: 1.0}"])
