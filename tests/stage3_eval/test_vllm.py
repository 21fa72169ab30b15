"""The vLLM engine for real, in its own environment, against the transformers engine: the same greedy tokens.

`make vllm-cpu` makes that environment (.venv-vllm); LOGITBANK_VLLM_PYTHON names the interpreter of another one.
"""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
import toys
from toy_adapters import write_adapter, write_checkpoint

from pipeline.errors import RunError

ROOT = Path(__file__).parent.parent.parent
PYTHON = Path(os.environ.get("LOGITBANK_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
MAX_NEW_TOKENS = 24

needs_vllm = pytest.mark.skipif(
    not PYTHON.is_file(), reason=f"no vLLM environment at {PYTHON}; make vllm-cpu, or set LOGITBANK_VLLM_PYTHON"
)

# Runs in the vLLM environment: base, adapter, other adapter, base again, by one engine.
WORKER = """
import json, sys
from pathlib import Path
if __name__ == "__main__":
    from pipeline.models import locate
    from stage3_eval.generate.vllm import VLLMEngine
    job = json.load(open(sys.argv[1]))
    longest = max(map(len, job["prompts"])) + job["max_new_tokens"]
    adapters = [adapter and Path(adapter) for adapter in job["adapters"]]
    engine = VLLMEngine(locate(job["model"]), "float32", 4, longest, sorted({a for a in adapters if a}))
    answers = [
        engine.generate(job["prompts"], adapter, job["max_new_tokens"], job["end_id"]) for adapter in adapters
    ]
    logprobs = [engine.label_logprobs(job["prompts"], job["labels"], adapter) for adapter in adapters]
    engine.close()
    Path(sys.argv[2]).write_text(json.dumps({"answers": answers, "logprobs": logprobs}))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_vllm
def test_vllm_writes_what_transformers_writes_and_weighs_labels_alike(tmp_path):
    from pipeline.models import load_causal_lm, locate
    from pipeline.prompts import PromptBuilder
    from stage3_eval.generate.hf import HFEngine

    # Weights this large make the best token stand out, so that no rounding can turn a choice.
    model = toys.tiny_qwen3(tmp_path / "model", head_dim=32, initializer_range=0.5)  # vLLM has no kernel for heads of 8
    tokenizer = toys.tiny_tokenizer(tmp_path / "model")
    builder = PromptBuilder(tokenizer)
    adapters = [tmp_path / "one", tmp_path / "two"]
    for seed, adapter in enumerate(adapters):
        write_adapter(adapter, model, seed)
    prompts = [builder.prompt_ids(row["question"]) for row in toys.rows(12)]
    order = [None, adapters[0], adapters[1], None]

    import torch

    engine = HFEngine(load_causal_lm(locate(str(model)), "float32", "none", torch.device("cpu")), batch_size=5)
    # The end token is one that this random model likes to write, so that some answers end before the limit.
    free = [ids for adapter in order[:3] for ids, _ in engine.generate(prompts, adapter, MAX_NEW_TOKENS, 0)]
    written = [token for ids in free for token in ids[4:]]
    end_id = max(sorted(set(written)), key=written.count)
    expected = [engine.generate(prompts, adapter, MAX_NEW_TOKENS, end_id) for adapter in order]
    labels = [
        [builder.encode("", label).answer_ids for label in ("no", "yes", row["answer"][:9])] for row in toys.rows(12)
    ]
    likely = [engine.label_logprobs(prompts, labels, adapter) for adapter in order]

    job, out, worker = tmp_path / "job.json", tmp_path / "answers.json", tmp_path / "worker.py"
    job.write_text(
        json.dumps(
            {
                "model": str(model),
                "prompts": prompts,
                "labels": labels,
                "adapters": [adapter and str(adapter) for adapter in order],
                "max_new_tokens": MAX_NEW_TOKENS,
                "end_id": end_id,
            }
        )
    )
    worker.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [PYTHON, worker, job, out], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    found = json.loads(out.read_text())
    for ours, theirs in zip(likely, found["logprobs"], strict=True):
        assert [len(values) for values in theirs] == [3] * 12
        for values, others in zip(ours, theirs, strict=True):
            assert others == pytest.approx(values, abs=1e-3)
    assert found["logprobs"][0] != found["logprobs"][1]
    answers = found["answers"]
    for adapter, ours, theirs in zip(order, expected, answers, strict=True):
        assert [[list(ids), finished] for ids, finished in ours] == theirs, f"adapter {adapter}"
    assert answers[0] == answers[3]
    assert answers[0] != answers[1] != answers[2] != answers[0]
    finished = [answer[1] for of in answers for answer in of]
    assert any(finished)
    assert not all(finished)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_error_names_what_to_install(tmp_path):
    from pipeline.models import ModelSource
    from stage3_eval.generate.vllm import VLLMEngine

    with pytest.raises(RunError, match=r"pip install 'logitbank\[vllm\]'.*runtime.python.stage3_eval"):
        VLLMEngine(ModelSource(str(tmp_path), None), "float32", 4, 64, [])


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_vllm
def test_the_command_line_runs_in_the_vllm_environment(tmp_path, monkeypatch):
    """Its older transformers reads the same recipe, rows and checkpoints, and writes the same answers."""
    from pipeline.recipe import load_recipe
    from pipeline.run_dir import RunDir
    from stage3_eval.blocks import Blocks
    from stage3_eval.evaluate import ModelRun
    from stage3_eval.subject import Subject

    toys.tiny_tokenizer(tmp_path / "model")
    toys.tiny_qwen3(tmp_path / "model", head_dim=32, initializer_range=0.5)
    path = toys.tiny_recipe(tmp_path, data={"eval_limit": 5}, eval={"engine": "hf"})
    recipe = load_recipe(str(path))
    for arm, seed in (("sft", 1), ("distill", 2)):
        write_checkpoint(RunDir.of(recipe), arm, 4, tmp_path / "model", seed)
    ours = ModelRun(recipe, "toy", Blocks(recipe)).evaluate()

    command = [PYTHON, "-m", "stage3_eval", "--recipe", path, "--set", "eval.engine=vllm"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 of 20 answers are there; the other 20 are generated by vllm" in done.stdout

    monkeypatch.setattr(Subject, "load", lambda *_: pytest.fail("its answers were not found here"))
    theirs = ModelRun(load_recipe(str(path), ["eval.engine=vllm"]), "toy", Blocks(recipe)).evaluate()
    assert {key: file.predictions for key, file in theirs.files.items()} == {
        key: file.predictions for key, file in ours.files.items()
    }
