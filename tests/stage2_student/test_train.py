"""The loop on toys: what it leaves, what it resumes from, and what it refuses."""

import fcntl
import json
import math
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import toys
from safetensors import safe_open

from cache_schema.errors import FingerprintMismatch, IncompleteCache, NotACache
from pipeline.cli import EXIT_INCOMPLETE
from pipeline.errors import ModelError, RecipeError, RunError
from pipeline.fingerprint import Experiment
from pipeline.recipe import Recipe, load_recipe
from pipeline.run_dir import RunDir
from pipeline.sections import Train
from stage2_student.__main__ import main
from stage2_student.arms import claimed, plan
from stage2_student.checkpoint import complete_steps
from stage2_student.group import Group
from stage2_student.student import Student
from stage2_student.train import learning_rate, train


def made(tmp_path: Path, **overrides: Any) -> tuple[str, Recipe]:
    """A recipe with its cache; the recipe's path and content."""
    path = str(toys.tiny_recipe(tmp_path, **overrides))
    recipe = load_recipe(path)
    if not Path(str(recipe.cache.dir)).exists():
        toys.fill_cache(recipe)
    return path, recipe


def metrics(recipe: Recipe, arm: str) -> list[dict[str, float]]:
    """The lines of one arm, without what a clock decides."""
    lines = RunDir.of(recipe).arm("toy", arm).metrics.read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]


def adapter(recipe: Recipe, arm: str, step: int) -> bytes:
    return (RunDir.of(recipe).arm("toy", arm).checkpoint(step) / "adapter_model.safetensors").read_bytes()


