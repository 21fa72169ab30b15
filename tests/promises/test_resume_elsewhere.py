"""A run stopped and gone on with on another number of processes: the global batches are those of one never stopped."""

import shutil
from pathlib import Path
from typing import Any

import promised
import pytest
import together
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.errors import RunError
from pipeline.recipe import load_recipe
from pipeline.run_dir import ArmDir, RunDir
from pipeline.sections import Train
from stage2_student import train
from stage2_student.__main__ import main
from stage2_student.checkpoint import ADAPTER
from stage2_student.train import loader
from stage2_student.usable import Usable


class Rows:
    """In a collator's place: says which rows it was asked for."""

    def read(self, indices: list[int], micro_batch_size: int) -> list[int]:
        return list(indices)


def global_batch(usable: Usable, settings: Train, step: int, processes: int) -> list[int]:
    """What all processes together load of a step, by the trainer's own `loader`, in the order of their ranks."""
    rows: Any = Rows()
    loads = (loader(rows, usable, settings, settings.seed, rank, processes) for rank in range(processes))
    return [row for load in loads for row in load(step)]  # type: ignore[misc]


def count_resumes(examples: int, batch_at_a_time: Any = global_batch) -> int:
    """Steps compared over what Hypothesis draws: examples, batch, W1, stop, W2, W3, ... ."""
    compared = 0

    @settings(max_examples=examples, deadline=None, derandomize=examples < 1000)
    @given(
        dropped=st.sets(st.integers(0, 99), max_size=60),
        batch_size=st.integers(1, 40),
        seed=st.integers(0, 9),
        legs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=2, max_size=4),
    )
    def same_batches(dropped: set[int], batch_size: int, seed: int, legs: list[tuple[int, int]]) -> None:
        nonlocal compared
        usable = Usable([row for row in range(100) if row not in dropped], len(dropped), 0, 9)
        trained = Train(batch_size=batch_size, micro_batch_size=3, seed=seed)
        step, seen = 0, []
        for processes, steps in legs:  # stopped and gone on with, as often as there are legs
            for _ in range(steps):
                found = batch_at_a_time(usable, trained, step, processes)
                assert found == global_batch(usable, trained, step, 1)  # unsorted
                seen += found
                step += 1
                compared += 1
        epochs = len(seen) // len(usable.rows)
        for epoch in range(epochs):  # and nothing is seen twice before all has been seen
            once = seen[epoch * len(usable.rows) : (epoch + 1) * len(usable.rows)]
            assert sorted(once) == usable.rows

    same_batches()
    return compared


@pytest.mark.promise(promised.SAME_BATCHES)
@pytest.mark.parametrize("examples", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_any_number_of_processes_loads_the_same_batches(examples: int, tried: Any) -> None:
    tried(count_resumes(examples), f"global batches over {examples} draws of (W1, stop, W2, ...)")


def test_the_control_an_order_that_depends_on_their_number() -> None:
    """What most trainers do, a share of the data for each process, gives other batches once their number changes."""

    def shares(usable: Usable, trained: Train, step: int, processes: int) -> list[int]:
        each = -(-trained.batch_size // processes)
        parts = [usable.rows[rank::processes] for rank in range(processes)]
        return [row for part in parts for row in (part * 99)[step * each : (step + 1) * each]]

    with pytest.raises(AssertionError):
        count_resumes(20, shares)


def same_run(found: ArmDir, expected: ArmDir, step: int) -> None:
    """Positions and tokens of every step, and within rounding losses and adapter."""
    ours, theirs = together.metrics(found), together.metrics(expected)
    assert [m["step"] for m in ours] == [m["step"] for m in theirs] == list(range(1, step + 1))
    for one, other in zip(ours, theirs, strict=True):
        assert (one["positions"], one["tokens"]) == (other["positions"], other["tokens"])
        for name in ("loss", "ce", "logit_mse", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), (name, one["step"])
    adapter, oracle = (load_file(f.checkpoint(step) / ADAPTER) for f in (found, expected))
    for name, tensor in oracle.items():
        assert (adapter[name] - tensor).abs().max() < 2e-5, name


def trained_here(monkeypatch: pytest.MonkeyPatch, arguments: list[str], stop: int) -> dict[int, list[str]]:
    """Train in this process; step -> the ids of its global batch. Step `stop` is not taken."""
    seen: dict[int, list[str]] = {}
    take_step = train.take_step

    def watched(*given: Any) -> Any:
        *_, step, batches, _ = given
        seen[step] = [i for batch in batches for i in batch.example_ids]
        if step == stop:
            raise RunError("stopped here")
        return take_step(*given)

    with monkeypatch.context() as patched:
        patched.setattr(train, "take_step", watched)
        if stop < load_recipe(arguments[1]).train.steps:
            with pytest.raises(RunError, match="stopped here"):
                main(arguments)
        else:
            assert main(arguments) == 0
    return seen


@pytest.mark.promise(promised.SAME_BATCHES)
@pytest.mark.parametrize(
    "legs",
    [((2, 4), (1, 7)), pytest.param(((2, 3), (1, 5), (3, 8), (2, 9)), marks=pytest.mark.slow)],
    ids=["2 then 1", "2, 1, 3 and 2"],
)
def test_a_real_run_on_other_numbers_of_processes(
    legs: tuple[tuple[int, int], ...], tmp_path: Path, tried: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each leg ends in the middle of a step, several processes by a kill of one; the next goes on from the last
    checkpoint with another number. Ids, positions and losses of every step, those that were taken twice too, are those
    of a run that one process made in one go."""
    steps = legs[-1][1]
    path = str(
        toys.tiny_recipe(
            tmp_path,
            train={"steps": steps, "save_every": 2, "batch_size": 5, "micro_batch_size": 2},
            arms={"sft": None},
        )
    )
    recipe, alone = load_recipe(path), f"run_dir={tmp_path / 'alone'}"
    toys.fill_cache(recipe)
    oracle = trained_here(monkeypatch, ["--recipe", path, "--set", alone], steps)
    assert list(oracle) == list(range(steps)) and {len(batch) for batch in oracle.values()} == {5}
    taken = []
    for processes, stop in legs:
        if processes == 1:
            ids = trained_here(monkeypatch, ["--recipe", path], stop)
        else:
            watch = tmp_path / f"watch-{stop}"
            faults = [["distill", processes - 1, stop, "backward", "kill"]]
            done = together.ran(together.torchrun(processes, "--recipe", path), together.environment(watch, faults))
            assert (done.returncode == 0) == (stop == steps), done.stderr
            ids = together.batches(watch, "distill")
        assert ids == {step: oracle[step] for step in ids}
        taken += list(ids)
    assert set(taken) == set(range(steps)) and len(taken) > steps
    found, expected = (RunDir.of(r).arm("toy", "distill") for r in (recipe, load_recipe(path, [alone])))
    same_run(found, expected, steps)
    shutil.rmtree(tmp_path / "alone")  # the control: another seed draws other batches
    assert main(["--recipe", path, "--set", alone, "--set", "train.seed=1"]) == 0
    with pytest.raises(AssertionError):
        same_run(found, expected, steps)
    tried(len(taken), f"steps of a real run on {' then '.join(str(p) for p, _ in legs)} processes")
