"""The probe of stage 1: what it says of a sample is what stage 1 then does."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys

from cache_schema.reader import CacheReader
from pipeline.errors import DataError, RecipeError
from pipeline.fingerprint import Experiment
from pipeline.planning import cache_bytes, counts, summed
from pipeline.recipe import load_recipe
from stage1_teacher.__main__ import main
from stage1_teacher.probe import drawn, masses


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """(folder, findings) of a probe of all 22 examples; the recipe's cache would have one shard of them."""
    folder = tmp_path_factory.mktemp("probe")
    recipe = toys.tiny_recipe(folder, cache={"shard_examples": 22})
    assert main(["--recipe", str(recipe), "--probe", "22", "--probe-out", str(folder / "out")]) == 0
    return folder, json.loads((folder / "out" / "teacher.json").read_text(encoding="utf-8"))


def test_a_probe_of_all_is_what_stage_1_writes(probed):
    """Positions and bytes are those of the real cache, to the byte; neither it nor the run folder was touched."""
    folder, found = probed
    assert not (folder / "cache").exists() and not (folder / "run").exists()
    assert main(["--recipe", str(folder / "recipe.yaml")]) == 0
    reader = CacheReader.open(folder / "cache")
    every = summed(counts(found))
    assert every.positions.value == sum(record.positions for record in reader.records) == 604
    assert every.positions.error == 0
    assert sum(cache_bytes(found, every).values()) == reader.totals().bytes
    theirs = CacheReader.open(folder / "out" / "cache")
    for mine, other in zip(theirs.read(range(22)), reader.read(range(22)), strict=True):
        np.testing.assert_array_equal(mine.logits, other.logits)
    assert theirs.manifest.fingerprint != reader.manifest.fingerprint  # nobody takes it for the recipe's


def test_a_dry_probe_counts_the_same_tokens(probed, tmp_path):
    folder, found = probed
    out = tmp_path / "dry"
    arguments = ["--recipe", str(folder / "recipe.yaml"), "--probe", "22", "--probe-out", str(out), "--probe-dry"]
    assert main(arguments) == 0
    dry = json.loads((out / "teacher.json").read_text(encoding="utf-8"))
    assert dry["sample"] == found["sample"] and "capture_s" not in dry and not (out / "cache").exists()
    of = dry["sample"]["gsm8k"]
    assert all(whole > own > positions for positions, whole, own in zip(*of.values(), strict=True))
    assert len({whole - own for whole, own in zip(of["whole"], of["own"], strict=True)}) == 1  # the shared context


def test_masses_against_float64_and_where_one_minus_the_sum_fails():
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(40, 500, generator=generator) * 6
    logits_NV[0, 7] = 60.0  # a tail of 1e-15 or so
    got = masses(logits_NV, [16, 100, 499, 500], 1.3)
    p = np.sort(torch.softmax(logits_NV.double() / 1.3, 1).numpy(), axis=1)  # smallest first
    for column, k in enumerate([16, 100, 499, 500]):
        np.testing.assert_allclose(got[:, column], p[:, : 500 - k].sum(1), rtol=1e-9)
    in_float32 = torch.softmax(logits_NV / 1.3, 1).sort(1, descending=True).values[:, :16].sum(1)
    assert abs(1 - float(in_float32[0]) - got[0, 0]) > 0.1 * got[0, 0]  # the control


def test_masses_by_place_are_of_those_rows(probed):
    _, found = probed
    places = found["beyond"]["tasks"]["gsm8k"]
    assert places["1st"]["n"] == 22 and places["2nd-8th"]["n"] == 22 * 7
    assert sum(of["n"] for place, of in places.items() if place != "all") == places["all"]["n"]
    assert all(np.diff(of["p90"]).max() <= 0 for of in places.values())
    assert found["beyond"]["ranks"] == [16, 32, 64, 128, 256]


def test_a_sample_has_every_task_in_its_share(tmp_path):
    examples = Experiment(load_recipe(str(toys.tiny_recipe(tmp_path, teacher={"shots": 20})))).training_set.cached
    assert len(examples) == 4
    mixed = [*examples, *(replace(e, task="other") for e in examples for _ in range(9))]
    sample = drawn(mixed, 20)
    assert len(sample) == 20 and sum(e.task == "gsm8k" for e in sample) == 2  # of 4 and 36
    assert drawn(mixed, 20) == sample and len(drawn(mixed, 10**6)) == len(mixed)


def test_mistakes(tmp_path):
    recipe = toys.tiny_recipe(tmp_path)
    with pytest.raises(RecipeError, match="--probe-out <folder> is missing"):
        main(["--recipe", str(recipe), "--probe", "4"])
    with pytest.raises(SystemExit):
        main(["--recipe", str(recipe), "--probe", "0", "--probe-out", str(tmp_path)])
    toys.tiny_qwen3(tmp_path / "model", max_position_embeddings=4)
    with pytest.raises(DataError, match=r"none of the 4 examples drawn can be used \(prompt_exceeds_window"):
        main(["--recipe", str(recipe), "--probe", "4", "--probe-out", str(tmp_path / "out"), "--probe-dry"])
