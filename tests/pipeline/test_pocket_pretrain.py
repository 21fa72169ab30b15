"""The pre-training script on all three courses: reproducible, resumable, and saving what it trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from pipeline.pocket.__main__ import COURSES, main
from pipeline.pocket.documents import Document
from pipeline.pocket.pretrain import Settings, collate, going_on, schedule
from pipeline.pocket.t5 import SETTINGS


def run(name: str, out: Path, *more: str) -> Path:
    """A run of a few steps; its folder."""
    assert main(["--model", name, "--out", str(out), "--items", "2", *more]) == 0
    return out


@pytest.mark.parametrize("name", sorted(COURSES))
def test_a_run_says_what_it_was_and_saves_what_loads(tmp_path: Path, name: str) -> None:
    folder = run(name, tmp_path / "a", "--steps", "2")
    record = json.loads((folder / "provenance.json").read_text())
    assert (record["model"], record["steps"], record["settings"]["seed"]) == (name, 2, 0)
    assert record["tokens"] > 1000
    assert all(row["n"] == 2 for row in record["validation"])
    assert AutoTokenizer.from_pretrained(folder).eos_token_id is not None


def test_the_seed_makes_the_weights(tmp_path: Path) -> None:
    seeds = {"a": "5", "same": "5", "other": "6"}
    folders = [run("gpt2", tmp_path / out, "--steps", "2", "--seed", seed) for out, seed in seeds.items()]
    one, same, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_the_t5_goes_on_where_it_ended_with_a_head_of_its_own(tmp_path: Path) -> None:
    first = run("t5", tmp_path / "a", "--steps", "2")
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(first)
    assert not torch.equal(model.shared.weight, model.lm_head.weight)
    assert not model.config.scale_decoder_outputs  # as in T5 1.1: scaling goes with tied heads
    one, more = (
        load_file(f / "model.safetensors")
        for f in (first, run("t5", tmp_path / "b", "--start", str(first), "--steps", "1"))
    )
    # Adam's first step moves a weight by about the learning rate, which begins at a hundredth of its peak
    moved = max((more[key] - one[key]).abs().max().item() for key in one)
    assert moved == pytest.approx(going_on(SETTINGS).lr / SETTINGS.warmup_steps, rel=0.3)


def test_what_weighs_what() -> None:
    batch = collate([Document([5, 6, 7], [False, False, True]), Document([8, 9], [False, True])], 0, 0.1)
    assert batch.inputs["input_ids"].tolist() == [[5, 6], [8, 9]]
    assert batch.target_BL.tolist() == [[6, 7], [9, 0]]
    assert batch.weight_BL.tolist() == [[pytest.approx(0.1), 1.0], [1.0, 0.0]]
    assert batch.is_answer_BL.tolist() == [[False, True], [True, False]]
    assert batch.tokens == 5


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    settings = replace(Settings(), lr=2.0, warmup_steps=10, decay_share=0.5)
    assert [schedule(*at, settings) for at in ((0.0, 0), (0.3, 9), (0.5, 50), (0.75, 75), (1.0, 100))] == pytest.approx(
        [0.2, 2.0, 2.0, 1.0, 0.0]
    )