def test_what_a_run_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, recipe = made(tmp_path, train={"steps": 5, "save_every": 2}, arms={"kl": {"kl": 1.0}})
    assert main(["--recipe", path]) == 0
    for arm, components in (("sft", {"ce"}), ("distill", {"ce", "logit_mse"}), ("kl", {"kl"})):
        folder = RunDir.of(recipe).arm("toy", arm)
        assert complete_steps(folder.checkpoints) == [2, 4, 5]  # every save_every, and the last
        assert sorted(p.name for p in folder.checkpoint(5).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "optimizer.safetensors",
            "state.json",
        ]
        lines = metrics(recipe, arm)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
        assert components <= lines[0].keys() and not {"ce", "logit_mse", "kl"} - components & lines[0].keys()
        weights = recipe.arms[arm]
        for line in lines:
            assert line["loss"] == pytest.approx(sum(getattr(weights, c) * line[c] for c in components))
        assert list(folder.tensorboard.glob("events*"))
    assert metrics(recipe, "sft")[0]["ce"] == metrics(recipe, "distill")[0]["ce"]  # the same start, the same batch
    assert metrics(recipe, "sft")[4]["ce"] != metrics(recipe, "distill")[4]["ce"]
    capsys.readouterr()
    assert main(["--recipe", path, "--arm", "sft"]) == 0
    assert capsys.readouterr().out == f"toy/sft: done (5 steps) {RunDir.of(recipe).arm('toy', 'sft').root}\n"


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    path, recipe = made(tmp_path, train={"steps": 60, "save_every": 60, "lr": 1e-2})
    assert main(["--recipe", path]) == 0
    for arm in ("sft", "distill"):
        lines = metrics(recipe, arm)
        assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_peft_loads_the_adapter(tmp_path: Path) -> None:
    """What the loop saved is what peft reads back."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path, recipe = made(tmp_path)
    assert main(["--recipe", path, "--arm", "sft"]) == 0
    folder = RunDir.of(recipe).arm("toy", "sft").checkpoint(4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = PeftModel.from_pretrained(base, str(folder))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            module, _, kind = name.removesuffix(".weight").rpartition(".")
            found = loaded.get_submodule(module).get_submodule(f"{kind}.default").weight
            assert torch.equal(found, file.get_tensor(name))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")


def test_resuming_ends_at_the_same_bytes(tmp_path: Path) -> None:
    """A run cut off after its second checkpoint, half a line and half a checkpoint later, with dropout."""
    path, recipe = made(
        tmp_path,
        students={"toy": {"lora": {"dropout": 0.2}}},
        train={"steps": 7, "save_every": 2, "weight_decay": 0.1},
    )
    assert main(["--recipe", path, "--arm", "distill"]) == 0
    expected, expected_metrics = adapter(recipe, "distill", 7), metrics(recipe, "distill")
    folder = RunDir.of(recipe).arm("toy", "distill")
    shutil.rmtree(folder.checkpoint(7))
    shutil.rmtree(folder.checkpoint(6))
    half = folder.checkpoints / ".tmp-step-000006-1"
    half.mkdir()
    (half / "state.json").write_text("{}")
    (folder.root / ".tmp-metrics.jsonl-1").write_text("{}")
    with folder.metrics.open("a") as file:
        file.write('{"step": 8, "lo')
    assert main(["--recipe", path, "--arm", "distill"]) == 0
    assert adapter(recipe, "distill", 7) == expected
    assert metrics(recipe, "distill") == expected_metrics
    assert not list(folder.root.rglob(".tmp-*"))


@pytest.mark.parametrize("victim", ["adapter_model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, victim: str) -> None:
    path, recipe = made(tmp_path)
    assert main(["--recipe", path, "--arm", "sft"]) == 0
    folder = RunDir.of(recipe).arm("toy", "sft")
    shutil.rmtree(folder.checkpoint(4))
    content = bytearray((folder.checkpoint(2) / victim).read_bytes())
    content[-20] ^= 1
    (folder.checkpoint(2) / victim).write_bytes(content if victim != "state.json" else b"{}")
    with pytest.raises(RunError, match=r"checkpoint .*step-000002 cannot be used: [\s\S]*rm -r .*step-000002"):
        main(["--recipe", path, "--arm", "sft"])


def test_other_settings_are_never_mixed(tmp_path: Path) -> None:
    path, recipe = made(tmp_path)
    assert main(["--recipe", path]) == 0
    for override, line in (
        ("train.lr=0.002", "train.lr: trained with 0.001, now asked for 0.002"),
        ("students.toy.lora.r=8", "student.lora.r: trained with 4, now asked for 8"),
        ("arms.distill.logit_mse=0.25", "losses.logit_mse: trained with 0.5, now asked for 0.25"),
    ):
        with pytest.raises(RunError) as error:
            main(["--recipe", path, "--arm", "distill", "--set", override])
        assert line in str(error.value)
        assert "--set run_dir=<folder>" in str(error.value)
        assert f"rm -r {RunDir.of(recipe).arm('toy', 'distill').root}" in str(error.value)
    assert main(["--recipe", path, "--set", "train.micro_batch_size=1", "--set", "runtime.processes=2"]) == 0
    shutil.rmtree(RunDir.of(recipe).arm("toy", "distill").root)
    assert main(["--recipe", path, "--arm", "distill", "--set", "train.lr=0.002"]) == 0


def test_an_arm_is_named_by_what_decides_it_and_nothing_else(tmp_path: Path) -> None:
    """A key that an arm does not use is not in its identity, so a run that was begun before the key was known goes on;
    repeats and alignment can be changed where they change nothing."""
    path, recipe = made(
        tmp_path, cache={"temperatures": [1.0, 1.2]}, arms={"distill": None, "uld": {"uld": 1.0, "temperature": 1.2}}
    )
    assert main(["--recipe", path]) == 0
    arms = [
        json.loads(RunDir.of(recipe).arm("toy", arm).identity.read_text(encoding="utf-8")) for arm in ("sft", "uld")
    ]
    assert arms[0]["losses"] == {"ce": 1.0, "logit_mse": 0.0, "kl": 0.0}
    assert arms[1]["losses"] == {
        "ce": 0.0,
        "logit_mse": 0.0,
        "kl": 0.0,
        "temperature": 1.2,
        "uld": 1.0,
        "alignment": "boundary",
        "alignment_version": 1,
    }
    settings = "steps batch_size lr warmup_steps schedule weight_decay max_grad_norm save_every seed"
    assert arms[0]["train"] == arms[1]["train"] and list(arms[0]["train"]) == settings.split()
    by_index = ["--recipe", path, "--set", "train.alignment=index"]
    assert main([*by_index, "--arm", "sft"]) == 0
    with pytest.raises(RunError, match=r'losses\.alignment: trained with "boundary", now asked for "index"'):
        main(by_index)
    assert main([*by_index, "--set", "arms.uld.alignment=boundary"]) == 0


def test_an_arm_that_cannot_be_trained_does_not_keep_the_others_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three students one has another tokenizer, which sft does not mind, and one a target that does not exist. All
    that can be trained is; the end names the others, each with its reason and its command."""
    toys.tiny_tokenizer(tmp_path / "other", vocab_size=300)
    toys.tiny_qwen3(tmp_path / "other")
    lora = {"r": 4, "alpha": 8}
    path, recipe = made(
        tmp_path,
        students={
            "alien": {"model": str(tmp_path / "other"), "dtype": "float32", "lora": lora},
            "bent": {"model": str(tmp_path / "model"), "dtype": "float32", "lora": lora | {"targets": ["q_prj"]}},
            "last": {"model": str(tmp_path / "model"), "dtype": "float32", "lora": lora},
        },
    )
    assert main(["--recipe", path]) == EXIT_INCOMPLETE
    said = capsys.readouterr().err
    report = said[said.index("error: 3 of 8 arms failed; the others are trained:\n") :]
    for line in (
        r"- alien/distill: the student's tokenizer .* is not the one that the cache was made with",
        r"- bent/sft: lora.targets: unknown module 'q_prj'. Did you mean 'q_proj'",
        r"- bent/distill: lora.targets: unknown module",
    ):
        assert re.search(line, report), line
    commands = [line.strip() for line in report.splitlines() if line.startswith("  python -m")]
    for name, arm in (("alien", "distill"), ("bent", "sft"), ("bent", "distill")):
        assert f"python -m stage2_student --recipe {path} --student {name} --arm {arm}" in commands
    run = RunDir.of(recipe)
    trained = {
        (name, arm) for name in recipe.students for arm in recipe.arms if run.arm(name, arm).checkpoint(4).is_dir()
    }
    assert trained == {("toy", "sft"), ("toy", "distill"), ("alien", "sft"), ("last", "sft"), ("last", "distill")}
    before = {arm: adapter(recipe, arm, 4) for arm in recipe.arms}
    (tmp_path / "alone").mkdir()
    alone = ["--recipe", path, "--student", "toy", "--set", f"run_dir={tmp_path / 'alone'}"]
    assert main(alone) == 0  # the oracle: an arm trained behind one that failed is the same to the bit
    other = load_recipe(path, alone[5:])
    assert {arm: adapter(other, arm, 4) for arm in recipe.arms} == before
    # Again, with one arm left of the two that are asked for: the same. One arm asked for: its own error.
    assert main(["--recipe", path, "--student", "alien"]) == EXIT_INCOMPLETE
    assert "error: 1 of 1 arms failed:\n- alien/distill: " in capsys.readouterr().err
    with pytest.raises(ModelError, match="is not the one that the cache was made with"):
        main(["--recipe", path, "--student", "alien", "--arm", "distill"])


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory: 99 GB"), MemoryError(), OSError(5, "bad")])
def test_an_arm_alone_that_the_machine_fails_is_incomplete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """No mistake of the user's, so the report with its command, and not exit code 2 or a bare traceback."""

    def backward(*_: Any) -> None:
        raise error

    path, _ = made(tmp_path)
    monkeypatch.setattr(Student, "backward", backward)
    assert main(["--recipe", path, "--arm", "sft"]) == EXIT_INCOMPLETE
    said = capsys.readouterr().err
    assert f"error: 1 of 1 arms failed:\n- toy/sft: {type(error).__name__}: {error}\nto try those again:\n" in said


