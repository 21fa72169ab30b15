"""A trained student is handed over as what peft and transformers load, with a card whose code runs and whose numbers
are those of this very adapter."""

import contextlib
import io
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import toys
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from pipeline.errors import RecipeError, RunError, UserError
from pipeline.fingerprint import Experiment
from pipeline.recipe import load_recipe
from pipeline.run_dir import RunDir
from stage2_student import export
from stage2_student.__main__ import main as train
from stage2_student.export import main
from stage2_student.model_card import Number, Reported, _metadata, _table

PROMPT = "Ann has 3 pears and finds 4 more on day 1. How many pears now?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe with two arms that were really trained, its cache beside it."""
    root = tmp_path_factory.mktemp("export")
    path = toys.tiny_recipe(root, train={"lr": 3.0e-2})
    toys.fill_cache(load_recipe(str(path)))
    with contextlib.redirect_stdout(io.StringIO()):
        assert train(["--recipe", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def adapter(trained):
    to = trained.parent / "adapter"
    assert main(["--recipe", str(trained), "--to", str(to)]) == 0
    return to


@pytest.fixture(scope="module")
def merged(trained):
    to = trained.parent / "merged"
    assert main(["--recipe", str(trained), "--merge", "--to", str(to)]) == 0
    return to


def loaded(folder, base=None):
    """What a user gets from transformers and peft alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base or folder), dtype="float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return PeftModel.from_pretrained(model, str(folder)).eval() if base else model.eval()


def logits_of(model, folder):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(str(folder))(PROMPT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits[0]


def code_of(folder):
    """The first Python block of a card."""
    return (folder / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]


def test_the_adapter_is_the_checkpoints_and_names_what_can_be_loaded(trained, adapter):
    from peft import PeftConfig

    checkpoint = trained.parent / "run" / "students" / "toy" / "distill" / "checkpoints" / "step-000004"
    for name in ("adapter_model.safetensors",):
        assert (adapter / name).read_bytes() == (checkpoint / name).read_bytes()
    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    assert base == str(trained.parent / "model") and Path(base).is_absolute()
    assert sorted(path.name for path in adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_merged_logits_are_those_of_the_adapter(trained, adapter, merged):
    """Within 1e-4 of the largest logit in float32; the untouched base, the control, is not."""
    base = trained.parent / "model"
    of_adapter = logits_of(loaded(adapter, base), adapter)
    of_merged = logits_of(loaded(merged), merged)
    bound = export.MERGE_BOUND * float(of_adapter.abs().max())
    assert float((of_merged - of_adapter).abs().max()) <= bound
    assert float((logits_of(loaded(base), base) - of_adapter).abs().max()) > 100 * bound


def test_peft_finds_the_base_model_by_itself(adapter):
    from peft import AutoPeftModelForCausalLM

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = AutoPeftModelForCausalLM.from_pretrained(str(adapter), dtype=torch.float32).eval()
    of_base = logits_of(loaded(adapter.parent / "model"), adapter)
    assert not torch.allclose(logits_of(model, adapter), of_base, atol=1e-2)


@pytest.mark.parametrize("made", ["adapter", "merged"])
def test_the_code_of_the_card_answers_as_the_checkpoint_does(made, request, trained):
    folder, out = request.getfixturevalue(made), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out):
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        exec(compile(code_of(folder), str(folder / "README.md"), "exec"), {})
    recipe = load_recipe(str(trained))
    experiment = Experiment(recipe)
    arm, _ = export.chosen(experiment, Reported(RunDir.of(recipe), {}), "toy/distill", [])
    prompts = arm.student.prompts
    ids = prompts.prompt_ids(experiment.training_set.cached[0].prompt)
    model = loaded(request.getfixturevalue("adapter"), trained.parent / "model")
    answer = []
    for _ in range(recipe.eval.max_new_tokens):  # greedy by hand: no generate, no KV cache
        with torch.no_grad():
            answer.append(int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
        if answer[-1] == prompts.end_id:
            break
    assert out.getvalue().strip() == prompts.text(answer) and out.getvalue().strip()


def test_a_chat_student_is_asked_in_its_template(tmp_path):
    """The card's prompt has the ids that training had, thinking switched off; GPT-2's adapter loads too."""
    toys.tiny_tokenizer(tmp_path / "model", chat=True)
    toys.tiny_gpt2(tmp_path / "model", vocab_size=320)
    path = toys.tiny_recipe(
        tmp_path, teacher={"thinking": False}, train={"steps": 1, "save_every": 1}, arms={"sft": None}
    )
    recipe = load_recipe(str(path))
    toys.fill_cache(recipe)
    with contextlib.redirect_stdout(io.StringIO()):
        assert train(["--recipe", str(path)]) == 0
        assert main(["--recipe", str(path), "--merge", "--to", str(tmp_path / "to")]) == 0
    names = {}
    code = code_of(tmp_path / "to")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "card", "exec"), names)
    experiment = Experiment(recipe)
    arm, _ = export.chosen(experiment, Reported(RunDir.of(recipe), {}), None, [])
    assert names["ids"][0].tolist() == arm.student.prompts.prompt_ids(experiment.training_set.cached[0].prompt)
    assert "enable_thinking=False" in code
    config = json.loads((tmp_path / "to" / "generation_config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == arm.student.prompts.end_id


def test_a_merge_in_bfloat16_states_its_rounding(trained, tmp_path):
    """Rounded once, from a merge in float32; the card says how far it lies from the adapter's, and it does."""
    root = tmp_path / "half"
    shutil.copytree(trained.parent, root, ignore=shutil.ignore_patterns("run", "adapter", "merged"))
    toy = {"model": str(root / "model"), "dtype": "bfloat16"}
    path = toys.tiny_recipe(root, students={"toy": toy}, train={"lr": 3.0e-2}, arms={"sft": None})
    with contextlib.redirect_stdout(io.StringIO()):
        assert train(["--recipe", str(path)]) == 0
        assert main(["--recipe", str(path), "--merge", "--to", str(tmp_path / "to")]) == 0
        assert main(["--recipe", str(path), "--to", str(tmp_path / "adapter")]) == 0
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(tmp_path / "to" / "model.safetensors").values()} == {torch.bfloat16}
    card = (tmp_path / "to" / "README.md").read_text(encoding="utf-8")
    assert "Merged in float32, written in bfloat16" in card
    exact, rounded = (
        logits_of(loaded(tmp_path / "adapter", root / "model"), tmp_path / "adapter"),
        logits_of(loaded(tmp_path / "to"), tmp_path / "to"),
    )
    off = float((exact - rounded).abs().max()) / float(exact.abs().max())
    assert 1e-4 < off < 0.05  # more than the merge itself; no more than eight bits of weights do


def test_the_card_is_in_the_hubs_format(adapter, merged):
    for folder, library in ((adapter, "peft"), (merged, "transformers")):
        data = metadata_load(folder / "README.md")
        assert data["library_name"] == library and data["pipeline_tag"] == "text-generation"
        assert not {"datasets", "base_model"} & set(data)  # folders are none of the Hub's
        card = ModelCard.load(folder / "README.md")
        assert "None: this checkpoint has not been scored" in card.text and card.data.eval_results is None


def test_rows_and_a_base_of_the_hub_are_linked_and_numbers_are_of_the_hubs_data_set():
    """From the recipe as it is on the Hub; nothing is downloaded for the metadata."""
    numbers = [Number("gsm8k", "test", "strict", 1319, 0.5, 0.4, 0.6, None)]
    of = Experiment(load_recipe("gsm8k-qwen3"))
    text = _metadata(of, "a-student", "Qwen/Qwen3-1.7B", "apache-2.0", merged=False, numbers=numbers)
    data = yaml.safe_load(text)
    assert (data["base_model"], data["license"], data["datasets"]) == (
        "Qwen/Qwen3-1.7B",
        "apache-2.0",
        ["openai/gsm8k"],
    )
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"type": "openai/gsm8k", "name": "gsm8k", "config": "main", "split": "test"}
    assert result["metrics"] == [{"type": "exact_match", "value": 0.5, "name": "strict"}]


