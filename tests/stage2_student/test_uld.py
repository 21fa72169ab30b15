"""Students that share no tokenizer with their teacher: each is compared with the right row, counted, and trained."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer

from cache_schema.reader import CacheReader
from cache_schema.schema import CacheRow, Status
from pipeline.fingerprint import Experiment
from pipeline.models import load_tokenizer, locate
from pipeline.prompts import PromptBuilder
from pipeline.recipe import Recipe, load_recipe
from pipeline.run_dir import RunDir
from pipeline.sections import Arm, Lora
from pipeline.sections import Student as StudentRecipe
from stage2_student.__main__ import main
from stage2_student.batches import Collator
from stage2_student.student import Student
from stage2_student.train import flat_gradients

ULD = Arm(ce=1.0, uld=0.5, temperature=1.2)
FAMILIES: dict[str, Callable[..., Path]] = {
    "gpt2": toys.tiny_gpt2,
    "pythia": toys.tiny_gpt_neox,
    "smollm": toys.tiny_llama,
}
ADAPTED = {
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "pythia": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "smollm": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}
CPU = torch.device("cpu")


def made(tmp_path: Path, edit: Callable[[Any], Any] = lambda row: row, **overrides: Any) -> tuple[str, Recipe]:
    """A sealed cache of a small T5, and a recipe of three decoders whose tokenizer cuts the same text otherwise."""
    toys.tiny_tokenizer(tmp_path / "t5", vocab_size=290)
    toys.tiny_t5(tmp_path / "t5")
    for name, build in FAMILIES.items():
        toys.tiny_tokenizer(tmp_path / name)
        build(tmp_path / name)
    student = {"dtype": "float32", "lora": {"r": 4, "alpha": 8}}
    sections: dict[str, Any] = {
        "teacher": {"model": str(tmp_path / "t5"), "kind": "seq2seq", "shots": 0},
        "cache": {"temperatures": [1.0, 1.2], "store_ids": False},
        "students": {"toy": None} | {name: student | {"model": str(tmp_path / name)} for name in FAMILIES},
        "arms": {"distill": None, "uld": {"ce": 1.0, "uld": 0.5, "temperature": 1.2}},
        "eval": {"baselines": ["zero_shot"]},
    }
    for name, section in overrides.items():
        sections[name] = sections.get(name, {}) | section
    path = str(toys.tiny_recipe(tmp_path, **sections))
    toys.fill_cache(load_recipe(path), edit)
    return path, load_recipe(path)


def prompts_of(folder: Path) -> PromptBuilder:
    return PromptBuilder(load_tokenizer(locate(str(folder))))


def says_its_position(row: CacheRow) -> CacheRow:
    """The same distributions with their logits shifted (which changes no probability) so that row t begins with t."""
    shift_N = np.arange(len(row.status), dtype=np.float32) - row.top_logit
    shift_NT = shift_N[:, None] / np.array([1.0, 1.2], np.float32)
    assert row.log_tail is not None
    return replace(
        row,
        top_logit=row.top_logit + shift_N,
        logits=row.logits + shift_N[:, None],
        logsumexp=row.logsumexp + shift_NT,
        log_tail=row.log_tail + shift_NT,
    )


def test_each_position_has_the_row_that_has_read_the_same_text(tmp_path: Path) -> None:
    """The rows say which they are; which they should be is decided by decoding the tokens before them."""

    def edit(row: CacheRow) -> CacheRow:
        status = row.status.copy()
        status[[4, -1]] = Status.NOT_FINITE
        return replace(says_its_position(row), status=status)

    _, recipe = made(tmp_path, edit)
    reader, prompts = CacheReader.open(Path(str(recipe.cache.dir))), prompts_of(tmp_path / "gpt2")
    teacher = Experiment(recipe).teacher_prompts
    rows = reader.read([3, 0, 20])
    for mode in ("boundary", "index"):
        batch = Collator(reader, prompts, 320, ULD, mode).collate(rows)  # type: ignore[arg-type]
        assert batch.teacher is not None and batch.teacher.ids_NK is None
        counts = batch.counts()
        assert counts["uld"] == int(batch.teacher.usable_N.sum()) < counts["ce"] == len(batch.labels_N)
        first = 0
        for row in rows:
            ours, theirs = prompts.encode(row.prompt, row.answer).answer_ids, row.answer_ids.tolist()
            n = len(ours)
            assert ours != theirs
            found = batch.teacher.logits_NK[first : first + n, 0].tolist()
            usable = batch.teacher.usable_N[first : first + n].tolist()
            read = [prompts.tokenizer.decode(ours[:s])[1:] for s in range(n)]  # without the separating space
            place = {teacher.tokenizer.decode(theirs[:t]): t for t in range(len(theirs) - 1)}
            expected = {0: 0} | {s: place[text] for s, text in enumerate(read[:-1]) if text and text in place}
            expected[n - 1] = len(theirs) - 1
            if mode == "index":
                expected = {s: s for s in range(min(n, len(theirs)))}
            usable_rows = {s: t for s, t in expected.items() if row.status[t] == Status.USABLE}
            assert {s: t for s, (t, ok) in enumerate(zip(found, usable, strict=True)) if ok} == usable_rows
            assert len(usable_rows) > 5
            first += n


def test_a_step_divides_by_the_positions_that_are_compared(tmp_path: Path) -> None:
    """Two micro-batches of unequal shares: a mean of means, or of all positions, would be another number."""
    _, recipe = made(tmp_path)
    reader, prompts = CacheReader.open(Path(str(recipe.cache.dir))), prompts_of(tmp_path / "gpt2")
    settings = StudentRecipe(model="", dtype="float32", lora=Lora(r=4, alpha=8))
    student = Student(locate(str(tmp_path / "gpt2")), settings, 0, CPU)
    collator = Collator(reader, prompts, 320, ULD, "boundary")
    flat_gradients(student.parameters.values())
    (whole,) = collator.read([0, 3, 5], 3)
    counts, weights = whole.counts(), {"ce": 1.0, "uld": 0.5}
    expected = student.backward(whole, weights, counts, 1.2)
    parts = [student.backward(batch, weights, counts, 1.2) for batch in collator.read([0, 3, 5], 2)]
    assert torch.stack(parts).sum(0).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert 0 < counts["uld"] < counts["ce"] and 0 < expected[1].item() < 2


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(tmp_path: Path, family: str) -> None:
    """Learned or rotary positions, left or right: the same hidden states at the answers, one example at a time too."""
    _, recipe = made(tmp_path)
    reader, prompts = CacheReader.open(Path(str(recipe.cache.dir))), prompts_of(tmp_path / family)
    settings = StudentRecipe(model="", dtype="float32", lora=Lora(r=4, alpha=8))
    student = Student(locate(str(tmp_path / family)), settings, 0, CPU)
    collator = Collator(reader, prompts, student.vocab_size, ULD, "boundary")
    rows = sorted(reader.read(range(8)), key=lambda row: len(row.answer))[::7]
    alone = torch.cat([student.hidden_at_answers(collator.collate([row])) for row in rows])
    for padding in ("right", "left"):
        batch = collator.collate(rows, padding)  # type: ignore[arg-type]
        assert (batch.attention_mask_BL == 0).any()
        torch.testing.assert_close(student.hidden_at_answers(batch), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_the_body_without_its_head(tmp_path: Path, family: str) -> None:
    """Conv1D counts as linear, and by name too; the head, tied or not, is neither adapted nor moved."""
    toys.tiny_tokenizer(tmp_path)
    source = locate(str(FAMILIES[family](tmp_path)))

    def adapted(targets: Any) -> Student:
        return Student(source, StudentRecipe(model="", dtype="float32", lora=Lora(r=4, targets=targets)), 0, CPU)

    for targets in ("all-linear", sorted(ADAPTED[family])):
        student = adapted(targets)
        modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in student.parameters}
        assert modules == ADAPTED[family]
        tied = student.head.weight is student.model.get_input_embeddings().weight
        assert tied == (family != "pythia")
        assert not student.head.weight.requires_grad


def test_one_cache_trains_three_students(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2, GPT-NeoX and Llama, all with a teacher that may not be built again; their weights stay what they were."""
    ranks_alone = {"uld": 1.0, "temperature": 1.2}
    path, recipe = made(
        tmp_path, train={"steps": 30, "save_every": 30, "lr": 1e-2}, arms={"sft": None, "ranks": ranks_alone}
    )

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher was built again")

    monkeypatch.setattr(transformers.T5ForConditionalGeneration, "__init__", forbidden)
    before = {name: load_file(tmp_path / name / "model.safetensors") for name in FAMILIES}
    assert main(["--recipe", path]) == 0
    shown = capsys.readouterr().out
    for name in FAMILIES:
        for arm, falling in (("uld", "ce"), ("ranks", "uld")):
            folder = RunDir.of(recipe).arm(name, arm)
            lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
            assert len(lines) == 30 and lines[-1][falling] < 0.8 * lines[0][falling], (name, arm)
            assert 0 < lines[0]["aligned"] < lines[0]["positions"]
            config = json.loads((folder.checkpoint(30) / "adapter_config.json").read_text(encoding="utf-8"))
            assert {module.rpartition(".")[2] for module in config["target_modules"]} == ADAPTED[name]
            assert config["fan_in_fan_out"] == (name == "gpt2")
        after = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(after[key], tensor) for key, tensor in before[name].items())
        assert f"{name}: of " in shown and " % by boundary, " in shown
    assert main(["--recipe", path]) == 0
    assert capsys.readouterr().out.count("done (30 steps)") == 6


