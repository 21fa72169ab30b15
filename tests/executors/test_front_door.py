"""`--executor` and exit codes at the front door. The stages' interpreters are scripts here, which say how they were
called and end as a stage would."""

import pytest
import toys

from pipeline.__main__ import main
from pipeline.cli import EXIT_INCOMPLETE
from pipeline.errors import RecipeError, RunError
from pipeline.recipe import load_recipe

STAGES = ("stage1_teacher", "stage2_student", "stage3_eval")


@pytest.fixture
def called(tmp_path):
    """A function: run the pipeline with stages that end with these codes; its own code, and how each was called."""

    def run(codes, *arguments):
        log = tmp_path / "called"
        log.write_text("")
        runtime = {"python": {}}
        for stage, code in zip(STAGES, codes, strict=True):
            script = tmp_path / f"{stage}.sh"
            script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit {code}\n')
            script.chmod(0o755)
            runtime["python"][stage] = str(script)
        recipe = toys.tiny_recipe(tmp_path, runtime=runtime)
        return main(["run", "--recipe", str(recipe), *arguments]), log.read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("codes", "expected", "started"),
    [
        ((0, 0, 0), 0, 3),
        ((2, 0, 0), 2, 1),
        ((3, 0, 0), EXIT_INCOMPLETE, 1),  # no student is trained from half a cache
        ((0, 2, 0), 2, 2),
        ((0, 3, 0), EXIT_INCOMPLETE, 3),  # arms that are trained are scored
        ((0, 3, 2), 2, 3),
        ((0, 0, 3), EXIT_INCOMPLETE, 3),
    ],
)
def test_exit_codes_pass_on(called, codes, expected, started):
    code, calls = called(codes)
    assert code == expected and [call.split()[1] for call in calls] == list(STAGES[:started])


def test_the_executor_goes_to_every_stage_as_a_setting(called):
    code, calls = called((0, 0, 0), "--executor", "ray://head:10001", "--set", "runtime.workers=4")
    assert code == 0
    assert {call.partition("recipe.yaml ")[2] for call in calls} == {
        "--set runtime.executor=ray://head:10001 --set runtime.workers=4"
    }


@pytest.mark.parametrize("executor", ["local", "ray", "ray://10.0.0.1:10001", "ray://head.example.org:1"])
def test_executors(executor):
    assert load_recipe("pocket", [f"runtime.executor={executor}"]).runtime.executor == executor


@pytest.mark.parametrize("executor", ["rai", "rays", "ray://head", "ray://:1", "slurm", "ray://a b:1"])
def test_other_executors_are_refused(executor):
    with pytest.raises(RecipeError, match=r"runtime.executor: expected local, ray or ray://HOST:PORT, found"):
        load_recipe("pocket", [f"runtime.executor={executor}"])


@pytest.mark.parametrize(
    ("name", "what"),
    [(".", "Permission denied"), ("nowhere", "No such file"), ("text", "Permission denied"), ("junk", "Exec format")],
)
def test_what_is_no_interpreter_is_said(tmp_path, name, what):
    (tmp_path / "text").write_text("")
    (tmp_path / "junk").write_bytes(b"\x00" * 64)
    (tmp_path / "junk").chmod(0o755)
    recipe = toys.tiny_recipe(tmp_path, runtime={"python": {"stage1_teacher": str(tmp_path / name)}})
    with pytest.raises(RunError, match=f"runtime.python.stage1_teacher: expected a Python interpreter, .*: {what}"):
        main(["run", "--recipe", str(recipe)])
