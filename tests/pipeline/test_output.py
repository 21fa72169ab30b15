"""--quiet and --json on every command line, and what real commands say then."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import toys

ROOT = Path(__file__).parent.parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
MODULES = ("cache_schema", "pipeline", "pipeline.pocket", "stage1_teacher", "stage2_student", "stage3_eval")


def leaves(parser):
    below = [action for action in parser._actions if action.nargs == "A..."]
    return [leaf for action in below for sub in action.choices.values() for leaf in leaves(sub)] if below else [parser]


def said(*command: str, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command that ends with this code."""
    command = (sys.executable, "-m", *command)
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def objects(stdout: str) -> list[dict[str, object]]:
    """Every line is one, and the last of each command is its result."""
    return [json.loads(line) for line in stdout.splitlines()]


PARSERS = [(m, leaf) for m in MODULES for leaf in leaves(import_module(f"{m}.__main__").parser())]


@pytest.mark.parametrize("leaf", [leaf for _, leaf in PARSERS], ids=[leaf.prog for _, leaf in PARSERS])
def test_every_command_takes_both(leaf):
    options = {flag for action in leaf._actions for flag in action.option_strings}
    assert {"--quiet", "--json"} <= options


def test_the_two_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        import_module("pipeline.__main__").parser().parse_args(["status", "--quiet", "--json"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_command_that_prints_only_its_result_prints_it_all_when_quiet():
    plain, quiet = (said("pipeline", "show", "--field", "train.lr", *mode)[0] for mode in ((), ("--quiet",)))
    assert plain == quiet != ""


def test_a_machine_gets_values_and_a_mistake_as_its_result(tmp_path):
    recipe = str(toys.tiny_recipe(tmp_path))
    (found,) = objects(said("pipeline", "status", "--recipe", recipe, "--json")[0])
    assert found["command"] == "pipeline status" and found["exit_code"] == 0
    assert found["arms"]["toy/distill"] == {"step": 0, "steps": 4, "other_settings": []}
    assert found["cache"]["sealed"] is False and found["report"] is None
    out, err = said("pipeline", "status", "--recipe", "nope", "--json", code=2)
    (found,) = objects(out)
    assert found["exit_code"] == 2 and found["error"].startswith("unknown recipe 'nope'")
    assert err == f"error: {found['error']}\n", "and people read it where they always do"


@pytest.mark.slow
def test_a_whole_run_as_a_machine_reads_it_and_as_a_script_does(tmp_path):
    """Three processes and their parent write to one stdout: nothing but whole objects, each command's result its last.
    Then everything again, which is there already, and a cache that is looked into."""
    recipe = str(toys.tiny_recipe(tmp_path))
    run = ("pipeline", "run", "--recipe", recipe)
    found = objects(said(*run, "--json")[0])
    results = [event for event in found if event["event"] == "result"]
    assert [r["command"] for r in results] == ["stage1_teacher", "stage2_student", "stage3_eval", "pipeline run"]
    assert all(r["exit_code"] == 0 for r in results) and found[-1] is results[-1]
    first, second, third, last = results
    assert first["sealed"] and first["examples"] == {"input": 22, "written": 22, "quarantined": {}}
    assert {name: arm["step"] for name, arm in second["arms"].items()} == {"toy/sft": 4, "toy/distill": 4}
    assert third["missing"] == [] and all(Path(file).is_file() for file in third["files"])
    assert last["run_dir"] == str(tmp_path / "run") and last["incomplete"] is False
    steps = [e for e in found if e["event"] == "progress" and e["stage"] == "toy/distill"]
    assert (steps[0]["done"], steps[-1]["done"], steps[-1]["total"]) == (0, 4, 4) and steps[-1]["eta_s"] == 0
    assert {"stage 1", "stage 3, toy", "scores and their errors"} <= {e.get("stage") for e in found}

    out, err = said(*run, "--quiet")
    assert err == "" and "===" not in out and "teacher is not loaded" in out and "all three stages took" in out
    assert "%" not in out.partition("toy")[0], "no progress"

    cache = first["cache"]
    *_, verified = objects(said("cache_schema", "verify", cache, "--json")[0])
    assert verified["good"] and verified["complete"] and verified["positions"] == first["positions"]
    assert said("cache_schema", "verify", cache, "--quiet") == ("good\n", "")
    record = next(Path(cache).glob("shards/*.parquet"))
    record.write_bytes(record.read_bytes()[:-1] + b"?")
    *_, verified = objects(said("cache_schema", "verify", cache, "--json", code=1)[0])
    assert not verified["good"] and record.name in verified["problems"][0]
    bad, verdict = said("cache_schema", "verify", cache, "--quiet", code=1)[0].splitlines()
    assert bad.startswith("BAD") and verdict.startswith("not good: 1 problem")
