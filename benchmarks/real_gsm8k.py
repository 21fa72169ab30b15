"""The gsm8k-qwen3 recipe on real rows with the real tokenizer, and a small random-weight Qwen3 of the true vocabulary.

    python benchmarks/real_gsm8k.py --data FOLDER --tokenizer FOLDER [--work FOLDER] [--rows 7473]

For machines that cannot hold the real teacher: everything is the published recipe but the model, whose weights mean
nothing. What it prints is real: rows, positions, quarantine, bytes per position at K = 256 and a vocabulary of 151,936.
FOLDER of --data has gsm8k/{train,test}.jsonl; FOLDER of --tokenizer has a Qwen tokenizer.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

VOCABULARY = 151_936  # of Qwen3's head; its tokenizer names fewer


def make_model(folder: Path, tokenizer_folder: Path, seed: int = 0) -> None:
    """A Qwen3 decoder with random weights and the tokenizer beside it, as save_pretrained leaves them.

    The weights are drawn wide (standard deviation 0.3), so that its distributions are peaked rather than uniform.
    """
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)


def main() -> int:
    """Make the model once, then run the three stages and print the ledgers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/real-gsm8k"))
    parser.add_argument("--rows", type=int, default=None, help="training rows; all 7,473 unless given")
    args = parser.parse_args()
    model = args.work / "model"
    if not (model / "config.json").is_file():
        make_model(model, args.tokenizer)
    settings = {
        "data.dir": args.data,
        "data.train_limit": args.rows,
        "data.eval_limit": 8,
        "teacher.model": model,
        "teacher.dtype": "float32",  # faster than bfloat16 on a CPU without its instructions
        "teacher.thinking": "null",  # the local Qwen1.5 template has no switch, and the recipe would be refused
        "cache.dir": args.work / "cache",
        "students.qwen3.model": model,
        "students.qwen3.dtype": "float32",
        "train.steps": 4,
        "train.save_every": 2,
        "train.warmup_steps": 1,
        "eval.engine": "hf",
        "eval.max_new_tokens": 24,
        "eval.batch_size": 8,
        "run_dir": args.work / "run",
    }
    overrides = [part for key, value in settings.items() if value is not None for part in ("--set", f"{key}={value}")]
    code = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", "--recipe", "gsm8k-qwen3", *overrides], check=False
    ).returncode
    if code == 0:
        report(args.work / "cache")
    return code


def report(cache_dir: Path) -> None:
    """The two ledgers and the size, as one JSON object."""
    from cache_schema.reader import CacheReader

    reader = CacheReader.open(cache_dir)
    totals = reader.totals()
    print(
        json.dumps(
            {
                "examples": str(totals.examples),
                "positions": str(totals.positions),
                "bytes": totals.bytes,
                "bytes_per_position": round(totals.bytes_per_position, 1),
                "codec_error_max": totals.codec_error_max,
                "top_k": reader.manifest.top_k,
                "vocab_size": reader.manifest.vocab_size,
                "training_rows": reader.manifest.provenance["rows"],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