def test_a_damaged_page_or_a_loss_that_is_not_finite_stops_its_own_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page of numbers that sft does not read is damaged; one student has a NaN for a question mark."""
    tokenizer = toys.tiny_tokenizer(tmp_path / "broken")
    toys.tiny_qwen3(tmp_path / "broken", tie_word_embeddings=False)
    poison(tmp_path / "broken" / "model.safetensors", tokenizer("?", add_special_tokens=False)["input_ids"][-1])
    broken = {"model": str(tmp_path / "broken"), "dtype": "float32", "lora": {"r": 4, "alpha": 8}}
    sound = broken | {"model": str(tmp_path / "model")}
    path, recipe = made(tmp_path, students={"toy": None, "broken": broken, "sound": sound})
    shard = sorted((tmp_path / "cache" / "shards").glob("00001-*.parquet"))[0]
    group = pyarrow.parquet.read_metadata(shard).row_group(0)
    columns = (group.column(i) for i in range(group.num_columns))
    at = next(c.data_page_offset for c in columns if c.path_in_schema.startswith("slots"))
    content = bytearray(shard.read_bytes())
    content[at + 60] ^= 1
    shard.write_bytes(content)
    assert main(["--recipe", path]) == EXIT_INCOMPLETE
    said = capsys.readouterr().err
    report = said[said.index("error: 3 of 4 arms failed; the others are trained:") :]
    assert re.search(r"- broken/sft: broken/sft, step 1: ce nan, gradient norm nan are not finite", report)
    assert "- sound/distill: shard 1 of the cache is not usable" in report
    assert RunDir.of(recipe).arm("sound", "sft").checkpoint(4).is_dir()


def test_an_encoder_decoder_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    toys.tiny_t5(tmp_path / "t5")
    toys.tiny_tokenizer(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"students\.toy\.model .* is an encoder-decoder \(t5\)"):
        main(["--recipe", path, "--set", f"students.toy.model={tmp_path / 't5'}"])


def test_checkpoints_without_an_arm_file_are_refused(tmp_path: Path) -> None:
    path, recipe = made(tmp_path)
    assert main(["--recipe", path, "--arm", "sft"]) == 0
    RunDir.of(recipe).arm("toy", "sft").identity.unlink()
    with pytest.raises(RunError, match=r"it has checkpoints but no arm.json"):
        main(["--recipe", path])


def test_one_process_an_arm(tmp_path: Path) -> None:
    path, recipe = made(tmp_path)
    assert main(["--recipe", path, "--arm", "sft"]) == 0
    folder = RunDir.of(recipe).arm("toy", "sft")
    shutil.rmtree(folder.checkpoint(4))
    with folder.identity.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=rf"{folder.root}: another process is training this arm"):
            main(["--recipe", path, "--arm", "sft"])
    assert main(["--recipe", path, "--arm", "sft"]) == 0


def test_an_arm_that_another_process_trained_meanwhile_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command twice: one process comes hours after it looked to an arm that the other has trained by then."""
    path, recipe = made(tmp_path)
    experiment = Experiment(recipe)
    early = plan(experiment)
    assert main(["--recipe", path, "--arm", "distill"]) == 0
    before = {p: p.read_bytes() for p in RunDir.of(recipe).arm("toy", "distill").root.rglob("*") if p.is_file()}
    failed = train(recipe, experiment.open_cache(), early, Group.join(cpu=True))
    assert [f.arm.label for f in failed] == ["toy/distill"] and isinstance(failed[0].error, RunError)
    assert "another process trained it meanwhile, from step 0 to step 4; run the same command" in str(failed[0].error)
    assert {p: p.read_bytes() for p in RunDir.of(recipe).arm("toy", "distill").root.rglob("*") if p.is_file()} == before
    assert RunDir.of(recipe).arm("toy", "sft").checkpoint(4).is_dir()
    with claimed(plan(experiment)[1]):  # the control: a plan made now is gone on with
        pass