def test_the_table_says_which_scores_had_worked_examples():
    bare, shown = (Number("code", f"unseen_{how}_shot", "passed", 9, 0.5, 0.2, 0.8, None) for how in ("zero", "few"))
    assert _table([bare], "r").endswith("prompts without worked examples.")
    assert _table([bare, shown], "r").endswith("worked examples, but for the split `unseen_few_shot`.")


def test_the_fingerprint_and_the_command_are_in_the_card(trained, adapter):
    text = (adapter / "README.md").read_text(encoding="utf-8")
    assert Experiment(load_recipe(str(trained))).fingerprint in text
    assert f"python -m pipeline run --recipe {trained}" in text


def test_a_base_on_the_hub_is_named_in_config_and_card(trained, tmp_path):
    to = tmp_path / "to"
    assert main(["--recipe", str(trained), "--base", "owner/base", "--to", str(to)]) == 0
    config = json.loads((to / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", None)
    assert metadata_load(to / "README.md")["base_model"] == "owner/base"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--checkpoint", "toy/distil@4"], r"unknown checkpoint 'toy/distil'. Did you mean 'toy/distill'\?"),
        (["--checkpoint", "toy/distill@3"], "found no complete checkpoint of step 3. There are: toy/sft@2, toy/sft@4"),
        (["--checkpoint", "toy/distill@new"], "found no complete checkpoint of step new"),
        (["--push", "me/thing"], "a folder of this machine .* nobody else can load; add --merge, or --base"),
        (["--set", "train.lr=1e-5"], "trained with other settings"),
        (["--set", "run_dir=nowhere-at-all"], "there is no checkpoint yet of tiny; to train: python -m stage2_student"),
    ],
)
def test_what_cannot_be_handed_over_is_said_before_anything_is_written(trained, tmp_path, asked, words):
    with pytest.raises(UserError, match=words):
        main(["--recipe", str(trained), "--to", str(tmp_path / "to"), *asked])
    assert not (tmp_path / "to").exists()


