"""An export, killed or refused at every system call by which it changes the disk, one run each: all of it or nothing.

The oracle is the folder that nobody disturbed, byte for byte; what is left beside it has a temporary name.
"""

from __future__ import annotations

import contextlib
import io

import crashes
import promised
import pytest
import toys
from forks import ForkServer
from syscalls import inject, needs_strace, trace

from pipeline.recipe import load_recipe
from stage2_student.__main__ import main as train

EXPORTER = """
import sys
import peft, safetensors.torch, torch, transformers, huggingface_hub, yaml, zstandard
from transformers.models.qwen3 import modeling_qwen3
from pathlib import Path
import pipeline.__main__, pipeline.cache_card, pipeline.handover
import stage2_student.arms, stage2_student.export, stage2_student.model_card
from pipeline.cli import guarded

def in_place():  # the control: no temporary name
    from contextlib import contextmanager
    @contextmanager
    def whole_folder(to):
        to.mkdir(parents=True)
        yield to
    return whole_folder

def run(what, how, *arguments):
    if how == "in place":
        pipeline.handover.whole_folder = pipeline.cache_card.whole_folder = in_place()
    sys.argv = ["export", *arguments]
    if what != "cache":
        return guarded(stage2_student.export.main)
    sys.argv[1:1] = ["export"]
    return guarded(pipeline.__main__.main)
"""
pytestmark = crashes.LONG


@pytest.fixture(scope="module")
def exporter(tmp_path_factory):
    needs_strace()
    with ForkServer(EXPORTER, tmp_path_factory.mktemp("exporter")) as server:
        yield server


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = toys.tiny_recipe(tmp_path_factory.mktemp("recipe"), train={"steps": 1, "save_every": 1}, arms={"sft": None})
    toys.fill_cache(load_recipe(str(path)))
    with contextlib.redirect_stdout(io.StringIO()):
        assert train(["--recipe", str(path)]) == 0
    return path


def arguments(what, recipe, folder, how=""):
    more = {"adapter": ["--base", "owner/base"], "merged": ["--merge"], "cache": ["--cache"]}[what]
    return [what, how, "--recipe", str(recipe), *more, "--to", str(folder / "to")]


def contents(to):
    """What is there, the name of the folder itself taken out of the card."""
    found = {str(p.relative_to(to)): p.read_bytes() for p in sorted(to.rglob("*")) if p.is_file()}
    return {name: data.replace(str(to).encode(), b"TO") for name, data in found.items()}


def whole_or_nothing(folder, expected):
    """Whether it is there; then it must be all of it."""
    to = folder / "to"
    assert {path.name for path in folder.glob("*") if not path.name.startswith(".tmp-to-")} <= {"to"}
    if not to.exists():
        return False
    assert contents(to) == expected
    return True


@pytest.mark.promise(promised.CRASH)
@pytest.mark.parametrize("what", ["adapter", "merged", "cache"])
def test_killed_or_refused_at_every_call(exporter, recipe, tmp_path, tried, what):
    clean = tmp_path / "clean"
    points = trace(exporter, arguments(what, recipe, clean), clean)
    assert {"openat", "write", "fsync", "rename", "mkdir"} <= {point.call for point in points}
    expected, there = contents(clean / "to"), []
    assert "README.md" in expected
    for i, point in enumerate(points):
        killed = tmp_path / f"killed-{i}"
        assert inject(exporter, arguments(what, recipe, killed), killed, point, "signal=SIGKILL").code == -9, point
        there.append(whole_or_nothing(killed, expected))
        if there[-1] is False:
            assert exporter.run(*arguments(what, recipe, killed)).code == 0  # the next one is not in its way
            assert whole_or_nothing(killed, expected)
        refused = tmp_path / f"refused-{i}"
        outcome = inject(exporter, arguments(what, recipe, refused), refused, point, "error=ENOSPC")
        assert "Traceback" not in outcome.output and outcome.code == (2 if "error: " in outcome.output else 0), outcome
        assert whole_or_nothing(refused, expected) or outcome.code == 2, point
    assert there == sorted(there) and not there[0]
    tried(len(there), f"system calls of an export ({what}), killed and refused at each")


def test_control_a_folder_written_in_place_is_caught(exporter, recipe, tmp_path):
    clean = tmp_path / "clean"
    points = trace(exporter, arguments("cache", recipe, clean, "in place"), clean)
    half = next(point for point in points if point.call == "write")
    folder = tmp_path / "folder"
    assert inject(exporter, arguments("cache", recipe, folder, "in place"), folder, half, "signal=SIGKILL").code == -9
    with pytest.raises(AssertionError):
        whole_or_nothing(folder, contents(clean / "to"))
