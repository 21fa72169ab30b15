"""Rows find their roles: a pure function of recipe and rows, with nothing lost and nothing used twice."""

import dataclasses
import os

import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import eval_examples, training_set
from pipeline.errors import DataError, RecipeError
from pipeline.fingerprint import Experiment
from pipeline.recipe import load_recipe


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(toys.tiny_recipe(tmp_path_factory.mktemp("data")))


@settings(max_examples=30, deadline=None)
@given(shots=st.integers(1, 6), held_out=st.integers(0, 8), limit=st.integers(16, 30), seed=st.integers(0, 99))
def test_every_row_has_one_role(path, shots, held_out, limit, seed):
    recipe = load_recipe(
        path,
        [f"teacher.shots={shots}", f"data.held_out={held_out}", f"data.train_limit={limit}", f"data.seed={seed}"],
    )
    split = training_set(recipe)
    roles = [
        {e.id for e in split.cached},
        {e.id for e in split.held_out},
        {e.id for pool in split.shots.pool.values() for e in pool},
    ]
    assert [len(role) for role in roles] == [min(limit, 24) - shots - held_out, held_out, shots]
    assert len(set().union(*roles)) == sum(map(len, roles)) == split.rows == min(limit, 24)
    assert training_set(recipe) == split


def test_per_example_shots_take_nothing_out_but_what_is_held_out(path):
    recipe = load_recipe(path, ["teacher.shot_policy=per_example", "data.held_out=3"])
    split = training_set(recipe)
    assert len(split.cached) == 21
    assert {e.id for e in split.shots.pool["gsm8k"]} == {e.id for e in split.cached}


def test_train_and_test_ids_never_meet_and_limits_nest(path):
    recipe = load_recipe(path)
    test = eval_examples(recipe, "test")
    assert len(test) == 8 and not {e.id for e in test} & {e.id for e in training_set(recipe).cached}
    assert len(eval_examples(load_recipe(path, ["data.eval_limit=3"]), "test")) == 3


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (
            ["data.dir=/nowhere"],
            DataError,
            r"/nowhere/gsm8k/train\.jsonl: expected a file of JSON lines, found nothing",
        ),
        (["teacher.shots=24"], DataError, "24 training rows, but 24 are needed"),
        (["data.held_out=22"], DataError, "only 22 training rows are left"),
        (["data.tasks={gsm9k: {}}"], RecipeError, "unknown task 'gsm9k'. Did you mean 'gsm8k'"),
        (["data.tasks.gsm8k.options={strip: true}"], RecipeError, "unknown option 'strip'. Did you mean 'strip_calc"),
        (["data.tasks.gsm8k.options={strip_calculator_marks: 3}"], RecipeError, "strip_calculator_marks: .*found 3"),
    ],
)
def test_bad_input_is_named(path, overrides, error, words):
    with pytest.raises(error, match=words):
        training_set(load_recipe(path, overrides))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", r"train\.jsonl: task gsm8k has no rows"),
        ("{", r"train\.jsonl, line 1: not JSON"),
        (
            '{"question": "q"}\n',
            r"row 0: task gsm8k cannot read it: KeyError 'answer'; found the fields \['question'\]",
        ),
        ('{"question": 3, "answer": "#### 4"}\n', "row 0: prompt and answer must be text"),
        ("[1]\n", "row 0: task gsm8k cannot read it"),
    ],
)
def test_bad_files_are_named(path, tmp_path, content, words):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        training_set(load_recipe(path, [f"data.dir={tmp_path}"]))


def test_stripping_marks_is_a_hashed_option(path):
    kept = Experiment(load_recipe(path))
    stripped = Experiment(load_recipe(path, ["data.tasks.gsm8k.options={strip_calculator_marks: true}"]))
    assert "<<" in kept.training_set.cached[0].answer and "<<" not in stripped.training_set.cached[0].answer
    assert kept.fingerprint != stripped.fingerprint


HASHED = [
    "teacher.dtype=bfloat16",
    "teacher.quantization=nf4",
    "teacher.shots=3",
    "teacher.shot_seed=1",
    "teacher.shot_policy=per_example",
    "cache.top_k=8",
    "cache.step=0.03125",
    "cache.temperatures=[1.0, 2.0]",
    "data.train_limit=20",
    "data.held_out=2",
]
NOT_HASHED = [
    "cache.dir=/elsewhere",
    "cache.shard_examples=3",
    "data.eval_limit=2",
    "eval.max_new_tokens=7",
    "runtime.batch_tokens=99",
    "runtime.device=auto",
    "train.lr=1.0",
    "run_dir=/elsewhere",
    "students.toy.lora.r=2",
]


def test_the_fingerprint_hashes_what_a_number_means_and_nothing_else(path):
    base = Experiment(load_recipe(path)).fingerprint
    changed = [Experiment(load_recipe(path, [o])).fingerprint for o in HASHED]
    assert len({base, *changed}) == 1 + len(HASHED)
    assert {Experiment(load_recipe(path, [o])).fingerprint for o in NOT_HASHED} == {base}


def test_another_row_or_another_weight_is_another_fingerprint(tmp_path):
    path = toys.tiny_recipe(tmp_path)
    base = Experiment(load_recipe(str(path))).fingerprint
    rows = toys.rows(24)
    rows[20]["answer"] += " "
    toys.write_jsonl(tmp_path / "data" / "gsm8k" / "train.jsonl", rows)
    assert Experiment(load_recipe(str(path))).fingerprint != base
    toys.write_jsonl(tmp_path / "data" / "gsm8k" / "train.jsonl", toys.rows(24))
    assert Experiment(load_recipe(str(path))).fingerprint == base
    toys.tiny_qwen3(tmp_path / "model", seed=1)
    assert Experiment(load_recipe(str(path))).fingerprint != base


def test_real_gsm8k_loses_eight_rows_to_the_shots():
    folder = os.environ.get("LOGITBANK_DATA")
    if not folder:
        pytest.skip("LOGITBANK_DATA is not set: no real rows here")
    recipe = load_recipe("gsm8k-qwen3", [f"data.dir={folder}"])
    split = training_set(recipe)
    assert (split.rows, len(split.cached)) == (7473, 7465)
    assert len(eval_examples(recipe, "test")) == 1319
    assert "<<" in split.cached[0].answer and dataclasses.is_dataclass(split.cached[0])
