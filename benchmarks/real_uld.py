"""The flan-uld recipe on real rows of all ten tasks with real tokenizers, and small models of the true vocabularies.

    python benchmarks/real_uld.py --data FOLDER [--work FOLDER] [--rows 2000] [--steps 4] [--eval 4] [--unseen]

For machines that cannot hold the real teacher: the published recipe but for its models, whose weights are random and
whose scores mean nothing. What it prints is real: rows, cut contexts, positions, quarantine by task, bytes a position,
and the share of student positions that get a teacher. The teacher is the T5 of `rank_only_bytes.py` in 4 bits; the
students are GPT-2, GPT-NeoX and Llama with the vocabularies of gpt2-medium, pythia-410m and SmolLM-360M.

FOLDER of --data has <task>/{train,test}.jsonl of every task and tokenizers/{t5,gpt2,gpt-neox-20b,smollm2}. The two
tasks that the recipe leaves unseen are cached, trained on and scored like the others, so that every task goes through
every stage; with --unseen they stay unseen and are scored 0-shot and few-shot.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STUDENTS = ("gpt2-medium", "pythia-410m", "smollm-360m")
UNSEEN = ("mbpp", "eng_spa")


def architectures() -> dict[str, tuple[str, Callable[[], Any]]]:
    """model -> (its tokenizer's folder, what builds it); the teacher is made elsewhere.

    Weights are drawn wide where the architecture lets us, so that distributions are peaked rather than uniform.
    """
    import transformers as hf

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    bert = {"vocab_size": 50_257, "pad_token_id": 1, "max_position_embeddings": 514}
    return {
        "gpt2-medium": ("gpt2", lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2))),
        "pythia-410m": (
            "gpt-neox-20b",
            lambda: hf.GPTNeoXForCausalLM(
                hf.GPTNeoXConfig(**small, **end, vocab_size=50_304, max_position_embeddings=2048)
            ),
        ),
        "smollm-360m": (
            "smollm2",
            lambda: hf.LlamaForCausalLM(
                hf.LlamaConfig(**small, **end, vocab_size=49_152, max_position_embeddings=2048)
            ),
        ),
        "encoder": ("gpt2", lambda: hf.RobertaModel(hf.RobertaConfig(**small, **bert), add_pooling_layer=False)),
    }


def make_models(folder: Path, tokenizers: Path) -> None:
    """Every model as save_pretrained leaves it, its real tokenizer beside it; what is there is kept."""
    import rank_only_bytes
    import torch
    from transformers import AutoTokenizer

    if not (folder / "teacher" / "config.json").is_file():
        rank_only_bytes.make_model(folder / "teacher", tokenizers / "t5")
    for name, (tokenizer_name, build) in architectures().items():
        if (folder / name / "config.json").is_file():
            continue
        torch.manual_seed(0)
        build().save_pretrained(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(tokenizers / tokenizer_name)
        if name == "encoder":  # RoBERTa's use of GPT-2's vocabulary: marks around a text, and padding
            mark = tokenizer.eos_token
            tokenizer.add_special_tokens({"cls_token": mark, "sep_token": mark, "pad_token": "!"})
        tokenizer.save_pretrained(folder / name)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What differs from the published recipe."""
    models = args.work / "models"
    changed: dict[str, Any] = {
        "data.dir": args.data,
        "teacher.model": models / "teacher",
        "cache.dir": args.work / ("cache-unseen" if args.unseen else "cache"),
        "train.steps": args.steps,
        "train.save_every": args.steps,
        "train.warmup_steps": 1,
        "train.batch_size": 16,
        "eval.references": json.dumps({"t5": {"model": str(models / "teacher"), "quantization": "nf4"}}),
        "eval.shots": 2,
        "eval.max_new_tokens": 24,
        "eval.batch_size": 32,
        "eval.metrics.bert_score_model": models / "encoder",
        "eval.metrics.bert_score_layer": 2,
        "run_dir": args.work / ("run-unseen" if args.unseen else "run"),
    }
    for student in STUDENTS:
        changed |= {f"students.{student}.model": models / student, f"students.{student}.dtype": "float32"}
    from pipeline.recipe import load_recipe

    for task in load_recipe("flan-uld").data.tasks:
        if not (args.unseen and task in UNSEEN):
            changed[f"data.tasks.{task}.train"] = args.rows
        changed[f"data.tasks.{task}.eval"] = args.eval
    return changed


def main() -> int:
    """Make the models once, then run the three stages and print the ledgers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/real-uld"))
    parser.add_argument("--rows", type=int, default=2000, help="training rows a task, where there are so many (2000)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of every arm (4)")
    parser.add_argument("--eval", type=int, default=4, help="scored rows a task and split (4)")
    parser.add_argument("--unseen", action="store_true", help="leave mbpp and eng_spa unseen, as the recipe does")
    args = parser.parse_args()
    make_models(args.work / "models", args.data / "tokenizers")
    overrides = [part for key, value in settings(args).items() for part in ("--set", f"{key}={value}")]
    arguments = ["--recipe", "flan-uld", *overrides]
    return subprocess.run([sys.executable, "-m", "pipeline", "run", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
