"""The alignment report: its counts are those of the batches, and its table says them."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

from cache_schema.reader import CacheReader
from cache_schema.schema import Status
from pipeline.fingerprint import Experiment
from pipeline.models import load_tokenizer, locate
from pipeline.prompts import PromptBuilder
from pipeline.recipe import load_recipe
from pipeline.run_dir import RunDir
from pipeline.sections import Arm
from stage2_student import coverage
from stage2_student.__main__ import main
from stage2_student.batches import Collator


def test_the_report_counts_what_training_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two students: one with the teacher's tokenizer, one without; every third position of the cache is quarantined."""

    def edit(row: Any) -> Any:
        status = np.where(np.arange(len(row.status)) % 3 == 1, Status.UNKNOWN_TOKEN, Status.USABLE).astype(np.uint8)
        return replace(row, status=status, task="even" if int(row.example_id[-1]) % 2 == 0 else "odd")

    toys.tiny_tokenizer(tmp_path / "other", vocab_size=290)
    toys.tiny_gpt2(tmp_path / "other")
    other = {"model": str(tmp_path / "other"), "dtype": "float32"}
    path = str(toys.tiny_recipe(tmp_path, students={"other": other}, arms={"uld": {"uld": 1.0}, "distill": None}))
    recipe = load_recipe(path)
    reader = CacheReader.open(toys.fill_cache(recipe, edit))
    assert main(["--recipe", path, "--alignment"]) == 0
    table = capsys.readouterr().out
    teacher = Experiment(recipe).teacher_prompts
    for student, folder in (("toy", "model"), ("other", "other")):
        prompts = PromptBuilder(load_tokenizer(locate(str(tmp_path / folder))))
        report = json.loads(RunDir.of(recipe).alignment(student).read_text(encoding="utf-8"))
        assert report["cache"] == reader.manifest.fingerprint
        for task in ("even", "odd"):
            rows = [row for row in reader.rows() if row.task == task]
            counts = report["tasks"][task]
            assert counts["examples"] == len(rows)
            for mode in coverage.MODES:
                batch = Collator(reader, prompts, 320, Arm(uld=1.0), mode).collate(rows)
                used = counts["aligned"][mode] - counts["quarantined"][mode]
                assert batch.counts()["uld"] == used > 0 and counts["positions"] == batch.counts()["ce"]
                assert counts["quarantined"][mode] > 0
                if student == "toy":
                    assert counts["aligned"][mode] == counts["agreed"] == counts["positions"]
            assert counts["agreed"] == sum(same_text(row, prompts, teacher) for row in rows)
            assert student == "toy" or counts["aligned"]["boundary"] < counts["aligned"]["index"] <= counts["positions"]
        used = sum(t["aligned"]["boundary"] - t["quarantined"]["boundary"] for t in report["tasks"].values())
        positions = sum(t["positions"] for t in report["tasks"].values())
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {student} ") and "| all " in line]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2:5] == [str(len(reader)), f"{positions:,}", f"{100 * used / positions:.1f}"]
    assert not (RunDir.of(recipe).root / "students" / "toy" / "uld").exists()  # nothing was trained


def same_text(row: Any, prompts: PromptBuilder, teacher: PromptBuilder) -> int:
    """Positions of the same number before which both sides' tokens say the same: none of them, all, or some text."""
    ours, theirs = prompts.encode("", row.answer).answer_ids, row.answer_ids.tolist()
    if ours == theirs:
        return len(ours)
    pairs = [
        (prompts.tokenizer.decode(ours[:t]), teacher.tokenizer.decode(theirs[:t]))
        for t in range(1, min(len(ours), len(theirs)) - 1)
    ]
    return 1 + sum(a == b and a.strip() != "" for a, b in pairs) + (len(ours) == len(theirs))


def test_training_prints_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For arms that align; plain fine-tuning has no use for it."""
    path = str(toys.tiny_recipe(tmp_path, arms={"uld": {"uld": 1.0}, "distill": None}))
    recipe = load_recipe(path)
    toys.fill_cache(recipe)
    kept = RunDir.of(recipe).alignment("toy")
    assert main(["--recipe", path, "--arm", "sft"]) == 0
    assert not kept.exists() and "by boundary" not in capsys.readouterr().out
    assert main(["--recipe", path, "--arm", "uld"]) == 0
    counts = json.loads(kept.read_text(encoding="utf-8"))["tasks"]["gsm8k"]
    expected = f"toy: of {counts['positions']:,} answer positions 100.0 % by boundary, 100.0 % by index have a teacher"
    assert expected in capsys.readouterr().out


DATA = os.environ.get("LOGITBANK_DATA")


@pytest.mark.skipif(
    not DATA, reason="needs the real tokenizers and rows: set LOGITBANK_DATA to the folder that has them"
)
def test_real_tokenizers_cover_real_answers(tmp_path: Path) -> None:
    """T5's positions for GPT-2, Pythia and SmolLM on summaries: most have one by text, more by number."""
    tokenizers = Path(str(DATA)) / "tokenizers"
    source = locate(str(toys.tiny_t5(tmp_path / "t5", vocab_size=32128, hidden=8)))
    load_tokenizer_from(tokenizers / "t5").save_pretrained(tmp_path / "t5")
    path = toys.tiny_recipe(
        tmp_path,
        data={"tasks": {"gsm8k": None, "samsum": {"train": 12}}, "dir": str(DATA)},
        teacher={"model": source.location, "kind": "seq2seq", "shots": 0},
        cache={"store_ids": False},
        arms={"distill": None, "uld": {"uld": 1.0}},
        eval={"baselines": ["zero_shot"]},
    )
    recipe = load_recipe(str(path))
    reader = CacheReader.open(toys.fill_cache(recipe), expect=Experiment(recipe).identity)
    for name in ("gpt2", "gpt-neox-20b", "smollm2"):
        every = coverage.total(coverage.measure(reader, PromptBuilder(load_tokenizer_from(tokenizers / name))))
        assert every.examples == 12 and every.positions > 200
        assert 90 < every.taught("boundary") < every.taught("index") <= 100, name
        assert every.quarantined == {"boundary": 0, "index": 0}  # the toy cache quarantines nothing


def load_tokenizer_from(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