def test_settings_that_another_process_began_with_meanwhile_are_not_mixed(tmp_path: Path) -> None:
    path, recipe = made(tmp_path)
    early, _ = plan(Experiment(recipe))
    other, _ = plan(Experiment(load_recipe(path, ["train.lr=0.5"])))
    with claimed(other):
        pass
    with pytest.raises(RunError, match=r"train\.lr: trained with 0\.5, now asked for 0\.001"), claimed(early):
        pass


def test_two_that_begin_an_arm_at_once_lock_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see no arm.json; the second writes its own when the first holds the lock."""
    _, recipe = made(tmp_path)
    arm, _ = plan(Experiment(recipe))
    real = Path.exists
    with claimed(arm):
        monkeypatch.setattr(Path, "exists", lambda p, **more: p != arm.folder.identity and real(p, **more))
        with pytest.raises(RunError, match="another process is training this arm"), claimed(arm):
            pass


def test_nan_stops_the_run_with_the_example(tmp_path: Path) -> None:
    """One example has a character that no other has; the student's embedding of it is NaN."""
    rows = toys.rows(24)
    rows[13]["question"] += " Ω"
    toys.write_jsonl(tmp_path / "data" / "gsm8k" / "train.jsonl", rows)
    toys.write_jsonl(tmp_path / "data" / "gsm8k" / "test.jsonl", toys.rows(8, start=100))
    tokenizer = toys.tiny_tokenizer(tmp_path / "broken")
    toys.tiny_qwen3(tmp_path / "broken", tie_word_embeddings=False)
    omega = tokenizer("Ω", add_special_tokens=False)["input_ids"][-1]
    poison(tmp_path / "broken" / "model.safetensors", omega)
    path, recipe = made(
        tmp_path,
        teacher={"shots": 0},
        eval={"baselines": ["zero_shot"]},
        students={"toy": {"model": str(tmp_path / "broken")}},
        train={"steps": 12, "save_every": 1, "micro_batch_size": 1, "batch_size": 4},
    )
    with pytest.raises(RunError) as error:
        main(["--recipe", path, "--arm", "sft"])
    assert "ce nan" in str(error.value)
    assert "Micro-batches with these examples: train/gsm8k-00013\n" in str(error.value)
    lines = metrics(recipe, "sft")
    assert all(math.isfinite(line["loss"]) for line in lines) and len(lines) < 6
    assert complete_steps(RunDir.of(recipe).arm("toy", "sft").checkpoints) == [line["step"] for line in lines]


