"""What is generated, what is found again, and what a checkpoint is chosen on. The engine counts what it is asked."""

import json
import shutil

import pytest
import toys
from toy_adapters import write_checkpoint

from pipeline.errors import RunError
from pipeline.run_dir import RunDir
from pipeline.tasks import Example
from stage3_eval import evaluate
from stage3_eval.blocks import Blocks, first_of_each
from stage3_eval.evaluate import ModelRun
from stage3_eval.generate.hf import HFEngine
from stage3_eval.subject import Subject


class Counting(HFEngine):
    """The real engine, which remembers how many prompts it answered with which adapter."""

    asked: list

    def generate(self, prompts, adapter, max_new_tokens, end_id):
        self.asked.append((adapter and f"{adapter.parent.parent.name}@{int(adapter.name[5:])}", len(prompts)))
        return super().generate(prompts, adapter, max_new_tokens, end_id)


@pytest.fixture
def asked(monkeypatch) -> list:
    """Prompts answered, as (adapter, count), in order."""
    counted: list = []
    load = Subject.load

    def counting(self, longest, adapters):
        engine = load(self, longest, adapters)
        if isinstance(engine, HFEngine):
            engine.__class__ = Counting
            engine.asked = counted
        return engine

    monkeypatch.setattr(Subject, "load", counting)
    return counted


def totals(asked) -> dict:
    found: dict = {}
    for adapter, count in asked:
        found[adapter] = found.get(adapter, 0) + count
    return found


def student_run(recipe, rescore=False):
    return ModelRun(recipe, "toy", Blocks(recipe), ["--recipe", "tiny"], rescore)


def evaluated(run, *overrides, rescore=False):
    return student_run(run.recipe(*overrides), rescore).evaluate()


def answers(found) -> dict:
    """(condition, block) -> id -> prediction."""
    return {key: file.predictions for key, file in found.files.items()}


def test_every_condition_answers_every_example_once(run, asked):
    found = evaluated(run)
    assert totals(asked) == {None: 16, "sft@2": 8, "sft@4": 8, "distill@2": 8, "distill@4": 8}
    assert found.headline == {"sft": 4, "distill": 4}
    assert {key for key, of in answers(found).items() if len(of) == 8} == {
        (name, "test") for name in ("zero_shot", "few_shot", "sft@2", "sft@4", "distill@2", "distill@4")
    }
    texts = {name: [p.prediction for p in of.values()] for (name, _), of in answers(found).items()}
    assert len({tuple(text) for text in texts.values()}) == 6  # six conditions, six different sets of answers


def test_what_is_there_is_not_generated_again_and_no_model_is_loaded(run, monkeypatch, capsys):
    first = evaluated(run)
    monkeypatch.setattr(Subject, "load", lambda *_: pytest.fail("a model was loaded"))
    again = evaluated(run)
    assert answers(again) == answers(first)
    assert "all 48 answers are there; no model is loaded" in capsys.readouterr().out


def test_the_curve_is_scored_on_the_first_examples_and_extended_later(run, asked):
    short = evaluated(run, "eval.curve_limit=3")
    assert totals(asked) == {None: 16, "sft@4": 8, "distill@4": 8, "sft@2": 3, "distill@2": 3}
    assert sorted(short.answers("sft@2", "test")) == [f"test/gsm8k-{i:05d}" for i in range(3)]
    before = dict(short.answers("sft@2", "test"))
    asked.clear()
    whole = evaluated(run, "eval.curve_limit=8")
    assert totals(asked) == {"sft@2": 5, "distill@2": 5}
    assert before.items() <= whole.answers("sft@2", "test").items()
    asked.clear()
    evaluated(run, "eval.curve_limit=5")
    assert asked == []