def test_several_students_must_be_chosen_from(trained, tmp_path):
    tree = trained.read_text(encoding="utf-8")
    other = tmp_path / "two.yaml"
    other.write_text(tree.replace("students:\n", f"students:\n  two: {{model: {trained.parent / 'model'}}}\n"), "utf-8")
    with pytest.raises(RecipeError, match="--checkpoint STUDENT/ARM@STEP is needed"):
        main(["--recipe", str(other), "--to", str(tmp_path / "to")])


def test_a_full_folder_is_left_alone(trained, tmp_path):
    (tmp_path / "mine").write_text("x", encoding="utf-8")
    with pytest.raises(RunError, match=r"found 1 files in it \(mine\)"):
        main(["--recipe", str(trained), "--to", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_damaged_adapter_is_not_handed_over(trained, tmp_path):
    shutil.copytree(trained.parent / "run", tmp_path / "run")
    weights = tmp_path / "run/students/toy/distill/checkpoints/step-000004/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(RunError, match="is not what was written"):
        main(["--recipe", str(trained), "--set", f"run_dir={tmp_path / 'run'}", "--to", str(tmp_path / "to")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_merge_that_does_something_else_is_refused(trained, tmp_path, monkeypatch):
    """The control of the bound: peft's merge is made to drop the adapter."""
    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_and_unload", lambda self: self.unload())
    with pytest.raises(UserError, match=r"merged logits differ from the adapter's by up to"):
        main(["--recipe", str(trained), "--merge", "--to", str(tmp_path / "to")])
    assert list(tmp_path.iterdir()) == []
