"""The weights in the repository: small, loadable, the tokenizer of the code, and able to do what they are there for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pipeline.pocket
from pipeline.pocket.__main__ import main
from pipeline.pocket.measure import answers, measure, wilson
from pipeline.pocket.problems import split_problems
from pipeline.pocket.tokenizer import build_tokenizer
from pipeline.tasks import get_task
from pipeline.tasks.numbers import extract_strict

WEIGHTS = Path(pipeline.pocket.__file__).parent / "weights" / "decoder"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(WEIGHTS).eval()


def test_the_folder_is_below_eight_megabytes() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*")) < 8_000_000


def test_the_model_is_a_small_qwen3_in_float32(model: Any) -> None:
    assert model.config.model_type == "qwen3"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings
    assert sum(parameter.numel() for parameter in model.parameters()) == 799_616


def test_the_saved_tokenizer_is_the_one_the_code_builds(tokenizer: Any, model: Any) -> None:
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_nine_problems_fit_the_window(tokenizer: Any, model: Any) -> None:
    task = get_task("pocket_math")
    examples = [task.to_example({"question": p.question, "answer": p.worked}, 0, None) for p in split_problems("test")]
    texts = [example.prompt + " " + example.answer for example in examples]
    lengths = sorted(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
    mean = sum(lengths) / len(lengths)
    assert 9 * mean < model.config.max_position_embeddings
    assert 8 * mean + lengths[-1] < model.config.max_position_embeddings


def test_worked_examples_bring_out_worked_answers(model: Any, tokenizer: Any) -> None:
    problems = split_problems("validation")[:20]
    texts = answers(model, tokenizer, problems, shots=8)
    assert all(extract_strict(text) is not None and "=" in text for text in texts)
    right = [extract_strict(text) == problem.result for text, problem in zip(texts, problems, strict=True)]
    assert sum(right) >= 14
    assert measure(model, tokenizer, 20, shots=0)["accuracy"] <= 0.5


def test_the_interval_is_wilsons() -> None:
    low, high = wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_a_file_for_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights").write_text("")
    assert main(["--out", str(tmp_path / "weights"), "--measure-only"]) == 2
    assert "found a file where a folder is needed" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--measure-only"]) == 2
    assert "no config.json" in capsys.readouterr().err
