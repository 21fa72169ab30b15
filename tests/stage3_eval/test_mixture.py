"""A mixture with references, unseen tasks, labels and repeats through the command line, on tiny random models."""

import json
import shutil

import pytest

from pipeline.cli import EXIT_INCOMPLETE
from pipeline.errors import ModelError, RunError
from stage3_eval import predictions
from stage3_eval.__main__ import main
from stage3_eval.blocks import UNSEEN_FEW_SHOT, Blocks
from stage3_eval.evaluate import ModelRun
from stage3_eval.predictions import prompt_digest
from stage3_eval.subject import Subject

TOO_LONG = "test/boolq-00001"


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """As many as the scored run was reported with."""
    monkeypatch.setattr("stage3_eval.compare._RESAMPLES", 200)


def results_of(run):
    return json.loads((run.folder / "report" / "results.json").read_text(encoding="utf-8"))


def kept(run, model, condition, block="test"):
    from pipeline.run_dir import RunDir

    return predictions.newest(RunDir(run.folder), model, condition, block)


def test_every_model_is_scored_on_every_block(scored_mixture):
    found = results_of(scored_mixture[0])
    assert found["blocks"]["test"] == {
        "boolq": {"examples": 4, "contexts_cut": 1},
        "squad": {"examples": 4, "contexts_cut": 0},
    }
    assert list(found["references"]) == ["small-t5", "other-gpt2"]
    assert list(found["students"]) == ["gpt2", "llama"]
    for of in [*found["references"].values(), *found["students"].values()]:
        assert {block: list(tasks) for block, tasks in of["blocks"].items()} == {
            "train": ["boolq", "squad"], "test": ["boolq", "squad"],
            "unseen_zero_shot": ["eng_spa"], "unseen_few_shot": ["eng_spa"],
        }  # fmt: skip
    for of in found["students"].values():
        for tasks in of["blocks"].values():
            for metrics in tasks.values():
                for cells in metrics.values():
                    assert list(cells["rows"]) == ["zero_shot", "sft", "uld"]
                    assert [row["seeds"] for row in cells["rows"].values()] == [0, 2, 2]
    assert set(found["metrics"]) == {"accuracy", "label_likelihood", "f1", "exact_match", "bleu", "chrf"}
    assert found["metrics"]["bleu"]["sacrebleu"]
    curve = found["students"]["gpt2"]["blocks"]["test"]["squad"]["f1"]["curve"]
    assert {arm: [row["step"] for row in rows] for arm, rows in curve.items()} == {"sft": [2, 4], "uld": [2, 4]}


def test_a_reference_that_is_the_student_scores_as_its_base_does(scored_mixture):
    """Two ways to the same numbers: the same weights, once as a reference, once as the untouched student."""
    found = results_of(scored_mixture[0])
    for block, tasks in found["references"]["other-gpt2"]["blocks"].items():
        for task, metrics in tasks.items():
            for metric, row in metrics.items():
                base = found["students"]["gpt2"]["blocks"][block][task][metric]["rows"]["zero_shot"]
                assert {key: base[key] for key in row} == row
    texts = [kept(scored_mixture[0], name, "zero_shot").predictions for name in ("other-gpt2", "gpt2")]
    assert texts[0] == texts[1]


