"""Run the benchmarks one after another and put what they found into COSTS.md and the README: `make bench`.

    python benchmarks/bench.py [--only stage2_cost cache_bytes] [--data FOLDER] [--table]

Each script runs in a process of its own and writes benchmarks/results/<name>.json; both tables are made of those
files alone, between their markers. --table makes it again without measuring. Let nothing else run on the machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import RESULTS, Row, write_between

HERE = Path(__file__).parent
SCRIPTS = (  # in the order of the table
    "stage2_cost",
    "whole_run",
    "stage1_cost",
    "teacher_engines",
    "cache_bytes",
    "cache_read",
    "open_many",
    "sampled_bias",
    "stage3_cost",
    "stage3_vllm",
    "start_up",
    "growth",
)


STEP = "stage 2 step, `distill` from the cache (mid)"
HEADLINE = (
    (STEP, "the same step, `sft`"),
    (STEP, "the same step, online, as published"),
    (STEP, "the same step, online, best"),
    ("first run, stages 1 and 2 (mid)", "the run with an online teacher, as published"),
    ("first run, stages 1 and 2 (mid)", "the run with an online teacher, best"),
    ("every further student (mid)", "the run with an online teacher, best"),
    ("stage 1, examples/s with an 8-shot context (mid)", "a plain forward of the whole sequence, all logits"),
    ("bytes a position, fine, perplexity 16", "raw 1536, DistillKit 632"),
    ("bytes a position, rank-only, perplexity 16", "DistillKit's 632"),
    ("read, verify and decode, one core", "what one H200 consumes, 3,549 positions/s"),
    ("stage 3 vllm, 5 checkpoints", "5 engine starts"),
)
BRIEF = ("sampled_bias", "stage3_cost", "start_up", "open_many")  # of these, what has a goal is enough
IN_A_PICTURE = ("growth",)


def run(name: str, data: str | None) -> bool:
    """One script in a process of its own; whether it ended well."""
    print(f"\n=== {name}", flush=True)
    started = time.monotonic()
    environment = os.environ | ({"LOGITBANK_DATA": data} if data else {})
    code = subprocess.run([sys.executable, str(HERE / f"{name}.py")], env=environment, check=False).returncode
    print(f"=== {name}: exit code {code} after {time.monotonic() - started:.0f} s", flush=True)
    return code == 0


def table(results: dict[str, dict[str, Any]]) -> str:
    """The table, from all results, and where they were measured."""
    lines = ["| what | against | measured | goal |", "| --- | --- | ---: | --- |"]
    places: dict[str, list[str]] = {}
    for name, result in results.items():
        for fields in result["rows"] if name not in IN_A_PICTURE else []:
            row = Row(**{key: value for key, value in fields.items() if key != "met"})
            if row.goal or name not in BRIEF:
                verdict = ": **missed**" if row.met is False else ""
                lines.append(f"| {row.what} | {row.against} | {row.figure()} | {row.goal}{verdict} |")
        machine = result["machine"]
        place = f"{machine['cores']} cores of {machine['cpu']}, {machine['gpu'] or 'no GPU'}; torch {machine['torch']}"
        places.setdefault(f"{place}; commit {result['commit']}, {result['date']}", []).append(name)
    where = [f"{', '.join(names)}: {place}." for place, names in places.items()]
    return "\n".join([*lines, "", *(where if len(where) > 1 else [f"Measured on {next(iter(places))}."])])


def headline(results: dict[str, dict[str, Any]]) -> str:
    """The README's table: of each question one row of the whole table."""
    rows = {(row["what"], row["against"]): row for result in results.values() for row in result["rows"]}
    lines = ["| what | against | measured |", "| --- | --- | ---: |"]
    for key in HEADLINE:
        if key not in rows:
            sys.exit(f"{RESULTS}: no row {key}, which the README's table shows; change HEADLINE here")
        row = Row(**{field: value for field, value in rows[key].items() if field != "met"})
        lines.append(f"| {row.what} | {row.against} | {row.figure()} |")
    return "\n".join(lines)


def write_tables(results: Path = RESULTS) -> None:
    """The whole table into COSTS.md, its headline into the README."""
    found = {name: json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in _there(results)}
    write_between(HERE / "COSTS.md", "benchmarks", table(found))
    write_between(HERE.parent / "README.md", "costs", headline(found))


def _there(results: Path) -> list[str]:
    return [name for name in SCRIPTS if (results / f"{name}.json").is_file()]


def main() -> int:
    """Measure what was asked for, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), metavar="NAME", help="not all")
    parser.add_argument("--data", help="real texts and tokenizers; LOGITBANK_DATA unless given")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    args = parser.parse_args()
    failed = [] if args.table else [name for name in args.only if not run(name, args.data)]
    write_tables()
    if failed:
        print(f"failed: {', '.join(failed)}; what they had found before is still in the table", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
