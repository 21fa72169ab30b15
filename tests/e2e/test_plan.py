"""`python -m pipeline plan` as its user runs it: processes, tables, JSON, and what it says when it cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toys

ROOT = Path(__file__).parent.parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def plan(recipe, *extra):
    command = [sys.executable, "-m", "pipeline", "plan", "--recipe", str(recipe), *extra]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, check=False, timeout=180)


def test_dry_runs_no_model(tmp_path):
    """Not even a readable one: the weights are gone."""
    recipe = toys.tiny_recipe(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    ran = plan(recipe, "--dry")
    assert ran.returncode == 0, ran.stderr
    assert "| gsm8k |       22 |      22 |" in ran.stdout and "No model was run" in ran.stdout
    ran = plan(recipe)  # the control: without --dry they are missed
    assert ran.returncode == 2 and "cannot be loaded as a causal model" in ran.stderr
    assert (
        "no plan: stage1_teacher could not be measured (exit code 2); without any model: python -m pipeline plan"
        in (ran.stderr)
    )
    ran = plan(recipe, "--dry", "--set", f"data.dir={tmp_path / 'nowhere'}")
    assert ran.returncode == 2 and "(exit code 2)\n" in ran.stderr  # what would not help is not advised
    ran = plan(recipe, "--months", "x")
    assert ran.returncode == 2 and "--months: expected 0 or more, found x" in ran.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "model", "recipe.yaml"]


@pytest.mark.slow
def test_the_whole_plan(tmp_path):
    recipe = toys.tiny_recipe(tmp_path, train={"repeats": 2})
    ran = plan(recipe, "--examples", "10", "--json", "--price-gpu-hour", "3", "--months", "2")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])["plan"]
    assert (found["every"]["examples"], found["every"]["n"], found["runs"], found["teacher_runs"]) == (22, 10, 4, 2)
    assert found["bytes"] == pytest.approx(sum(found["column_bytes"].values()))
    hours, money = found["hours"], found["money"]
    assert money["cached_run"] == pytest.approx(3 * hours["cached_run"])
    assert hours["online_run"] - hours["cached_run"] == pytest.approx(4 * 4 * found["teacher_s_per_example"] / 3600)
    assert found["k"] in (16, 32, 64, 128, 256)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "model", "recipe.yaml"]