def test_another_adapter_makes_its_predictions_stale(run, asked):
    old = evaluated(run).answers("sft@2", "test")
    asked.clear()
    checkpoint = RunDir.of(run.recipe()).arm("toy", "sft").checkpoint(2)
    shutil.rmtree(checkpoint)
    write_checkpoint(RunDir.of(run.recipe()), "sft", 2, run.model, seed=99)
    new = evaluated(run).answers("sft@2", "test")
    assert totals(asked) == {"sft@2": 8}
    assert old != new


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("teacher.shot_seed=5", {None: 8}),  # the worked examples stand before the few-shot prompts alone
        ("teacher.shots=1", {None: 8}),
        ("eval.max_new_tokens=5", {None: 16, "sft@2": 8, "sft@4": 8, "distill@2": 8, "distill@4": 8}),
        ("eval.batch_size=3", {}),
        ("data.eval_limit=4", {}),
        ("train.micro_batch_size=4", {}),
    ],
)
def test_only_what_changes_a_text_makes_it_stale(run, asked, override, expected):
    evaluated(run)
    asked.clear()
    evaluated(run, override)
    assert totals(asked) == expected


def test_a_changed_question_is_answered_again(run, asked, tmp_path):
    data = tmp_path / "data"
    rows = toys.rows(8, start=100)
    toys.write_jsonl(data / "gsm8k" / "train.jsonl", toys.rows(24))
    toys.write_jsonl(data / "gsm8k" / "test.jsonl", rows)
    evaluated(run, f"data.dir={data}", "eval.baselines=[zero_shot]")
    asked.clear()
    rows[2]["question"] = "How many are two and two?"
    toys.write_jsonl(data / "gsm8k" / "test.jsonl", rows)
    evaluated(run, f"data.dir={data}", "eval.baselines=[zero_shot]")
    assert totals(asked) == {None: 1, "sft@2": 1, "sft@4": 1, "distill@2": 1, "distill@4": 1}


def test_an_interrupted_run_keeps_what_it_finished(run, asked, monkeypatch):
    real = HFEngine.generate

    def dies(self, prompts, adapter, *rest):
        if adapter is not None and adapter.name == "step-000002":
            raise KeyboardInterrupt
        return real(self, prompts, adapter, *rest)

    monkeypatch.setattr(HFEngine, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run)
    monkeypatch.setattr(HFEngine, "generate", real)
    asked.clear()
    evaluated(run)
    assert totals(asked) == {"sft@2": 8, "distill@2": 8}


def test_a_checkpoint_is_chosen_on_held_out_rows_and_never_on_test(run, asked, monkeypatch):
    """The scores are decided here: on held-out rows step 2 wins, on test step 4 would."""
    seen = []

    def decided(recipe, block, answers, where):
        seen.extend(example.id for example in block.examples)
        return {"sft@2": 0.5, "sft@4": 0.5, "distill@2": 0.1, "distill@4": 0.9}[where]

    monkeypatch.setattr(evaluate, "first_metric_mean", decided)
    found = evaluated(run, "eval.select=held_out", "data.held_out=6", "eval.curve_limit=3")
    assert found.headline == {"sft": 2, "distill": 4}  # of equals the earliest
    held_out = {e.id for e in Blocks(run.recipe("data.held_out=6")).held_out.examples}
    assert set(seen) == held_out
    assert len(held_out) == 6
    assert all(i.startswith("train/") for i in held_out)
    assert totals(asked) == {None: 16, "sft@2": 6 + 8, "sft@4": 6 + 3, "distill@2": 6 + 3, "distill@4": 6 + 8}
    assert found.held_out["distill"] == {2: 0.1, 4: 0.9}