def test_labels_are_weighed_as_whole_answers_after_their_prompt(scored_mixture):
    import torch

    from pipeline.models import load_causal_lm

    run, _ = scored_mixture
    recipe = run.recipe()
    subject, blocks = Subject(recipe, "gpt2"), Blocks(recipe)
    model = load_causal_lm(subject.source, "float32", "none", torch.device("cpu"))
    found = kept(run, "gpt2", "zero_shot").predictions
    for example in blocks.scored[1].tasks["boolq"]:
        if example.id == TOO_LONG:
            continue
        expected = []
        for label in ("no", "yes"):
            encoded = subject.prompts.encode(example.prompt, label)
            with torch.inference_mode():
                rows = model(input_ids=torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
            at = range(encoded.answer_start - 1, len(encoded.input_ids) - 1)
            expected.append(sum(float(rows[i, encoded.input_ids[i + 1]]) for i in at))
        assert found[example.id].label_logprobs == pytest.approx(expected, rel=1e-5)
    assert all(found[e.id].label_logprobs is None for e in blocks.scored[1].tasks["squad"])


def test_a_prompt_that_is_too_long_is_wrong_for_all_conditions_and_counted(scored_mixture):
    run, out = scored_mixture
    for condition in ("zero_shot", "sft@2", "sft@4", "sft~1@4", "uld@4", "uld~1@4"):
        found = kept(run, "gpt2", condition).predictions
        assert {i for i, p in found.items() if p.too_long} == {TOO_LONG}
        assert (found[TOO_LONG].prediction, found[TOO_LONG].tokens) == ("", 0)
    assert not any(p.too_long for p in kept(run, "small-t5", "zero_shot").predictions.values())  # it has no window
    found = results_of(run)
    row = found["students"]["gpt2"]["blocks"]["test"]["boolq"]["label_likelihood"]["rows"]["uld"]
    assert (row["too_long"], row["n"]) == (1, 4)
    assert found["students"]["gpt2"]["blocks"]["test"]["squad"]["f1"]["rows"]["uld"]["too_long"] == 0
    assert "gpt2: 1 of 8 prompts of uld@4 on test leave no room for an answer in a window of 512 tokens" in out


def test_worked_examples_stand_before_the_unseen_prompts_of_their_block(scored_mixture):
    run, _ = scored_mixture
    blocks = Blocks(run.recipe()).scored
    bare, shown = blocks[2], blocks[3]
    assert (shown.name, bare.examples) == (UNSEEN_FEW_SHOT, shown.examples)
    for model, condition in (("gpt2", "uld~1@4"), ("small-t5", "zero_shot")):
        for block in (bare, shown):
            found = kept(run, model, condition, block.name).predictions
            for example in block.examples:
                shots = shown.shots.of(example) if block is shown else ()
                assert found[example.id].prompt == prompt_digest(example, shots)
                assert len(shots) == (2 if block is shown else 0)
        both = [kept(run, model, condition, block.name).predictions for block in (bare, shown)]
        assert [p.prediction for p in both[0].values()] != [p.prediction for p in both[1].values()]


def test_a_second_call_generates_nothing_and_says_the_same(mixture, capsys, monkeypatch):
    first = results_of(mixture)
    monkeypatch.setattr(Subject, "load", lambda *_: pytest.fail("a model was loaded"))
    assert main(mixture.arguments) == 0
    out = capsys.readouterr().out
    for name in ("small-t5", "other-gpt2", "gpt2", "llama"):
        assert f"{name}: all " in out
    again = results_of(mixture)
    assert {**again, "provenance": None} == {**first, "provenance": None}
    report = mixture.folder / "report"
    assert (report / "table.md").read_text() in out
    assert "Best on test" not in out and "Best on test" in (report / "details.md").read_text()
    last = out.splitlines()[-12:]
    for name in ("results.json", "table.md", "details.md", "differences-unseen_few_shot.png", "loss-llama.png"):
        assert any(line.endswith(str(report / name)) for line in last)


def test_rescoring_needs_no_model(mixture):
    first = results_of(mixture)
    gone = [f"{section}.model=/gone" for section in ("students.gpt2", "students.llama", "eval.references.small-t5")]
    shutil.rmtree(mixture.folder / "students")
    assert main([*mixture.sets(*gone), "--rescore"]) == 0
    assert results_of(mixture)["students"] == first["students"]
    shutil.rmtree(mixture.folder / "predictions" / "small-t5")
    with pytest.raises(RunError, match="--rescore: small-t5 has no predictions under"):
        main([*mixture.sets(*gone), "--rescore"])


def test_answers_from_before_labels_were_weighed_are_generated_again(mixture, capsys):
    from dataclasses import replace

    file = kept(mixture, "gpt2", "uld@4")
    stripped = [replace(p, label_logprobs=None) for p in file.predictions.values()]
    predictions.save(file, stripped, file.provenance)
    assert main(mixture.arguments) == 0
    assert "gpt2: 176 of 180 answers are there; the other 4 are generated by hf" in capsys.readouterr().out
    assert kept(mixture, "gpt2", "uld@4").predictions == file.predictions


def test_one_student_alone(mixture, capsys):
    shutil.rmtree(mixture.folder / "predictions")
    assert main([*mixture.arguments, "--student", "llama"]) == 0
    out = capsys.readouterr().out
    for name in ("small-t5", "other-gpt2", "gpt2"):
        assert f"{name}: not asked for, and some of its answers are missing; it is left out of the report" in out
    found = results_of(mixture)
    assert (list(found["students"]), found["references"]) == (["llama"], {})


def test_a_metric_that_cannot_be_computed_stops_before_anything_is_generated(mixture, monkeypatch):
    shutil.rmtree(mixture.folder / "predictions")
    monkeypatch.setattr("stage3_eval.metrics.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"sacrebleu is not installed here; pip install 'logitbank\[metrics\]'"):
        main(mixture.arguments)
    assert not (mixture.folder / "predictions").exists()


def test_a_model_that_is_not_there_is_named_by_its_key_before_anything_is_generated(mixture):
    shutil.rmtree(mixture.folder / "predictions")
    with pytest.raises(ModelError, match=r"^eval\.references\.other-gpt2: model /gone: no such folder"):
        main(mixture.sets("eval.references.other-gpt2.model=/gone"))
    with pytest.raises(ModelError, match=r"^students\.llama: model /gone: no such folder"):
        main(mixture.sets("students.llama.model=/gone"))
    assert not (mixture.folder / "predictions").exists()


def test_a_report_before_the_first_checkpoint(mixture, capsys):
    """No baseline is asked for and nothing is trained: the references stand alone."""
    shutil.rmtree(mixture.folder / "students")
    assert main(mixture.sets("eval.baselines=[]")) == EXIT_INCOMPLETE
    out = capsys.readouterr().out
    assert "gpt2/sft: no checkpoint yet" in out
    assert "| small-t5 " in out and "differences in points" not in out


def test_references_free_their_memory_before_the_next_model_is_loaded(mixture, monkeypatch):
    shutil.rmtree(mixture.folder / "predictions")
    loaded, load = [], Subject.load

    def counting(self, longest, adapters):
        assert all(engine.closed for engine in loaded)
        engine = load(self, longest, adapters)
        close = engine.close
        engine.closed = False

        def closing():
            close()
            engine.closed = True

        engine.close = closing
        loaded.append(engine)
        return engine

    monkeypatch.setattr(Subject, "load", counting)
    recipe = mixture.recipe("eval.max_new_tokens=2")
    for name in recipe.eval.references:
        ModelRun(recipe, name, Blocks(recipe)).evaluate()
    assert [engine.closed for engine in loaded] == [True, True]


def test_the_teachers_worked_examples_are_shown_for_trained_tasks_alone(mixture):
    recipe = mixture.recipe(
        "teacher.shots=1", "eval.baselines=[zero_shot, few_shot]", "eval.max_new_tokens=2", "data.eval_limit=4"
    )
    found = ModelRun(recipe, "gpt2", Blocks(recipe)).evaluate()
    blocks = {
        name: [block for condition, block in found.files if condition == name] for name in ("zero_shot", "few_shot")
    }
    assert blocks["few_shot"] == ["train", "test"]
    assert blocks["zero_shot"] == ["train", "test", "unseen_zero_shot", "unseen_few_shot"]
    for example in Blocks(recipe).scored[1].examples:
        shots = Blocks(recipe).training_set.shots.of(example)
        assert len(shots) == 1
        assert found.answers("few_shot", "test")[example.id].prompt == prompt_digest(example, shots)
