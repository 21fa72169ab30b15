"""Rows that no sane data set has: each is quarantined with its reason and harms no other."""

import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import promised
import pytest
import torch
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cache_schema.reader import CacheReader
from cache_schema.schema import CacheRow, Status
from cache_schema.verify import verify
from pipeline.data import Shots, eval_examples, eval_shots, training_set
from pipeline.fingerprint import Experiment
from pipeline.models import ModelSource, load_causal_lm
from pipeline.prompts import PromptBuilder
from pipeline.recipe import load_recipe
from pipeline.rows import MAX_LINE_BYTES
from pipeline.tasks import Example
from stage1_teacher.__main__ import main as stage1
from stage1_teacher.capture import Capture
from stage1_teacher.teacher import CausalTeacher
from stage2_student.__main__ import main as stage2
from stage3_eval.__main__ import main as stage3

WINDOW = 512
TEMPLATE = toys.CHAT_TEMPLATE.replace(
    "<|start|>{{ m.role }}",
    "{% if 'FORBIDDEN' in m.content %}{{ raise_exception('not this') }}{% endif %}<|start|>{{ m.role }}",
    1,
)


@dataclass(frozen=True)
class Poison:
    """A line of a file, and what must become of it: a reason, or the statuses of its row."""

    line: bytes
    reason: str = ""
    statuses: frozenset[Status] = frozenset({Status.USABLE})


def _json(question: Any, answer: Any = "An answer.\n#### 4") -> bytes:
    return json.dumps({"question": question, "answer": answer}).encode()


