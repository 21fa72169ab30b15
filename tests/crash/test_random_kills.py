"""Stages 1 and 2 killed at random moments of their work, again and again until they get to the end.

The oracle is a run that nobody disturbed. A kill counts if the process had changed something by then: those that fall
into the loading of a model prove nothing.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import crashes
import promised
import pytest
import toys
from crashes import cache_content, cache_sound, run_content
from forks import HANG_S, ForkServer

KILLS = [pytest.param(2, id="2 kills"), pytest.param(60, id="60 kills", marks=crashes.LONG)]


@pytest.fixture(scope="module")
def clean(stages, tmp_path_factory):
    """A recipe, its cache of 22 shards and its student of 24 steps and 12 checkpoints, with dropout."""
    folder = tmp_path_factory.mktemp("clean")
    recipe = toys.tiny_recipe(
        folder,
        cache={"shard_examples": 1},
        students={"toy": {"lora": {"dropout": 0.1}}},
        train={"steps": 24, "save_every": 2},
        arms={"sft": None},
    )
    for stage in ("stage1_teacher", "stage2_student"):
        outcome = stages.run(stage, "--recipe", recipe)
        assert outcome.code == 0, outcome.output
    return folder


def killed_until_done(
    stages: ForkServer,
    command: list[str],
    state: Callable[[], object],
    draw: random.Random,
    within_s: float,
    most: int,
) -> int:
    """Start it, wait until `state` differs, wait up to `within_s` more, kill it; and again, `most` times.

    Returns how many kills fell into its work.
    """
    kills = 0
    while kills < most:
        before, child = state(), stages.start(*command)
        child.release()
        deadline = time.monotonic() + HANG_S
        while state() == before and child.state() != "Z" and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, within_s))
        child.signal(signal.SIGKILL)
        code = child.wait()
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, child.output()
        kills += state() != before
    outcome = stages.run(*command)
    assert outcome.code == 0, outcome.output
    return kills


@pytest.mark.promise(promised.EQUAL)
@pytest.mark.parametrize("wanted", KILLS)
def test_stage_1_killed_at_random_moments(stages, clean, tmp_path, tried, wanted):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, kills, caches = random.Random(seed), 0, 0
    while kills < wanted:
        cache = tmp_path / str(caches)
        command = ["stage1_teacher", "--recipe", str(clean / "recipe.yaml"), "--set", f"cache.dir={cache}"]
        kills += killed_until_done(stages, command, lambda at=cache: names(at), draw, 0.15, min(wanted, 15))
        caches += 1
        assert cache_sound(cache) == 22
        assert cache_content(cache) == cache_content(clean / "cache"), f"seed {seed}"
    tried(kills, f"kills of stage 1 at random moments of its work, in {caches} caches each killed until done")


def names(cache: Path) -> list[str]:
    """Of what is there, but for temporary files."""
    return sorted(str(path) for path in cache.rglob("*") if not path.name.startswith(".tmp"))


@pytest.mark.promise(promised.EQUAL)
@pytest.mark.parametrize("wanted", KILLS)
def test_stage_2_killed_at_random_moments(stages, clean, tmp_path, tried, wanted):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, kills, runs = random.Random(seed), 0, 0
    expected = run_content(clean / "run")
    assert sum("adapter_model" in name for name in expected) == 12
    while kills < wanted:
        run = tmp_path / str(runs)
        command = ["stage2_student", "--recipe", str(clean / "recipe.yaml"), "--set", f"run_dir={run}"]
        metrics = run / "students" / "toy" / "distill" / "metrics.jsonl"
        kills += killed_until_done(stages, command, lambda at=metrics: lines(at), draw, 0.4, min(wanted, 15))
        runs += 1
        assert run_content(run) == expected, f"seed {seed}"
    tried(kills, f"kills of stage 2 at random moments of its work, in {runs} runs each killed until done")


def lines(metrics: Path) -> list[str]:
    """Those that are whole."""
    return metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []


def test_control_another_dropout_is_another_student(stages, clean, tmp_path):
    """What is compared does tell one run from another."""
    run = tmp_path / "run"
    command = ["stage2_student", "--recipe", str(clean / "recipe.yaml"), "--set", f"run_dir={run}"]
    assert stages.run(*command, "--set", "students.toy.lora.dropout=0.2").code == 0
    assert run_content(run) != run_content(clean / "run")
