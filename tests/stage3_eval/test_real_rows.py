"""All ten tasks on real rows with real tokenizers and every metric, by models of the true vocabularies and few weights.

Runs where LOGITBANK_DATA names a folder of <task>/{train,test}.jsonl and tokenizers/<name>/.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import sacrebleu
import toys
import yaml

from pipeline.recipe import load_recipe
from pipeline.run_dir import RunDir
from pipeline.tasks import get_task
from stage3_eval import predictions
from stage3_eval.__main__ import main
from stage3_eval.blocks import Blocks
from stage3_eval.conditions import ZERO_SHOT

DATA = Path(os.environ.get("LOGITBANK_DATA", "/nonexistent"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="LOGITBANK_DATA is not set to the folder of real rows"),
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap, which programs are run in, is not installed"),
]
ROWS = 5


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    """The published recipe with small random models in the place of the large ones, on five rows a task."""
    root = tmp_path_factory.mktemp("real")
    eos = {"bos_token_id": 50256, "eos_token_id": 50256}
    for name, make, settings in (
        ("gpt2", toys.tiny_gpt2, {"vocab_size": 50257, "n_positions": 1024, **eos}),
        ("t5", toys.tiny_t5, {"vocab_size": 32128, "hidden": 64}),
    ):
        shutil.copytree(DATA / "tokenizers" / name, root / name)
        make(root / name, **settings)
    encoder(root / "encoder")
    recipe = load_recipe("flan-uld").model_dump(mode="json")
    for task in recipe["data"]["tasks"].values():
        task.update(train=min(task["train"], 20), eval=ROWS)
    recipe["data"]["dir"] = str(DATA)
    recipe["teacher"].update(model=str(root / "t5"), quantization="none", dtype="float32")
    recipe["students"] = {"gpt2": {"model": str(root / "gpt2"), "dtype": "float32"}}
    recipe["eval"].update(
        references={"nf4": {"model": str(root / "t5"), "dtype": "bfloat16", "quantization": "nf4"}},
        max_new_tokens=16,
        metrics={"bert_score_model": str(root / "encoder"), "bert_score_layer": 2},
    )
    recipe["run_dir"] = str(root / "run")
    recipe["runtime"] = {"device": "cpu"}
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def encoder(folder: Path) -> None:
    """A random RoBERTa for BERTScore, with a tokenizer that has the tokens BERTScore puts around a text."""
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(DATA / "tokenizers" / "gpt2" / "tokenizer.json"),
        model_max_length=512, pad_token="<pad>", cls_token="<s>", sep_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    tokenizer.save_pretrained(str(folder))
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=514,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(str(folder))


def test_every_metric_of_the_published_recipe_is_computed_on_real_rows(recipe_file):
    assert main(["--recipe", str(recipe_file)]) == 0
    recipe = load_recipe(str(recipe_file))
    found = json.loads((Path(recipe.run_dir or "") / "report" / "results.json").read_text(encoding="utf-8"))
    trained, unseen = recipe.trained_tasks, recipe.unseen_tasks
    assert {block: list(tasks) for block, tasks in found["blocks"].items()} == {
        "train": trained, "test": trained, "unseen_zero_shot": unseen, "unseen_few_shot": unseen,
    }  # fmt: skip
    student, reference = found["students"]["gpt2"]["blocks"], found["references"]["nf4"]["blocks"]
    for block, tasks in found["blocks"].items():
        for task in tasks:
            names = list(get_task(task).metrics)
            assert (list(student[block][task]), list(reference[block][task])) == (names, names)
            for metric in names:
                for row in (student[block][task][metric]["rows"]["zero_shot"], reference[block][task][metric]):
                    assert row["n"] == ROWS
                    assert 0 <= row["interval"][0] <= row["mean"] <= row["interval"][1] <= 1
    described = {name for task in recipe.data.tasks for name in get_task(task).metrics}
    assert set(found["metrics"]) == described
    weighed = student["test"]["cosmos_qa"]["label_likelihood"]["rows"]["zero_shot"]
    assert weighed["unparsable"] == 0
    assert student["test"]["cosmos_qa"]["accuracy"]["rows"]["zero_shot"]["unparsable"] == ROWS  # random weights babble


def test_a_gold_answer_among_empty_ones_has_the_whole_score_in_every_metric(recipe_file):
    """Planted in the kept answers, and scored without a model: one right of five is exactly a fifth."""
    assert main(["--recipe", str(recipe_file)]) == 0  # generates nothing where the test above ran
    recipe = load_recipe(str(recipe_file))
    run_dir, planted = RunDir.of(recipe), {}
    for block in Blocks(recipe).scored:
        file = predictions.newest(run_dir, "gpt2", ZERO_SHOT, block.name)
        assert file is not None
        changed = []
        for task, examples in block.tasks.items():
            planted[block.name, task] = examples
            for i, example in enumerate(examples):
                weighed = tuple(float((label == example.answer) == (i == 0)) for label in example.labels) or None
                old = file.predictions[example.id]
                text = example.golds[0] if i == 0 else ""
                changed.append(replace(old, prediction=text, label_logprobs=weighed, too_long=False))
        predictions.save(file, changed, file.provenance)
    assert main(["--recipe", str(recipe_file), "--rescore"]) == 0
    found = json.loads((run_dir.report / "results.json").read_text(encoding="utf-8"))["students"]["gpt2"]["blocks"]
    seen = set()
    for (block, task), examples in planted.items():
        for metric, cells in found[block][task].items():
            row = cells["rows"][ZERO_SHOT]
            if metric in ("bleu", "chrf"):  # of a corpus, whose other sentences are missing
                scorer = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[metric]
                golds = [example.answer for example in examples]
                expected = scorer([golds[0], *[""] * (ROWS - 1)], [golds]).score / 100
                assert 0 < expected < 0.5
            else:
                expected = 1 / ROWS
            assert row["mean"] == pytest.approx(expected, abs=1e-6), (block, task, metric)
            seen.add(metric)
    assert seen == {name for task in recipe.data.tasks for name in get_task(task).metrics}
