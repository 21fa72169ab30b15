"""Handing over: the numbers on a scored run's card, its cache as a data set, an upload through the front door."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import boto3
import numpy as np
import pytest
import s3
import toys
import yaml
from hub import Hub
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

import stage1_teacher.__main__
import stage2_student.__main__
import stage3_eval.__main__
from cache_schema.reader import CacheReader
from cache_schema.verify import verify
from pipeline.__main__ import main as pipeline_main
from pipeline.data import eval_examples
from pipeline.errors import RecipeError, RunError
from pipeline.fingerprint import Experiment
from pipeline.models import EMBEDDED_DIR
from pipeline.recipe import load_recipe
from pipeline.run_dir import RunDir
from stage2_student.export import main as export

ROOT = Path(__file__).parent.parent.parent
FRONT_DOOR = [sys.executable, "-m", "pipeline", "export"]
VLLM = Path(os.environ.get("LOGITBANK_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
OURS = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

IN_VLLM = """
import json, sys
from pathlib import Path

if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    root = Path(sys.argv[1])
    prompts = json.loads((root / "prompts.json").read_text())
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    settings = dict(dtype="float32", enforce_eager=True, max_model_len=256)
    merged = LLM(str(root / "merged"), **settings).generate(prompts, sampling)
    request = LoRARequest("adapter", 1, str(root / "adapter"))
    adapted = LLM(str(root / "model"), enable_lora=True, **settings).generate(prompts, sampling, lora_request=request)
    tokens = {"merged": merged, "adapter": adapted}
    answers = {name: [list(one.outputs[0].token_ids) for one in done] for name, done in tokens.items()}
    (root / "answers.json").write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A recipe that was trained, with a repeat of each arm, and scored."""
    root = tmp_path_factory.mktemp("scored")
    path = toys.tiny_recipe(root, train={"lr": 3.0e-2, "repeats": 2}, eval={"max_new_tokens": 8})
    toys.fill_cache(load_recipe(str(path)))
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr("stage3_eval.compare._RESAMPLES", 200)
        for stage in (stage2_student.__main__, stage3_eval.__main__):
            assert stage.main(["--recipe", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def data_set(scored):
    to = scored.parent / "data_set"
    with contextlib.redirect_stdout(io.StringIO()):
        assert pipeline_main(["export", "--recipe", str(scored), "--cache", "--to", str(to)]) == 0
    return to


def reported(scored):
    results = json.loads((scored.parent / "run" / "report" / "results.json").read_text(encoding="utf-8"))
    return results["students"]["toy"]["blocks"]["test"]["gsm8k"]


@pytest.mark.parametrize(("wanted", "seed"), [("toy/distill", 0), ("toy/distill~1@4", 1), (None, 0)])
def test_the_card_has_the_numbers_of_the_report(scored, tmp_path, wanted, seed):
    asked = [] if wanted is None else ["--checkpoint", wanted]
    assert export(["--recipe", str(scored), "--to", str(tmp_path / "to"), *asked]) == 0
    card = ModelCard.load(tmp_path / "to" / "README.md")
    found = {of.metric_name: of for of in card.data.eval_results}
    for metric in ("strict", "flexible"):
        cell = reported(scored)[metric]["rows"]["distill"]["runs"][seed]
        assert found[metric].metric_value == cell["mean"] and found[metric].dataset_type == "gsm8k"
        low, high = (f"{100 * bound:.2f}" for bound in cell["interval"])
        assert f"| gsm8k | test | {metric} | {cell['n']} | {100 * cell['mean']:.2f} % | {low} to {high} |" in card.text
    data = metadata_load(tmp_path / "to" / "README.md")
    assert data["metrics"] == ["exact_match"] and data["model-index"][0]["results"][0]["dataset"]["split"] == "test"


def test_a_checkpoint_of_the_curve_has_the_curves_numbers(scored, tmp_path):
    assert export(["--recipe", str(scored), "--checkpoint", "toy/sft@2", "--to", str(tmp_path / "to")]) == 0
    point = next(p for p in reported(scored)["strict"]["curve"]["sft"] if p["step"] == 2)
    text = (tmp_path / "to" / "README.md").read_text(encoding="utf-8")
    assert f"| gsm8k | test | strict | {point['n']} | {100 * point['mean']:.2f} % |" in text


@pytest.mark.parametrize("answered", [False, True])
def test_numbers_of_another_adapter_are_not_shown(scored, tmp_path, answered):
    """Trained again since it was scored: the predictions that the report is made of are not this adapter's, even if
    there are some that are by now (answered): stage 3 was stopped before its report."""
    shutil.copytree(scored.parent / "run", tmp_path / "run")
    checkpoints = tmp_path / "run/students/toy/distill/checkpoints"
    for name in ("adapter_model.safetensors", "state.json"):
        shutil.copyfile(checkpoints / "step-000002" / name, checkpoints / "step-000004" / name)
    if answered:
        predictions = tmp_path / "run/predictions/toy"
        (of_the_other,) = (predictions / "distill@2").glob("test-*")
        shutil.copyfile(of_the_other, predictions / "distill@4" / of_the_other.name)  # the newest there
    arguments = ["--recipe", str(scored), "--set", f"run_dir={tmp_path / 'run'}", "--to", str(tmp_path / "to")]
    assert export(arguments) == 0
    assert "None: this checkpoint has not been scored" in (tmp_path / "to" / "README.md").read_text(encoding="utf-8")


def test_the_cache_is_handed_over_whole(scored, data_set):
    cache = CacheReader.open(data_set, expect=Experiment(load_recipe(str(scored))).identity)
    assert cache.sealed and verify(data_set).good
    ours = {str(p.relative_to(scored.parent / "cache")): p for p in (scored.parent / "cache").rglob("*") if p.is_file()}
    theirs = {str(p.relative_to(data_set)): p for p in data_set.rglob("*") if p.is_file()}
    assert set(theirs) - set(ours) == {"README.md"}
    for name, path in theirs.items():
        assert name == "README.md" or path.read_bytes() == ours[name].read_bytes(), name


def test_datasets_reads_the_cache_by_its_card(data_set, tmp_path):
    from datasets import load_dataset

    card = (data_set / "README.md").read_text(encoding="utf-8")
    assert f'load_dataset("{data_set}", split="train")' in card
    rows = load_dataset(str(data_set), split="train", cache_dir=str(tmp_path))
    ours = list(CacheReader.open(data_set).rows())
    assert rows["example_id"] == [row.example_id for row in ours] and len(ours) == 22
    assert all(np.array_equal(theirs, row.answer_ids) for theirs, row in zip(rows["answer_ids"], ours, strict=True))
    features = metadata_load(data_set / "README.md")["dataset_info"]["features"]
    assert [feature["name"] for feature in features] == list(rows.features)
    for feature in features:
        of = rows.features[feature["name"]]
        assert feature.get("list", feature.get("dtype")) == (of.feature.dtype if "list" in feature else of.dtype)


def test_the_data_card_has_the_ledgers_and_the_fingerprint(scored, data_set):
    text = (data_set / "README.md").read_text(encoding="utf-8")
    cache = CacheReader.open(data_set)
    totals = cache.totals()
    for words in (cache.manifest.fingerprint, f"- examples: {totals.examples}", f"- positions: {totals.positions}"):
        assert words in text
    data = metadata_load(data_set / "README.md")
    assert data["size_categories"] == ["n<1K"]
    assert "source_datasets" not in data and "rows from a folder, in the form of openai/gsm8k" in text
    assert list(data["dataset_info"]) == ["features"]


def test_a_torn_shard_is_not_handed_over(scored, tmp_path):
    shutil.copytree(scored.parent / "cache", tmp_path / "cache")
    shard = sorted((tmp_path / "cache" / "shards").glob("*.parquet"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    elsewhere = f"cache.dir={tmp_path / 'cache'}"
    with pytest.raises(RunError, match=r"its commit record says .*\n.* python -m cache_schema repair"):
        pipeline_main(["export", "--recipe", str(scored), "--set", elsewhere, "--cache", "--to", str(tmp_path / "to")])
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # boto's and moto's
def test_a_cache_in_a_bucket_is_handed_over(scored, data_set, tmp_path, monkeypatch):
    """From S3 it is the same folder as from a disk, but for the folder's name in the card."""
    for name, value in s3.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with s3.Server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bank")
        cache = scored.parent / "cache"
        for path in (path for path in cache.rglob("*") if path.is_file()):
            client.upload_file(str(path), "bank", f"there/{path.relative_to(cache)}")
        there = ["--set", "cache.dir=s3://bank/there", "--set", f"runtime.copies={tmp_path / 'copies'}"]
        to = tmp_path / "to"
        assert pipeline_main(["export", "--recipe", str(scored), *there, "--cache", "--to", str(to)]) == 0
    ours = {str(p.relative_to(data_set)): p.read_bytes() for p in data_set.rglob("*") if p.is_file()}
    theirs = {str(p.relative_to(to)): p.read_bytes() for p in to.rglob("*") if p.is_file()}
    assert theirs.pop("README.md").replace(str(to).encode(), str(data_set).encode()) == ours.pop("README.md")
    assert theirs == ours and verify(to).good


