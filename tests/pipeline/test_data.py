"""Rows find their roles: a pure function of recipe and rows, with nothing lost and nothing used twice."""

import dataclasses
import os
import re
from collections import Counter

import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import eval_examples, eval_shots, training_set, unseen_examples
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


def test_a_row_that_repeats_a_shared_shot_is_not_cached(tmp_path):
    """Its answer would stand among the worked examples before it."""
    toys.write_jsonl(tmp_path / "gsm8k" / "train.jsonl", toys.rows(6) * 2)
    path = toys.tiny_recipe(tmp_path / "toy")
    split = training_set(load_recipe(str(path), [f"data.dir={tmp_path}"]))
    shots = split.shots.pool["gsm8k"]
    assert len(shots) == 2
    assert not {e.prompt for e in split.cached} & {shot.prompt for shot in shots}
    assert len(split.cached) == 12 - sum(row["question"] in {s.prompt for s in shots} for row in toys.rows(6) * 2)


def test_train_and_test_ids_never_meet_and_limits_nest(path):
    recipe = load_recipe(path)
    test = eval_examples(recipe, "test")
    assert len(test) == 8 and not {e.id for e in test} & {e.id for e in training_set(recipe).cached}
    assert len(eval_examples(load_recipe(path, ["data.eval_limit=3"]), "test")) == 3


def test_a_recipe_of_one_task_keeps_its_order():
    assert training_set(load_recipe("pocket")).content_digest() == (
        "5bff532bf99c594d8ecfe7a271bce91ebbe57e96f10f2e5bb3b6aedded851e23"
    )


# Three tasks in one recipe, a fourth only scored.
MIXED = "data.tasks={gsm8k: {train: 20}, eng_spa: {}, boolq: {train: 10, eval: 4}, paws: {train: 0, eval: 6}}"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    path = toys.tiny_recipe(tmp_path_factory.mktemp("mixed"), teacher={"shots": 1}, eval={"shots": 3})
    for split, count in (("train", 24), ("test", 8)):
        pairs = [{"translation": {"en": f"{split} {i}", "es": f"el {i}"}} for i in range(count)]
        asked = [
            {"question": f"{split} {i}", "answer": i % 2 == 0, "passage": "long " * (i * 25)} for i in range(count)
        ]
        alike = [{"sentence1": f"{split} {i}", "sentence2": "b", "label": i % 2} for i in range(count)]
        for name, rows in (("eng_spa", pairs), ("boolq", asked), ("paws", alike)):
            toys.write_jsonl(path.parent / "data" / name / f"{split}.jsonl", rows)
    return str(path)


def test_a_mixture_draws_of_each_task_and_shuffles_once(mixed):
    split = training_set(load_recipe(mixed, [MIXED]))
    counts = Counter(e.task for e in split.cached)
    assert counts == {"gsm8k": 19, "eng_spa": 23, "boolq": 9} and split.rows == 54
    assert {e.task for e in split.cached[:10]} == {"gsm8k", "eng_spa", "boolq"}
    assert training_set(load_recipe(mixed, [MIXED])) == split
    other = training_set(load_recipe(mixed, [MIXED, "data.seed=1"]))
    assert [e.id for e in other.cached] != [e.id for e in split.cached]
    assert Counter(e.task for e in other.cached) == counts
    by_id = {e.id: e for e in [*split.cached, *(s for pool in split.shots.pool.values() for s in pool)]}
    assert len(by_id) == 54
    alone = training_set(load_recipe(mixed, ["data.tasks={boolq: {train: 10}}"]))
    assert {e.id for e in [*alone.cached, *alone.shots.pool["boolq"]]} == {i for i in by_id if "boolq" in i}
    assert split.truncated == sum(len(e.prompt.split("\n\nQ")[0].split()) == 320 for e in split.cached) > 0


@settings(max_examples=20, deadline=None)
@given(train=st.integers(20, 24), seed=st.integers(0, 9), limit=st.integers(30, 50))
def test_draws_are_without_replacement_and_nest_in_their_task(mixed, train, seed, limit):
    tasks = f"data.tasks={{gsm8k: {{train: {train}}}, eng_spa: {{}}}}"
    split = training_set(load_recipe(mixed, [tasks, f"data.seed={seed}", "teacher.shots=0", "eval.baselines=[]"]))
    ids = [e.id for e in split.cached]
    assert len(set(ids)) == len(ids) == split.rows == train + 24
    cut = [tasks, f"data.seed={seed}", f"data.train_limit={limit}", "teacher.shots=0", "eval.baselines=[]"]
    fewer = {e.id for e in training_set(load_recipe(mixed, cut)).cached}
    assert len(fewer) == min(limit, train + 24) and fewer <= set(ids)