def test_repeats_are_runs_with_seeds_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Repeat 1 of seed 0 is, to the byte, a run of seed 1; more repeats go on with what is there."""
    path, recipe = made(tmp_path, students={"gpt2": {"model": str(tmp_path / "gpt2"), "lora": {"dropout": 0.1}}})
    options = ["--recipe", path, "--student", "gpt2", "--arm", "uld"]
    assert main(options) == 0
    capsys.readouterr()
    assert main([*options, "--set", "train.repeats=2"]) == 0
    shown = capsys.readouterr().out
    assert "gpt2/uld: done (4 steps)" in shown and "gpt2/uld~1: to be trained" in shown and "sft" not in shown
    alone = f"run_dir={tmp_path / 'alone'}"
    assert main([*options, "--set", alone, "--set", "train.seed=1"]) == 0

    def adapter(run: RunDir, arm: str) -> bytes:
        return (run.arm("gpt2", arm).checkpoint(4) / "adapter_model.safetensors").read_bytes()

    run, other = RunDir.of(recipe), RunDir.of(load_recipe(path, [alone]))
    assert adapter(run, "uld~1") == adapter(other, "uld") != adapter(run, "uld")
    assert run.arm("gpt2", "uld~1").identity.read_bytes() == other.arm("gpt2", "uld").identity.read_bytes()


DATA = os.environ.get("LOGITBANK_DATA")
REAL = {"gpt2": ("gpt2", 50257), "pythia": ("gpt-neox-20b", 50304), "smollm": ("smollm2", 49152)}


@pytest.mark.skipif(
    not DATA, reason="needs the real tokenizers and rows: set LOGITBANK_DATA to the folder that has them"
)
def test_with_the_real_tokenizers_and_rows(tmp_path: Path) -> None:
    """True vocabularies, no pad token, Spanish and code: one cache of T5's, each student on either padding."""
    tokenizers = Path(str(DATA)) / "tokenizers"
    AutoTokenizer.from_pretrained(tokenizers / "t5").save_pretrained(tmp_path / "t5")
    toys.tiny_t5(tmp_path / "t5", vocab_size=32128, hidden=16)
    path = toys.tiny_recipe(
        tmp_path,
        data={"tasks": {"gsm8k": None, "eng_spa": {"train": 3}, "mbpp": {"train": 3}}, "dir": str(DATA)},
        teacher={"model": str(tmp_path / "t5"), "kind": "seq2seq", "shots": 0},
        cache={"temperatures": [1.2], "store_ids": False, "top_k": 256},
        arms={"distill": None, "uld": {"ce": 1.0, "uld": 0.5, "temperature": 1.2}},
        eval={"baselines": ["zero_shot"]},
    )
    reader = CacheReader.open(toys.fill_cache(load_recipe(str(path))))
    settings = StudentRecipe(model="", dtype="float32", lora=Lora(r=4, alpha=8))
    for family, (tokenizer, vocab_size) in REAL.items():
        AutoTokenizer.from_pretrained(tokenizers / tokenizer).save_pretrained(tmp_path / family)
        FAMILIES[family](tmp_path / family, vocab_size=vocab_size, hidden=16)
        student = Student(locate(str(tmp_path / family)), settings, 0, CPU)
        assert student.vocab_size == vocab_size
        collator = Collator(reader, prompts_of(tmp_path / family), vocab_size, ULD, "boundary")
        found = []
        for padding in ("right", "left"):
            batch = collator.collate(reader.read(range(6)), padding)  # type: ignore[arg-type]
            gradients = flat_gradients(student.parameters.values())
            found.append(student.backward(batch, {"ce": 1.0, "uld": 0.5}, batch.counts(), 1.2))
            assert gradients.isfinite().all() and gradients.abs().max() > 0
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
        assert 0 < found[0][1].item() < 2
        assert 0.3 < batch.counts()["uld"] / batch.counts()["ce"] < 1, family