def test_each_repeat_chooses_its_own_checkpoint(run, asked, monkeypatch):
    for arm, seed in (("sft", 50), ("distill", 60)):
        for step in (2, 4):
            write_checkpoint(RunDir.of(run.recipe()), f"{arm}~1", step, run.model, seed + step)
    scores = {"sft@2": 0.5, "sft@4": 0.6, "distill@2": 0.7, "distill@4": 0.1, "sft~1@2": 0.9, "sft~1@4": 0.2}
    monkeypatch.setattr(evaluate, "first_metric_mean", lambda *args: scores.get(args[-1], 0.3))
    found = evaluated(run, "train.repeats=2", "eval.select=held_out", "data.held_out=6", "eval.curve_limit=3")
    assert found.headline == {"sft": 4, "sft~1": 2, "distill": 2, "distill~1": 2}
    assert [(r.name, r.arm, r.is_first) for r in found.runs] == [
        ("sft", "sft", True), ("sft~1", "sft", False), ("distill", "distill", True), ("distill~1", "distill", False),
    ]  # fmt: skip
    assert totals(asked) == {
        None: 16, "sft@2": 6 + 3, "sft@4": 6 + 8, "distill@2": 6 + 8, "distill@4": 6 + 3,
        "sft~1@2": 6 + 8, "sft~1@4": 6, "distill~1@2": 6 + 8, "distill~1@4": 6,
    }  # fmt: skip
    again = evaluated(
        run, "train.repeats=2", "eval.select=held_out", "data.held_out=6", "eval.curve_limit=3", rescore=True
    )
    assert (again.headline, answers(again)) == (found.headline, answers(found))


def test_repeats_that_are_not_trained_yet_are_said(run):
    write_checkpoint(RunDir.of(run.recipe()), "sft~1", 2, run.model, 50)
    student = student_run(run.recipe("train.repeats=2"))
    assert [found.name for found in student.runs] == ["sft", "sft~1", "distill"]
    assert [f"{name}: {why}" for name, why in student.missing.items()] == [
        "sft~1: trained to step 2 of 4 so far; to go on: python -m stage2_student --recipe tiny",
        "distill~1: no checkpoint yet; to train it: python -m stage2_student --recipe tiny",
    ]


def test_a_repeat_trained_with_another_seed_is_refused(run):
    recipe = run.recipe("train.repeats=2")
    for seed, name in ((0, "sft"), (1, "sft~1")):
        write_checkpoint(RunDir.of(recipe), name, 4, run.model, 50)
        settings = recipe.train.model_copy(update={"seed": seed}).model_dump(mode="json", exclude={"repeats"})
        RunDir.of(recipe).arm("toy", name).identity.write_text(json.dumps({"train": settings}))
    assert len(student_run(recipe).runs) == 3
    settings["seed"] = 7
    RunDir.of(recipe).arm("toy", "sft~1").identity.write_text(json.dumps({"train": settings}))
    with pytest.raises(RunError, match=r"sft~1 holds(.|\n)*train.seed: trained with 7, the recipe says 1"):
        student_run(recipe)


def test_a_checkpoint_is_chosen_by_the_first_metric_and_no_other_is_computed(run, monkeypatch):
    """BERTScore or the programs' sandbox would be paid for at every checkpoint, and not looked at."""
    measured = []
    real = evaluate.score

    def watched(*args):
        found = real(*args)
        measured.extend(found.measured)
        return found

    monkeypatch.setattr(evaluate, "score", watched)
    evaluated(run, "eval.select=held_out", "data.held_out=6")
    assert set(measured) == {"strict"}


def test_held_out_accuracy_is_the_first_metric_of_the_held_out_answers(run):
    found = evaluated(run, "eval.select=held_out", "data.held_out=6")
    assert set(found.held_out["sft"]) == {2, 4}
    assert all(0.0 <= value <= 1.0 for steps in found.held_out.values() for value in steps.values())
    assert len(found.answers("sft@2", "held_out")) == 6


def test_the_curve_keeps_each_tasks_share():
    examples = tuple(Example(f"test/{task}{i}", task, "?", "!") for task, n in (("a", 8), ("b", 4)) for i in range(n))
    assert [e.id for e in first_of_each(examples, 6)] == [
        "test/a0", "test/a1", "test/a2", "test/a3", "test/b0", "test/b1",
    ]  # fmt: skip
    assert first_of_each(examples, None) == first_of_each(examples, 12) == examples