def test_unseen_tasks_are_scored_and_nothing_else(mixed):
    recipe, without = load_recipe(mixed, [MIXED]), load_recipe(mixed, [MIXED, "data.tasks.paws.train=24"])
    split = training_set(recipe)
    assert not any(e.task == "paws" for e in [*split.cached, *split.held_out]) and "paws" not in split.shots.pool
    assert any(e.task == "paws" for e in training_set(without).cached)
    unseen = unseen_examples(recipe)
    assert len(unseen) == 6 and {e.task for e in unseen} == {"paws"} and all(e.id.startswith("test/") for e in unseen)
    assert {e.task for e in eval_examples(recipe, "test")} == {"gsm8k", "eng_spa", "boolq"}
    assert unseen_examples(without) == () and eval_shots(without).pool == {}
    shots = eval_shots(recipe)
    assert shots == eval_shots(recipe) and set(shots.pool) == {"paws"}
    assert {len(shots.of(e)) for e in unseen} == {3} and len({shots.of(e) for e in unseen}) == 1
    assert all(s.id.startswith("train/paws") for s in shots.of(unseen[0]))
    assert len({eval_shots(load_recipe(mixed, [MIXED, f"teacher.shot_seed={i}"])).pool["paws"] for i in range(9)}) > 1
    assert eval_shots(load_recipe(mixed, [MIXED, "eval.shots=0"])).of(unseen[0]) == ()
    with pytest.raises(DataError, match=r"task paws: 24 training rows, but eval\.shots asks for 25"):
        eval_shots(load_recipe(mixed, [MIXED, "eval.shots=25"]))


def test_unseen_tasks_are_no_part_of_the_fingerprint(mixed):
    trained = "data.tasks={gsm8k: {train: 20}, eng_spa: {}, boolq: {train: 10, eval: 4}}"
    base = Experiment(load_recipe(mixed, [MIXED])).fingerprint
    assert Experiment(load_recipe(mixed, [trained, "eval.shots=0"])).fingerprint == base
    options = "data.tasks.boolq.options={max_context_words: 100}"
    assert Experiment(load_recipe(mixed, [MIXED, options])).fingerprint != base
    assert Experiment(load_recipe(mixed, [MIXED, "data.tasks.boolq.train=11"])).fingerprint != base


def test_the_scored_split_train_is_what_was_trained_on(mixed):
    recipe = load_recipe(mixed, [MIXED, "data.held_out=5"])
    cached = {e.id: e for e in training_set(recipe).cached}
    scored = eval_examples(recipe, "train")
    assert all(cached[e.id] == e for e in scored) and len({e.id for e in scored}) == len(scored)
    counts = Counter(e.task for e in cached.values())
    assert Counter(e.task for e in scored) == counts | {"boolq": 4}
    assert eval_examples(recipe, "train") == scored
    assert len(eval_examples(load_recipe(mixed, [MIXED, "data.eval_limit=7"]), "train")) == 7


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
        (["data.tasks.gsm9k={train: 0}"], RecipeError, "unknown task 'gsm9k'. Did you mean 'gsm8k'"),
        (["data.tasks.squad={train: 0, options: {nope: 1}}"], RecipeError, "squad.options: unknown option 'nope'"),
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
        ('{"question": "b\\ud800", "answer": "#### 4"}\n', "row 0: prompt and answer must be text, without lone surr"),
    ],
)
def test_bad_files_are_named(path, tmp_path, content, words):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        training_set(load_recipe(path, [f"data.dir={tmp_path}"]))


def test_a_file_that_is_not_utf8_is_named(path, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_bytes(b'{"question": "\xe9"}\n{"question": \n')
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: not JSON in UTF-8: .*0xe9[\s\S]*the other 1 rows"):
        training_set(load_recipe(path, [f"data.dir={tmp_path}"]))


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("squad", {"title": "t", "context": "abc", "question": "q", "answers": {"text": "abc"}}, "found 'abc'"),
        ("common_gen", {"concept_set_idx": 0, "concepts": "dog", "target": "a dog"}, "found 'dog'"),
        ("mbpp", {"text": "t", "code": "c", "test_setup_code": "", "test_list": "assert f()"}, "found 'assert f()'"),
        ("mbpp", {"text": "t", "code": "c", "test_setup_code": "", "test_list": []}, "IndexError"),
    ],
)
def test_a_text_where_a_list_belongs_is_not_read_letter_by_letter(path, tmp_path, task, row, words):
    toys.write_jsonl(tmp_path / task / "train.jsonl", [row])
    with pytest.raises(DataError, match=re.escape(words)):
        training_set(load_recipe(path, [f"data.dir={tmp_path}", f"data.tasks={{{task}: {{}}}}", *NO_SHOTS]))


def test_stripping_marks_is_a_hashed_option(path):
    kept = Experiment(load_recipe(path))
    stripped = Experiment(load_recipe(path, ["data.tasks.gsm8k.options={strip_calculator_marks: true}"]))
    assert "<<" in kept.training_set.cached[0].answer and "<<" not in stripped.training_set.cached[0].answer
    assert kept.fingerprint != stripped.fingerprint


NO_SHOTS = ("teacher.shots=0", "eval.baselines=[zero_shot]")
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
    "teacher.kind=seq2seq",
    "cache.store_ids=false",
]
RANKED = "arms.distill={uld: 1.0}"  # no ids are needed, so that their absence is no error
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
    base = Experiment(load_recipe(path, [RANKED])).fingerprint
    changed = [Experiment(load_recipe(path, [o, RANKED])).fingerprint for o in HASHED]
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