POISONS = {
    "nan": Poison(_json("What is Ω?"), statuses=frozenset({Status.NOT_FINITE})),
    "infinity": Poison(_json("What is Ψ?"), statuses=frozenset({Status.NOT_FINITE})),
    "controls": Poison(_json("a\x00b\x07\x1b[2J", "\x00\x01 7\x7f")),
    "cut": Poison(_json("Long?", "1 2 " * 250), statuses=frozenset({Status.USABLE, Status.CUT})),
    "empty": Poison(_json("Why?", ""), "empty_answer"),
    "blank": Poison(_json("Why?", " \n\t\u3000"), "empty_answer"),
    "long prompt": Poison(_json("why " * 600), "prompt_exceeds_window"),
    "long answer": Poison(_json("Why?", "so " * 600), "answer_exceeds_window"),
    "no prompt": Poison(_json("")),  # in a chat an answer to nothing is something to learn
    "new token": Poison(_json("What is <|new|>?"), "id_beyond_vocabulary"),
    "new answer": Poison(_json("Why?", "a <|new|>"), "id_beyond_vocabulary"),
    "template": Poison(_json("FORBIDDEN"), "cannot_encode"),
    "surrogate": Poison(b'{"question": "a\\ud800", "answer": "b"}', "lone_surrogate"),
    "surrogate answer": Poison(b'{"question": "a", "answer": "\\udfffb"}', "lone_surrogate"),
    "10 MB": Poison(_json("x" * 10_000_000), "text_too_long"),
    "10 MB answer": Poison(_json("a", "y" * 10_000_000), "text_too_long"),
    "missing": Poison(b'{"question": "a"}', "unreadable_row"),
    "list": Poison(b'["question", "answer"]', "unreadable_row"),
    "null": Poison(b"null", "unreadable_row"),
    "number": Poison(_json(3), "not_text"),
    "nested": Poison(_json("a", {"text": "b"}), "not_text"),
    "cut off": Poison(b'{"question": "a", "answ', "not_json"),
    "latin-1": Poison(b'{"question": "\xe9t\xe9", "answer": "b"}', "not_json"),
    "deep": Poison(b"[" * 200_000, "not_json"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher`, whose embeddings of two characters are NaN and infinite, and `student`, the same without. The
    tokenizer has one token more than they have rows, and a template that refuses a word."""
    root: Path = tmp_path_factory.mktemp("models")
    for name in ("teacher", "student"):
        tokenizer = toys.tiny_tokenizer(root / name, chat=True)
        tokenizer.chat_template = TEMPLATE
        tokenizer.add_tokens(["<|new|>"], special_tokens=True)
        tokenizer.save_pretrained(str(root / name))
        size = tokenizer.convert_tokens_to_ids("<|new|>")
        toys.tiny_qwen3(root / name, vocab_size=size, tie_word_embeddings=False, max_position_embeddings=WINDOW)
    weights = load_file(root / "teacher" / "model.safetensors")
    for character, value in (("Ω", torch.nan), ("Ψ", torch.inf)):
        token = tokenizer(character, add_special_tokens=False)["input_ids"][-1]
        weights["model.embed_tokens.weight"][token] = value
    save_file(weights, root / "teacher" / "model.safetensors", metadata={"format": "pt"})
    return root


def recipe_with(models: Path, folder: Path, lines: list[bytes], **sections: Any) -> str:
    """A recipe of these training lines, a shard an example."""
    (folder / "data" / "gsm8k").mkdir(parents=True)
    (folder / "data" / "gsm8k" / "train.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    toys.write_jsonl(folder / "data" / "gsm8k" / "test.jsonl", toys.rows(4, start=100))
    tree = {
        "teacher": {"model": str(models / "teacher"), "shots": 0},
        "cache": {"shard_examples": 1},
        "students": {"toy": {"model": str(models / "student")}},
        "eval": {"baselines": ["zero_shot"]},
    }
    return str(toys.tiny_recipe(folder, **(tree | sections)))


def good(count: int) -> list[bytes]:
    return [json.dumps(row).encode() for row in toys.rows(count)]


def rows_by_prompt(recipe: str) -> dict[str, CacheRow]:
    return {row.prompt: row for row in CacheReader.open(cache_of(recipe)).rows()}


def cache_of(recipe: str) -> Path:
    return Path(str(load_recipe(recipe).cache.dir))


def same(one: CacheRow, other: CacheRow) -> bool:
    """Bitwise, but for the id, which counts the rows before it."""
    for name in ("answer_ids", "answer_offsets", "status", "top_logit", "logits", "token_ids", "logsumexp", "log_tail"):
        a, b = getattr(one, name), getattr(other, name)
        if a.dtype != b.dtype or a.tobytes() != b.tobytes():
            return False
    return (one.task, one.prompt, one.answer) == (other.task, other.prompt, other.answer)


@pytest.fixture(scope="module")
def clean(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, CacheRow]:
    """The rows of a cache without poison: the oracle."""
    recipe = recipe_with(models, tmp_path_factory.mktemp("clean"), good(5))
    assert stage1(["--recipe", recipe]) == 0
    rows = rows_by_prompt(recipe)
    assert len(rows) == 5
    return rows


mixes = st.tuples(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(sorted(POISONS))), max_size=9))


def check_mix(models: Path, clean: dict[str, CacheRow], mix: list[tuple[int, str]], train: bool = False) -> None:
    """Poisoned lines at these places among five good ones: stage 1 ends well, and every promise of it holds."""
    lines: list[bytes] = []
    for place in range(6):
        lines += [POISONS[kind].line for at, kind in mix if at == place] + good(5)[place : place + 1]
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_with(models, Path(folder), lines)
        assert stage1(["--recipe", recipe]) == 0
        reader = CacheReader.open(cache_of(recipe))
        rows, totals = rows_by_prompt(recipe), reader.totals()
        for prompt, row in clean.items():
            assert same(rows[prompt], row), prompt
        reasons = Counter(POISONS[kind].reason for _, kind in mix if POISONS[kind].reason)
        assert totals.examples.input == len(lines) == len(reader) + sum(reasons.values())
        assert totals.examples.quarantined == reasons and totals.examples.reconciles and totals.positions.reconciles
        for _, kind in mix:
            if not POISONS[kind].reason:
                row = rows[json.loads(POISONS[kind].line)["question"]]
                assert {Status(code) for code in row.status.tolist()} == POISONS[kind].statuses, kind
        assert len(verify(cache_of(recipe)).problems) == 0
        if train:
            assert stage2(["--recipe", recipe, "--set", "train.steps=2"]) == 0


def test_each_poison_alone_and_all_together(models: Path, clean: dict[str, CacheRow]) -> None:
    check_mix(models, clean, [(i % 6, kind) for i, kind in enumerate(POISONS)], train=True)


@pytest.mark.promise(promised.POISONED)
@pytest.mark.parametrize("count", [12, pytest.param(250, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_any_mix_of_poisons_harms_no_good_row(models: Path, clean: dict[str, CacheRow], count: int, tried: Any) -> None:
    poisoned = 0

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=count < 50)
    @given(mixes)
    def mix_is_harmless(drawn: tuple[list[tuple[int, str]]]) -> None:
        nonlocal poisoned
        check_mix(models, clean, drawn[0])
        poisoned += len(drawn[0])

    mix_is_harmless()
    tried(poisoned, f"poisoned rows in {count} mixes of {len(POISONS)} kinds")


def test_the_control_a_cache_of_other_weights_is_not_the_same(models: Path, clean: dict[str, CacheRow]) -> None:
    """What `same` compares can differ."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_with(models, Path(folder), good(5), teacher={"model": str(models / "other"), "shots": 0})
        toys.tiny_tokenizer(models / "other", chat=True)
        toys.tiny_qwen3(models / "other", seed=1)
        assert stage1(["--recipe", recipe]) == 0
        assert not any(same(row, clean[prompt]) for prompt, row in rows_by_prompt(recipe).items())


def test_infinite_and_missing_logits_are_a_status(models: Path) -> None:
    """NaN, +inf and -inf at chosen places of a real teacher's logits: those positions alone are unusable."""

    class Broken(CausalTeacher):
        def answer_logits(self, batch: Any, context_ids: Any) -> Any:
            for chunk in super().answer_logits(batch, context_ids):
                chunk[1, 5], chunk[2, 9], chunk[4], chunk[6] = torch.nan, torch.inf, -torch.inf, torch.nan
                yield chunk

    model = load_causal_lm(ModelSource(str(models / "student"), None), "float32", "none", torch.device("cpu"))
    prompts = PromptBuilder(toys.tiny_tokenizer(models / "plain"))
    row_ = toys.rows(1)[0]
    example = Example("train/0", "gsm8k", row_["question"], row_["answer"])
    none = Shots(0, "shared", 0, {})
    (row,), lost = Capture(Broken(model), prompts, none, 8, [1.0], 0.015625, 4096).shard([example])
    bad = np.isin(np.arange(len(row.status)), [1, 2, 4, 6])
    assert not lost and (row.status[bad] == Status.NOT_FINITE).all() and (row.status[~bad] == Status.USABLE).all()
    assert np.isfinite(row.logits).all() and np.isfinite(row.logsumexp).all()
    # In the plain layout nothing is read before the first answer token of an empty prompt.
    rows, (empty,) = Capture(CausalTeacher(model), prompts, none, 8, [1.0], 0.015625, 4096).shard(
        [Example("train/1", "gsm8k", "", "An answer")]
    )
    assert rows == [] and empty.reason == "empty_prompt" and empty.positions > 1


def test_the_end_report_names_reason_example_and_fault(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_with(models, tmp_path, [*good(3), POISONS["missing"].line, POISONS["empty"].line, b"{"])
    assert stage1(["--recipe", recipe]) == 0
    said = capsys.readouterr().out
    assert "examples 6 in = 3 written + 3 quarantined (1 empty_answer, 1 not_json, 1 unreadable_row)" in said
    assert "1 empty_answer: train/gsm8k-00004\n" in said
    assert "1 not_json: train/gsm8k-row-000005 (line 6: not JSON in UTF-8: " in said
    assert "1 unreadable_row: train/gsm8k-row-000003 (task gsm8k cannot read it: KeyError 'answer'" in said


def test_no_poison_becomes_a_worked_example_or_a_held_out_row(models: Path, tmp_path: Path) -> None:
    """Shots and held-out rows are those of the data without the poison; the rows' identity covers the poison."""
    kinds = [kind for kind in POISONS if POISONS[kind].reason in ("not_json", "lone_surrogate", "text_too_long")]
    lines = [*(POISONS[kind].line for kind in kinds), *good(8)]
    wanted = {"teacher": {"model": str(models / "teacher"), "shots": 3}, "data": {"held_out": 2}}
    poisoned = recipe_with(models, tmp_path / "a", lines, **wanted)
    clean = recipe_with(models, tmp_path / "b", good(8), **wanted)
    one, other = (training_set(load_recipe(path)) for path in (poisoned, clean))
    assert [s.prompt for s in one.shots.pool["gsm8k"]] == [s.prompt for s in other.shots.pool["gsm8k"]]
    assert [e.prompt for e in one.held_out] == [e.prompt for e in other.held_out]
    assert len(one.cached) == len(other.cached) + len(kinds)
    for policy in ("shared", "per_example"):
        shots = training_set(load_recipe(poisoned, [f"teacher.shot_policy={policy}"])).shots
        assert not any(shot.unusable for example in one.cached for shot in shots.of(example))
    before = Experiment(load_recipe(poisoned)).fingerprint
    path = tmp_path / "a" / "data" / "gsm8k" / "train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\\ud800", b"\\ud801", 1))
    assert Experiment(load_recipe(poisoned)).fingerprint != before


@pytest.mark.promise(promised.POISONED)
@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_row_of_any_mix_is_lost_among_the_worked_examples(
    models: Path, tmp_path: Path, count: int, tried: Any
) -> None:
    """With shots, which take the rows that repeat them out: never a row that cannot be used, none of a blank prompt."""
    base = load_recipe(recipe_with(models, tmp_path, [], teacher={"model": str(models / "teacher"), "shots": 2}))
    path = tmp_path / "data" / "gsm8k" / "train.jsonl"
    kinds = sorted(kind for kind in POISONS if "10 MB" not in kind)
    at_data = {"lone_surrogate", "unreadable_row", "not_text", "not_json"}
    poisoned = 0

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=count < 50)
    @given(st.lists(st.sampled_from(kinds), max_size=9), st.integers(0, 20), st.integers(0, 9), st.integers(0, 9))
    def nothing_is_lost(drawn: list[str], blanks: int, seed: int, place: int) -> None:
        nonlocal poisoned
        mix = [*drawn, *["no prompt"] * blanks]
        lines = [POISONS[kind].line for kind in mix]
        path.write_bytes(b"\n".join([*lines[:place], *good(5), *lines[place:]]))
        teacher = base.teacher.model_copy(update={"shot_seed": seed})
        split = training_set(base.model_copy(update={"teacher": teacher}))
        shots = split.shots.pool["gsm8k"]
        assert len(shots) == 2 and all(s.prompt.strip() and s.answer.strip() and not s.unusable for s in shots)
        unusable = Counter(e.unusable for e in split.cached if e.unusable)
        assert unusable == Counter(r for kind in mix if (r := POISONS[kind].reason) in at_data)
        readable = [POISONS[kind].line for kind in mix if POISONS[kind].reason not in at_data]
        prompts = Counter(json.loads(line)["question"] for line in [*good(5), *readable])
        taken_out = sum(prompts[prompt] for prompt in {shot.prompt for shot in shots})
        assert split.rows == len(mix) + 5 == len(split.cached) + taken_out
        poisoned += len(mix)

    nothing_is_lost()
    tried(poisoned, f"poisoned rows in {count} mixes, with worked examples")


def test_the_ledger_has_every_row_with_worked_examples_too(models: Path, tmp_path: Path) -> None:
    """Most rows have an empty prompt: one would be drawn as a worked example, and all that is unreadable with it."""
    kinds = ["missing", "cut off", "surrogate", "empty", *["no prompt"] * 20]
    lines = [*good(5), *(POISONS[kind].line for kind in kinds)]
    recipe = recipe_with(models, tmp_path, lines, teacher={"model": str(models / "teacher"), "shots": 2})
    assert stage1(["--recipe", recipe]) == 0
    reader = CacheReader.open(cache_of(recipe))
    totals, rows = reader.totals(), reader.manifest.provenance["rows"]
    assert totals.examples.quarantined == Counter(POISONS[kind].reason for kind in kinds if POISONS[kind].reason)
    assert rows["shots_taken_out"] == 2 and totals.examples.input == len(lines) - 2 == len(reader) + 4


def test_a_line_without_end_is_passed_over(models: Path, tmp_path: Path) -> None:
    """Longer than is ever held in memory; the line after it is read."""
    lines = [good(2)[0], b'"' + b"z" * (2 * MAX_LINE_BYTES + 7), good(2)[1]]
    recipe = recipe_with(models, tmp_path, lines)
    cached = training_set(load_recipe(recipe)).cached
    assert [e.unusable for e in cached] == ["", "line_too_long", ""]
    assert cached[1].extra["what"] == f"line 2: a line of {2 * MAX_LINE_BYTES + 9:,} bytes; expected 16,777,216 at most"


def test_poisoned_test_rows_are_left_out_and_said(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have no gold answer to be scored by. The n beside every score counts the others."""
    recipe = recipe_with(models, tmp_path, good(4))
    path = tmp_path / "data" / "gsm8k" / "test.jsonl"
    path.write_bytes(path.read_bytes() + POISONS["latin-1"].line + b"\n" + POISONS["number"].line + b"\n")
    examples = eval_examples(load_recipe(recipe), "test")
    assert len(examples) == 4 and not any(e.unusable for e in examples)
    assert capsys.readouterr().err == (
        "task gsm8k, split test: 2 of 6 rows cannot be used and are not scored: "
        "test/gsm8k-row-000004 (not_json), test/gsm8k-row-000005 (not_text)\n"
    )
    unseen = load_recipe(recipe, ["data.tasks={gsm8k: {}, eng_spa: {train: 0}}", "eval.shots=2"])
    pairs = [json.dumps({"translation": {"en": f"en {i}", "es": f"es {i}"}}).encode() for i in range(3)]
    (tmp_path / "data" / "eng_spa").mkdir()
    (tmp_path / "data" / "eng_spa" / "train.jsonl").write_bytes(b"\n".join([b"{", *pairs, b"null"]))
    shots = eval_shots(unseen).pool["eng_spa"]
    assert len(shots) == 2 and not any(s.unusable for s in shots)
    bare = [json.dumps({"translation": {"en": f"bare {i}", "es": " "}}).encode() for i in range(20)]
    (tmp_path / "data" / "eng_spa" / "train.jsonl").write_bytes(b"\n".join([*bare, *pairs]))
    shots = eval_shots(unseen).pool["eng_spa"]
    assert len(shots) == 2 and all(s.answer.strip() for s in shots)


def test_a_gatherer_of_rows_passes_over_what_it_cannot_read(models: Path, tmp_path: Path) -> None:
    """common_gen makes one example of the rows of a concept set."""
    recipe = recipe_with(models, tmp_path, good(4))
    sound = [
        json.dumps({"concept_set_idx": i // 2, "concepts": ["dog", f"cat{i // 2}"], "target": f"A dog {i}."}).encode()
        for i in range(4)
    ]
    (tmp_path / "data" / "common_gen").mkdir()
    bad = [b'{"concepts": ["dog"], "target": "A dog."}', b'{"concept_set_idx": [1], "target": "b"}', b"{"]
    (tmp_path / "data" / "common_gen" / "train.jsonl").write_bytes(b"\n".join([bad[0], *sound, *bad[1:]]))
    cached = training_set(load_recipe(recipe, ["data.tasks={common_gen: {}}"])).cached
    assert [(e.unusable, len(e.references)) for e in cached] == [
        ("", 2),
        ("", 2),
        ("unreadable_row", 0),
        ("unreadable_row", 0),
        ("not_json", 0),
    ]


def test_all_three_stages_go_on_past_poison(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A test row that is no JSON is not scored; one that the template refuses counts as wrong. Both are said."""
    lines = [*good(6), POISONS["template"].line, POISONS["surrogate"].line, POISONS["nan"].line]
    short = {"arms": {"distill": None}, "train": {"steps": 1}}
    recipe = recipe_with(models, tmp_path, lines, **short)
    path = tmp_path / "data" / "gsm8k" / "test.jsonl"
    path.write_bytes(path.read_bytes() + POISONS["template"].line + b"\n" + POISONS["cut off"].line + b"\n")
    for stage in (stage1, stage2, stage3):
        assert stage(["--recipe", recipe]) == 0
    said = capsys.readouterr()
    assert "task gsm8k, split test: 1 of 6 rows cannot be used and are not scored" in said.err
    refused = (
        r"toy: 1 of 5 prompts of (zero_shot|sft@1) on test are nothing that its tokenizer or chat template can read"
    )
    assert set(re.findall(refused, said.out)) == {"zero_shot", "sft@1"}
    results = json.loads((tmp_path / "run" / "report" / "results.json").read_text())
    rows = results["students"]["toy"]["blocks"]["test"]["gsm8k"]["strict"]["rows"]
    assert {name: row["n"] for name, row in rows.items()} == {"zero_shot": 5, "sft": 5}
