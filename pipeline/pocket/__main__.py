"""Pre-trains an embedded model and measures it.

    python -m pipeline.pocket --model decoder --out weights --minutes 23    # of `pocket`: teacher and student
    python -m pipeline.pocket --model t5 --out weights --minutes 20         # of `pocket-uld`: the teacher
    python -m pipeline.pocket --model gpt2 --out weights --minutes 20       # of `pocket-uld`: the student
    python -m pipeline.pocket --out weights --steps 6000 --seed 1           # the same steps on any machine
    python -m pipeline.pocket --start weights --out more --minutes 8
    python -m pipeline.pocket --out weights --measure-only                  # measure weights that exist

The folder can be used in a recipe at once (`--set teacher.model=weights --set students.pocket.model=weights`). Where
glibc is the C library, `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in the environment made a run about a tenth faster.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline import output
from pipeline.cli import examples, parsed

PROVENANCE = "provenance.json"
COURSES = {"decoder": "DecoderCourse", "t5": "T5Course", "gpt2": "GPT2Course"}
"""Model name, which is also its module's -> the class of its course."""
EXAMPLES = (
    "python -m pipeline.pocket --model decoder --out weights --minutes 23",
    "python -m pipeline.pocket --model t5 --out weights --steps 6000 --seed 1",
    "python -m pipeline.pocket --start weights --out more --minutes 8",
    "python -m pipeline.pocket --out weights --measure-only",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m pipeline.pocket",
        description="Pre-train an embedded model on generated text.",
        **examples(EXAMPLES),
    )
    p.add_argument("--model", choices=sorted(COURSES), default="decoder", help="which of the embedded models (decoder)")
    p.add_argument("--out", type=Path, required=True, help="folder for the weights, the tokenizer and provenance.json")
    p.add_argument("--start", type=Path, help="go on with the model in this folder instead of a fresh one")
    length = p.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for so long")
    length.add_argument("--steps", type=int, help="train for so many optimizer steps")
    length.add_argument("--measure-only", action="store_true", help="train nothing; measure the model in --out")
    p.add_argument("--seed", type=int, default=0, help="seeds the weights and the texts (0)")
    output.add_output_arguments(p)
    p.add_argument("--items", type=int, default=1000, help="validation items of each kind to measure on (1000)")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parsed(parser(), arguments)
    if args.out.exists() and not args.out.is_dir():
        print(f"{args.out}: found a file where a folder is needed; choose another --out", file=sys.stderr)
        return 2
    if (args.minutes or args.steps or 1) <= 0:
        print("--minutes and --steps must be above zero", file=sys.stderr)
        return 2
    old = args.out if args.measure_only else args.start
    if old is not None and not (old / "config.json").is_file():
        print(f"{old}: no model here (no config.json); train one with --minutes 25", file=sys.stderr)
        return 2

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, __version__
    from transformers.utils import logging as transformers_logging

    from pipeline.pocket.pretrain import going_on, pretrain

    def log(message: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {message}", flush=True)

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    module = import_module(f"pipeline.pocket.{args.model}")
    settings = replace(module.SETTINGS, seed=args.seed, steps=args.steps, minutes=args.minutes)
    model: Any = None
    if old is not None:
        kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(old).is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(old).eval()
        settings = going_on(settings)
    course = getattr(module, COURSES[args.model])(settings)
    record: dict[str, Any] = {}
    if not args.measure_only:
        model, record = pretrain(settings, course, args.out, log, model)
        record |= {"model": args.model, "torch": torch.__version__, "transformers": __version__}

    torch.set_num_threads(1)  # steps of a few tokens: two threads mostly wait for each other
    record["validation"] = course.measure(model, args.items)
    for found in record["validation"]:
        log("  ".join(f"{key} {value}" for key, value in found.items()))
    if not args.measure_only:
        (args.out / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
    output.facts(validation=record["validation"])
    output.result(f"{time.strftime('%H:%M:%S')}  weights in {args.out}", weights=str(args.out))
    return 0


if __name__ == "__main__":
    with output.whole():  # not `guarded`: Ctrl-C ends the training early, and saves and measures what there is
        code = main()
        output.finish(code)
    sys.exit(code)