def test_rescoring_needs_neither_model_nor_checkpoints(run, tmp_path, asked):
    first = evaluated(run)
    asked.clear()
    shutil.rmtree(run.folder / "students")
    missing = f"students.toy.model={tmp_path / 'gone'}"
    found = evaluated(run, missing, rescore=True)
    assert asked == []
    assert answers(found) == answers(first)
    assert found.headline == {"sft": 4, "distill": 4}


def test_rescoring_says_what_is_missing(run):
    with pytest.raises(RunError, match="--rescore: toy has no predictions"):
        evaluated(run, rescore=True)
    evaluated(run, "eval.curve_limit=3")
    with pytest.raises(RunError, match=r"toy/sft@2 lacks 5 of 8 predictions on test .* without --rescore"):
        evaluated(run, rescore=True)
    with pytest.raises(RunError, match=r"toy/zero_shot has no predictions on validation"):
        evaluated(run, "eval.splits=[validation]", f"data.dir={validation_rows(run)}", rescore=True)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("eval.max_new_tokens=3", "max_new_tokens': 16}, the recipe says {'kind': 'greedy', 'max_new_tokens': 3}"),
        ("eval.engine=vllm", "engine: made with hf, the recipe says vllm"),
        ("students.toy.dtype=bfloat16", "dtype: made with float32, the recipe says bfloat16"),
    ],
)
def test_rescoring_refuses_predictions_made_with_other_settings(run, override, said):
    """Old answers under a new recipe's name would be a false report."""
    evaluated(run, "eval.baselines=[zero_shot]")
    with pytest.raises(RunError) as refused:
        evaluated(run, "eval.baselines=[zero_shot]", override, rescore=True)
    assert said in str(refused.value)
    assert "without --rescore" in str(refused.value)


def test_rescoring_refuses_arms_trained_with_other_settings_and_says_what_they_were_trained_with(run):
    recipe = run.recipe()
    evaluated(run)
    for arm in ("sft", "distill"):
        record = {"cache": "f" * 64, "train": recipe.train.model_dump(mode="json", exclude={"micro_batch_size"})}
        RunDir.of(recipe).arm("toy", arm).identity.write_text(json.dumps(record))
    assert [found.trained_with["cache"] for found in evaluated(run, rescore=True).runs] == ["f" * 64] * 2
    with pytest.raises(RunError, match=r"train.lr: trained with 0.001, the recipe says 0.5"):
        evaluated(run, "train.lr=0.5", rescore=True)