def test_a_full_disk_costs_nothing_that_is_saved(tmp_path: Path) -> None:
    """The file size limit stands in for it: the same error, from the same calls, without mounting anything."""
    path, recipe = made(tmp_path, train={"steps": 4, "save_every": 1}, students={"toy": {"lora": {"r": 64}}})
    folder = RunDir.of(recipe).arm("toy", "sft")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RunError, match=r"saving the checkpoint of step 1 failed: .* MB free there"):
            main(["--recipe", path, "--arm", "sft"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(folder.checkpoints.iterdir()) == []
    assert main(["--recipe", path, "--arm", "sft"]) == 0
    assert complete_steps(folder.checkpoints) == [1, 2, 3, 4]


def poison(path: Path, token: int) -> None:
    """Make one row of a saved model's input embedding NaN."""
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})


def test_examples_beyond_the_window_are_dropped_for_all_arms(tmp_path: Path) -> None:
    toys.tiny_tokenizer(tmp_path / "short")
    toys.tiny_qwen3(tmp_path / "short", max_position_embeddings=48)
    path, recipe = made(tmp_path, students={"toy": {"model": str(tmp_path / "short")}})
    assert main(["--recipe", path]) == 0
    notes = []
    for arm in ("sft", "distill"):
        state = json.loads((RunDir.of(recipe).arm("toy", arm).checkpoint(4) / "state.json").read_text())
        notes.append((state["provenance"]["examples"], state["provenance"]["dropped"]))
    assert notes[0] == notes[1] and notes[0][1] > 0 and sum(notes[0]) == 22
    assert [m["positions"] for m in metrics(recipe, "sft")] == [m["positions"] for m in metrics(recipe, "distill")]


def test_the_cache_must_be_there_whole_and_the_recipes_own(tmp_path: Path) -> None:
    path, recipe = made(tmp_path)
    cache = Path(str(recipe.cache.dir))
    with pytest.raises(FingerprintMismatch, match=r"cache.top_k +cache: 16 +asked for: 32"):
        main(["--recipe", path, "--set", "cache.top_k=32"])
    (cache / "sealed.json").unlink()
    (cache / "shards" / "00001.json").unlink()
    with pytest.raises(IncompleteCache, match=r"1 of 3 shards are missing \(1\)\n  next: python -m stage1_teacher"):
        main(["--recipe", path])
    with pytest.raises(NotACache):
        main(["--recipe", path, "--set", f"cache.dir={tmp_path / 'none'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["run", "run/students", "run/students/toy", "run/students/toy/sft"])
def test_a_file_in_place_of_a_folder(tmp_path: Path, place: str) -> None:
    path, _ = made(tmp_path)
    blocker = tmp_path / place
    blocker.parent.mkdir(parents=True, exist_ok=True)
    blocker.write_text("here first")
    with pytest.raises(RunError, match=rf"{blocker}.*a file, expected a folder"):
        main(["--recipe", path])
    assert blocker.read_text() == "here first"


def test_unknown_names_and_unfit_dtypes(tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    with pytest.raises(RecipeError, match=r"--arm distil: unknown arm 'distil'. Did you mean 'distill'\?"):
        main(["--recipe", path, "--arm", "distil"])
    with pytest.raises(RecipeError, match="--student tor: unknown student 'tor'"):
        main(["--recipe", path, "--student", "tor"])
    with pytest.raises(ModelError, match=r"students.toy.dtype is float16.*bfloat16 or float32"):
        main(["--recipe", path, "--set", "students.toy.dtype=float16"])


def test_learning_rate() -> None:
    settings = Train(steps=100, lr=1.0, warmup_steps=10, schedule="cosine")
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001
    linear = Train(steps=100, lr=1.0, warmup_steps=10, schedule="linear")
    assert learning_rate(55, linear) == pytest.approx(0.5) and learning_rate(99, linear) == pytest.approx(1 / 90)
    constant = Train(steps=3, lr=2.0, warmup_steps=0, schedule="constant")
    assert [learning_rate(step, constant) for step in range(3)] == [2.0, 2.0, 2.0]