def test_a_cache_is_no_student(scored, tmp_path):
    with pytest.raises(RecipeError, match="--checkpoint, --merge is about a student"):
        arguments = ["--cache", "--checkpoint", "toy/sft", "--merge", "--to", str(tmp_path / "to")]
        pipeline_main(["export", "--recipe", str(scored), *arguments])


def test_the_front_door_hands_a_student_to_the_hub(scored, tmp_path):
    """In processes, as a user does: the upload has what the folder has."""
    with Hub() as hub:
        command = [
            *FRONT_DOOR,
            "--recipe",
            str(scored),
            "--merge",
            "--to",
            str(tmp_path / "to"),
            "--push",
            "me/student",
        ]
        environment = OURS | hub.environment("hf_writes")
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0 and f"uploaded {hub.url}/me/student" in done.stdout, done.stdout + done.stderr
        sent = {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()}
        assert hub.files["model", "me/student"] == sent and "model.safetensors" in sent
        assert b"from_pretrained('me/student'" in sent["README.md"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not VLLM.is_file(), reason=f"no vLLM environment at {VLLM}; make vllm-cpu")
def test_vllm_answers_as_transformers_does(tmp_path):
    """Adapter and merged model, in vLLM's own environment: the greedy tokens of transformers; the base has others."""
    toys.tiny_tokenizer(tmp_path / "model")
    toys.tiny_qwen3(tmp_path / "model", head_dim=32, initializer_range=0.5)  # vLLM has no kernel for heads of 8
    path = toys.tiny_recipe(tmp_path, train={"lr": 3.0e-2})
    recipe = load_recipe(str(path))
    toys.fill_cache(recipe)
    with contextlib.redirect_stdout(io.StringIO()):
        assert stage2_student.__main__.main(["--recipe", str(path)]) == 0
        for to, more in (("adapter", []), ("merged", ["--merge"])):
            assert export(["--recipe", str(path), "--to", str(tmp_path / to), *more]) == 0
    prompts = [example.prompt for example in Experiment(recipe).training_set.cached[:8]]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    (tmp_path / "worker.py").write_text(IN_VLLM, encoding="utf-8")
    done = subprocess.run(
        [str(VLLM), str(tmp_path / "worker.py"), str(tmp_path)],
        cwd=tmp_path,
        env=OURS | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answers = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "merged"))
    ours = {}
    for name in ("merged", "model"):
        model = AutoModelForCausalLM.from_pretrained(str(tmp_path / name), dtype="float32").eval()
        ours[name] = [_greedy(model, tokenizer(p, add_special_tokens=False)["input_ids"], 6) for p in prompts]
    assert answers["adapter"] == answers["merged"] == ours["merged"] != ours["model"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("merge", [False, True])
def test_lm_eval_gives_an_export_the_scores_of_the_report(learned, tmp_path, merge):
    """Its command line, its gsm8k task but for the rows, its own engine; the untouched base, the control, less."""
    to = tmp_path / "to"
    assert export([*learned, "--to", str(to), *(["--merge"] if merge else [])]) == 0
    recipe = load_recipe("pocket", learned[3::2])
    rows = [
        {"question": e.prompt.removeprefix("Question: ").removesuffix("\nAnswer:"), "answer": e.answer}
        for e in eval_examples(recipe, "test")
    ]
    toys.write_jsonl(tmp_path / "test.jsonl", rows)
    own = lm_eval_folder() / "tasks" / "gsm8k" / "gsm8k.yaml"
    rows_of = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": "test.jsonl"}}}
    splits = {"training_split": None, "fewshot_split": None, "test_split": "test", "num_fewshot": 0}
    task = {"include": str(own), "task": "gsm8k_pocket", **rows_of, **splits}
    (tmp_path / "gsm8k_pocket.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    base = str(EMBEDDED_DIR / "decoder")

    def scores(model):
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"{model},dtype=float32"]
        command += ["--include_path", str(tmp_path), "--tasks", "gsm8k_pocket", "--batch_size", "20", "--device", "cpu"]
        command += ["--gen_kwargs", f"max_gen_toks={recipe.eval.max_new_tokens}", "--output_path", "out.json"]
        environment = OURS | {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "HF_DATASETS_OFFLINE": "1"}
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=250, check=True)
        written = max(tmp_path.glob("out*.json"), key=lambda path: path.stat().st_mtime)
        found = json.loads(written.read_text(encoding="utf-8"))["results"]["gsm8k_pocket"]
        return {"strict": found["exact_match,strict-match"], "flexible": found["exact_match,flexible-extract"]}

    report = json.loads((RunDir.of(recipe).report / "results.json").read_text(encoding="utf-8"))
    of_test = report["students"]["pocket"]["blocks"]["test"]["pocket_math"]
    expected = {metric: of_test[metric]["rows"]["distill"]["mean"] for metric in ("strict", "flexible")}
    assert scores(f"pretrained={to}" if merge else f"pretrained={base},peft={to}") == pytest.approx(expected)
    assert scores(f"pretrained={base}")["strict"] < expected["strict"] - 0.2


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The arguments of a short pocket run whose distilled student has learned something."""
    lm_eval_folder()
    root = tmp_path_factory.mktemp("learned")
    sets = [f"run_dir={root / 'run'}", f"cache.dir={root / 'cache'}", "train.steps=40", "train.save_every=40"]
    sets += ["data.eval_limit=40", "data.train_limit=128"]
    arguments = ["--recipe", "pocket", *(part for of in sets for part in ("--set", of))]
    with contextlib.redirect_stdout(io.StringIO()):
        assert stage1_teacher.__main__.main(arguments) == 0
        assert stage2_student.__main__.main([*arguments, "--arm", "distill"]) == 0
        assert stage3_eval.__main__.main(arguments) in (0, 3)  # the other arm is missing
    return arguments


def lm_eval_folder():
    module = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval==0.4.13")
    return Path(module.__file__).parent


def _greedy(model, ids, count):
    import torch

    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]
