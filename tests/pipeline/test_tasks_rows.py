"""Rows from the Hub's layouts on a local folder, and all real rows of all ten tasks where there are some."""

import dataclasses
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import toys
import yaml

from pipeline.data import eval_examples, eval_shots, training_set, unseen_examples
from pipeline.errors import DataError
from pipeline.models import ModelSource, load_tokenizer
from pipeline.prompts import PromptBuilder
from pipeline.recipe import Recipe, load_recipe
from pipeline.tasks import HubSource, get_task

COSMOS = {"context": "I fell .", "question": "Why ?", "answer0": "a", "answer1": "b", "answer2": "c", "answer3": "d"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a task's source on a local folder, which `datasets` reads as it reads a repository, its cache beside it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub_cache"))

    def place(name: str) -> Path:
        task = get_task(name)
        assert isinstance(task.source, HubSource)
        moved = dataclasses.replace(task, source=dataclasses.replace(task.source, path=str(tmp_path / "hub" / name)))
        monkeypatch.setattr(f"pipeline.tasks.{name}.TASK", moved)
        return tmp_path / "hub" / name

    return place


def recipe(tmp_path: Path, name: str, **data: object) -> Recipe:
    """A recipe of one task without worked examples; no model of it is read here."""
    tree = {
        "name": "rows",
        "data": {"tasks": {name: {}}, **data},
        "teacher": {"model": "none", "shots": 0},
        "students": {"toy": {"model": "none"}},
        "arms": {"sft": {"ce": 1.0}},
        "eval": {"baselines": ["zero_shot"]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_recipe(str(path))


def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def test_the_hubs_parquet_copy_is_read_and_its_validation_is_our_test(tmp_path, hub):
    folder = hub("cosmos_qa")
    write_parquet(
        folder / "default" / "train" / "0000.parquet", [COSMOS | {"id": str(i), "label": 1} for i in range(5)]
    )
    write_parquet(folder / "default" / "validation" / "0000.parquet", [COSMOS | {"id": "v", "label": 3}])
    write_parquet(folder / "default" / "test" / "0000.parquet", [COSMOS | {"id": "t", "label": -1}])
    loaded = recipe(tmp_path, "cosmos_qa")
    assert [(e.id, e.answer) for e in training_set(loaded).cached] == [
        (f"train/cosmos_qa-{i:05d}", "b") for i in range(5)
    ]
    assert [(e.id, e.answer) for e in eval_examples(loaded, "test")] == [("test/cosmos_qa-00000", "d")]
    with pytest.raises(DataError, match="task cosmos_qa has no split 'validation'; it has train, test"):
        eval_examples(loaded, "validation")


def test_the_rounds_of_anli_are_one_split(tmp_path, hub):
    folder = hub("anli")
    for part in ("train", "dev", "test"):
        for number in (1, 2, 3):
            row = {"uid": "u", "premise": f"{part} {number}", "hypothesis": "h", "label": number - 1, "reason": ""}
            write_parquet(folder / "plain_text" / f"{part}_r{number}-00000-of-00001.parquet", [row, row])
    configs = [
        {"split": f"{p}_r{n}", "path": f"plain_text/{p}_r{n}-*"} for p in ("train", "dev", "test") for n in (1, 2, 3)
    ]
    card = yaml.safe_dump({"configs": [{"config_name": "plain_text", "data_files": configs}]})
    (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    loaded = recipe(tmp_path, "anli")
    assert [e.prompt.split("\n")[0] for e in training_set(loaded).cached] == [f"train {n}" for n in (1, 1, 2, 2, 3, 3)]
    assert [e.answer for e in eval_examples(loaded, "validation")][::2] == ["Yes", "It's impossible to say", "No"]


def test_the_sentences_of_a_concept_set_are_one_example(tmp_path, hub):
    folder = hub("common_gen")
    rows = [
        {"concept_set_idx": number, "concepts": ["dog", f"w{number}"], "target": f"sentence {i}"}
        for i, number in enumerate([4, 4, 9, 4, 2])
    ]
    for split in ("train", "validation"):
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
    loaded = recipe(tmp_path, "common_gen")
    for examples in (training_set(loaded).cached, eval_examples(loaded, "test")):
        assert [e.answer for e in examples] == ["sentence 0", "sentence 2", "sentence 4"]
        assert [e.golds for e in examples] == [
            ("sentence 0", "sentence 1", "sentence 3"),
            ("sentence 2",),
            ("sentence 4",),
        ]


def test_a_null_of_the_hubs_comma_separated_files_is_empty_text(tmp_path, hub):
    folder = hub("samsum")
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        lines = ["id,dialogue,summary", '1,"Ann: Hi!\r\nBen: Bye.",Ben leaves.', "2,,"]
        (folder / f"{split}.csv").write_bytes("\n".join(lines).encode())
    cached = training_set(recipe(tmp_path, "samsum")).cached
    assert cached[0].prompt.startswith("Ann: Hi!\nBen: Bye.\n\nSummarize")
    assert (cached[1].prompt[:2], cached[1].answer) == ("\n\n", "")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "could not be loaded from the Hub: .*put its rows into <folder>/boolq/train.jsonl and add --set data.dir"),
        ({"validation.jsonl": [{"answer": True}]}, 'could not be loaded from the Hub: Unknown split "train"'),
        ({"train.jsonl": [{"answer": True}]}, r"row 0: task boolq cannot read it: KeyError 'passage'"),
        ({"boolq.py": []}, "could not be loaded from the Hub: "),
    ],
)
def test_what_the_hub_cannot_give_has_a_way_out(tmp_path, hub, files, words):
    folder = hub("boolq")
    for name, rows in files.items():
        toys.write_jsonl(folder / name, rows)
    with pytest.raises(DataError, match=words):
        training_set(recipe(tmp_path, "boolq"))


def test_rows_of_a_folder_are_refused_by_name(tmp_path):
    folder = tmp_path / "rows"
    withheld = r"task cosmos_qa cannot read it: .*label -1.*withheld"
    toys.write_jsonl(folder / "cosmos_qa" / "train.jsonl", [COSMOS | {"label": -1}, COSMOS | {"label": -1}])
    with pytest.raises(DataError, match=rf"train\.jsonl, row 0: {withheld}"):
        training_set(recipe(tmp_path, "cosmos_qa", dir=str(folder)))
    toys.write_jsonl(folder / "cosmos_qa" / "train.jsonl", [COSMOS | {"label": 1}, COSMOS | {"label": -1}])
    _, bad = training_set(recipe(tmp_path, "cosmos_qa", dir=str(folder))).cached  # one of several: for the ledger
    assert bad.unusable == "unreadable_row" and re.search(withheld, bad.extra["what"])
    toys.write_jsonl(folder / "common_gen" / "train.jsonl", [{"concepts": ["a"]}])
    with pytest.raises(DataError, match="common_gen cannot gather its rows: KeyError 'concept_set_idx'"):
        training_set(recipe(tmp_path, "common_gen", dir=str(folder)))


ROWS = {
    "boolq": (1886, 500),
    "squad": (2000, 500),
    "samsum": (2000, 500),
    "anli": (2000, 500),
    "paws": (2000, 500),
    "xsum": (1426, 500),
    "common_gen": (2000, 500),
    "cosmos_qa": (2000, 500),
    "mbpp": (374, 500),
    "eng_spa": (2000, 500),
}
CUT = {"boolq": (10, 2), "squad": (14, 8), "samsum": (26, 10), "xsum": (662, 242)}  # of more than 320 words


@pytest.fixture(scope="module")
def real():
    folder = os.environ.get("LOGITBANK_DATA")
    if not folder:
        pytest.skip("LOGITBANK_DATA is not set: no real rows here")
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_every_real_row_of_a_task_converts(tmp_path, real, name):
    loaded = recipe(tmp_path, name, dir=real)
    train, test = training_set(loaded).cached, eval_examples(loaded, "test")
    assert (len(train), len(test)) == ROWS[name]
    assert (sum(e.truncated for e in train), sum(e.truncated for e in test)) == CUT.get(name, (0, 0))
    assert len({e.id for e in [*train, *test]}) == sum(ROWS[name])
    task = get_task(name)
    for example in [*train, *test]:
        assert example.answer.strip() and example.answer in example.golds
        assert "\r" not in example.prompt + example.answer
        if example.labels:
            assert example.answer in example.labels and len(set(example.labels)) == len(example.labels)
        if task.score is not None:
            assert task.score(example.answer, example)[task.metrics[0]] == 1.0
    if name == "squad":
        cut = [e for e in train if e.truncated]
        assert sum("answer_cut" in e.extra for e in cut) == 2
        assert all((e.answer in e.prompt) != ("answer_cut" in e.extra) for e in cut)
    if name == "common_gen":
        assert all(e.extra["concepts"] for e in train) and Counter(len(e.references) for e in test)[4] > 300


def test_the_published_recipe_on_real_rows(real):
    loaded = load_recipe("flan-uld", [f"data.dir={real}"])
    split = training_set(loaded)
    assert Counter(e.task for e in split.cached) == {name: ROWS[name][0] for name in loaded.trained_tasks}
    assert split.truncated == 10 + 14 + 26 + 662
    first = Counter(e.task for e in split.cached[: loaded.cache.shard_examples])
    assert set(first) == set(loaded.trained_tasks) and min(first.values()) > 15
    train, test, unseen = eval_examples(loaded, "train"), eval_examples(loaded, "test"), unseen_examples(loaded)
    assert [len(train), len(test), len(unseen)] == [4000, 4000, 1000]
    assert {e.id for e in train} <= {e.id for e in split.cached}
    assert {e.task for e in unseen} == {"mbpp", "eng_spa"}
    shots = eval_shots(loaded)
    assert {task: len(pool) for task, pool in shots.pool.items()} == {"mbpp": 5, "eng_spa": 5}
    prompts = {e.prompt for e in unseen}
    assert not any(shot.prompt in prompts for pool in shots.pool.values() for shot in pool)


def test_how_many_programs_flan_uld_leaves_no_room_for(real):
    """What the recipe's comment says of eval.max_new_tokens: of 500 reference programs, by tokenizer."""
    recipe = load_recipe("flan-uld", [f"data.dir={real}"])
    programs = [example.answer for example in unseen_examples(recipe) if example.task == "mbpp"]
    cut = {}
    for name in ("gpt2", "gpt-neox-20b", "smollm2", "t5"):
        prompts = PromptBuilder(load_tokenizer(ModelSource(f"{real}/tokenizers/{name}", None)), seq2seq=name == "t5")
        lengths = [len(prompts.encode("", program).answer_ids) for program in programs]
        cut[name] = sum(length > recipe.eval.max_new_tokens for length in lengths)
    assert len(programs) == 500
    assert cut == {"gpt2": 18, "gpt-neox-20b": 4, "smollm2": 5, "t5": 7}
