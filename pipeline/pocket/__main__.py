"""Pre-trains the pocket model and measures it.

    python -m pipeline.pocket --out weights --minutes 23          # the run that the weights here are a checkpoint of
    python -m pipeline.pocket --out weights --steps 6000 --seed 1 # the same steps on any machine
    python -m pipeline.pocket --start weights --out more --minutes 8
    python -m pipeline.pocket --out weights --measure-only        # 0-shot and 8-shot accuracy of weights that exist

The folder can be used in a recipe at once (`--set teacher.model=weights --set students.pocket.model=weights`). Where
glibc is the C library, `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in the environment made a run about a tenth faster.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

PROVENANCE = "provenance.json"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m pipeline.pocket", description="Pre-train the pocket model on generated word problems."
    )
    p.add_argument("--out", type=Path, required=True, help="folder for the weights, the tokenizer and provenance.json")
    p.add_argument("--start", type=Path, help="go on with the model in this folder instead of a fresh one")
    length = p.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for so long")
    length.add_argument("--steps", type=int, help="train for so many optimizer steps")
    length.add_argument("--measure-only", action="store_true", help="train nothing; measure the model in --out")
    p.add_argument("--seed", type=int, default=0, help="seeds the weights and the documents (0)")
    p.add_argument("--problems", type=int, default=1000, help="validation problems to measure on (1000)")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(arguments)
    if args.out.exists() and not args.out.is_dir():
        print(f"{args.out}: found a file where a folder is needed; choose another --out", file=sys.stderr)
        return 2
    if (args.minutes or args.steps or 1) <= 0:
        print("--minutes and --steps must be above zero", file=sys.stderr)
        return 2

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    from pipeline.pocket.measure import measure
    from pipeline.pocket.pretrain import Settings, going_on, pretrain
    from pipeline.pocket.tokenizer import build_tokenizer

    def log(message: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {message}", flush=True)

    for folder in [args.out] if args.measure_only else [args.start] if args.start else []:
        if not (folder / "config.json").is_file():
            print(f"{folder}: no model here (no config.json); train one with --minutes 25", file=sys.stderr)
            return 2
    if args.measure_only:
        tokenizer: Any = AutoTokenizer.from_pretrained(args.out)
        model: Any = AutoModelForCausalLM.from_pretrained(args.out).eval()
        torch.set_num_threads(1)  # steps of a few tokens: two threads mostly wait for each other
        record: dict[str, Any] = {}
    else:
        settings = Settings(seed=args.seed, steps=args.steps, minutes=args.minutes)
        tokenizer = build_tokenizer()
        start: Any = None
        if args.start is not None:
            settings, start = going_on(settings), AutoModelForCausalLM.from_pretrained(args.start)
        model, record = pretrain(settings, tokenizer, args.out, log, start)
        record |= {"torch": torch.__version__, "transformers": __version__}

    record["validation"] = []
    for shots in (0, 8):
        found = measure(model, tokenizer, args.problems, shots)
        record["validation"].append(found)
        log(
            f"{shots} shots: {found['accuracy']:.3f} right of n={found['n']} (95% {found['interval_95'][0]:.3f} to "
            f"{found['interval_95'][1]:.3f}), {found['answered_in_steps']:.0%} answered in steps"
        )
    if not args.measure_only:
        (args.out / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
    log(f"weights in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