def test_rescoring_refuses_predictions_of_an_adapter_that_was_trained_again(run):
    evaluated(run)
    state = RunDir(run.folder).arm("toy", "sft").checkpoint(2) / "state.json"
    state.write_text(json.dumps({"step": 2, "adapter_sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(RunError, match=r"--rescore: the kept predictions of toy/sft@2 are those of another adapter"):
        evaluated(run, rescore=True)


def validation_rows(run):
    data = run.folder.parent / "data"
    for split in ("train", "validation"):
        toys.write_jsonl(data / "gsm8k" / f"{split}.jsonl", toys.rows(24))
    return data


def test_arms_without_checkpoints_are_said_with_the_command(run):
    shutil.rmtree(run.folder / "students" / "toy" / "distill")
    shutil.rmtree(RunDir.of(run.recipe()).arm("toy", "sft").checkpoint(4))
    student = student_run(run.recipe())
    assert [arm.name for arm in student.runs] == ["sft"]
    assert [f"{name}: {why}" for name, why in student.missing.items()] == [
        "sft: trained to step 2 of 4 so far; to go on: python -m stage2_student --recipe tiny",
        "distill: no checkpoint yet; to train it: python -m stage2_student --recipe tiny",
    ]


def test_a_checkpoint_still_being_written_is_not_seen(run):
    arm = RunDir.of(run.recipe()).arm("toy", "sft")
    (arm.checkpoint(4) / "state.json").unlink()
    student = student_run(run.recipe())
    assert list(student.runs[0].checkpoints) == [2]


def test_an_arm_trained_with_other_settings_is_refused(run):
    identity = RunDir.of(run.recipe()).arm("toy", "sft").identity
    recipe = run.recipe()
    identity.write_text(
        json.dumps(
            {
                "cache": "f" * 64,
                "train": recipe.train.model_dump(mode="json", exclude={"micro_batch_size"}),
                "losses": {"ce": 1.0, "logit_mse": 0.0, "kl": 0.0},
                "student": {"dtype": "float32", "lora": recipe.students["toy"].lora.model_dump(mode="json")},
            }
        )
    )
    assert student_run(recipe).runs[0].trained_with["cache"] == "f" * 64
    with pytest.raises(RunError, match=r"train.lr: trained with 0.001, the recipe says 0.5"):
        student_run(run.recipe("train.lr=0.5"))
    with pytest.raises(RunError, match=r"arms.sft.ce: trained with 1.0, the recipe says 2.0"):
        student_run(run.recipe("arms.sft.ce=2.0"))
    with pytest.raises(RunError, match=r"students.toy.alpha: trained with 8, the recipe says 9"):
        student_run(run.recipe("students.toy.lora.alpha=9"))


@pytest.mark.parametrize("record", [{"student": 3}, {"student": {"lora": []}}, {"train": None}, {"losses": "ce"}])
def test_an_arm_file_that_is_none_is_named(run, record):
    identity = RunDir.of(run.recipe()).arm("toy", "sft").identity
    identity.write_text(json.dumps(record))
    with pytest.raises(RunError, match=rf"{identity}: expected a JSON object under '\w+', found .*; restore"):
        student_run(run.recipe())


def test_an_arm_trained_on_other_weights_is_refused(run, tmp_path):
    from pipeline.models import locate

    identity = RunDir.of(run.recipe()).arm("toy", "sft").identity
    identity.write_text(json.dumps({"student": {"weights": locate(str(run.model)).identity()}}))
    evaluated(run, "eval.max_new_tokens=1")
    other = tmp_path / "other"
    toys.tiny_qwen3(other, seed=5)
    toys.tiny_tokenizer(other)
    with pytest.raises(RunError, match="toy/sft was trained on other weights"):
        evaluated(run, f"students.toy.model={other}")


def test_a_damaged_adapter_is_not_scored(run):
    adapter = RunDir.of(run.recipe()).arm("toy", "sft").checkpoint(4) / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x00")
    found = evaluated(run)
    assert list(found.missing) == ["sft@4"] and "it is not what was written" in found.missing["sft@4"]
    assert found.headline == {"sft": 2, "distill": 4} and ("sft@4", "test") not in found.files


@pytest.mark.parametrize("content", ["", "[]", '{"step": 4}', '{"step": 3, "adapter_sha256": "ab"}'])
def test_a_checkpoint_with_a_damaged_state_is_left_out_and_named(run, content):
    (RunDir.of(run.recipe()).arm("toy", "sft").checkpoint(4) / "state.json").write_text(content)
    found = evaluated(run)
    assert list(found.missing) == ["sft@4", "sft"] and "state.json" in found.missing["sft@4"]
    assert found.headline == {"sft": 2, "distill": 4}


def test_prompts_longer_than_the_window_are_refused(run):
    with pytest.raises(RunError, match=r"the model reads 512\s*at most"):
        evaluated(run, "eval.max_new_tokens=500")


@pytest.mark.parametrize("place", ["students", "students/toy", "students/toy/sft/checkpoints"])
def test_a_file_in_place_of_a_folder_is_said(run, place):
    shutil.rmtree(run.folder / place)
    (run.folder / place).write_text("")
    with pytest.raises(RunError, match="found a file, expected a folder"):
        student_run(run.recipe())
