"""The pocket experiment over several training seeds: the README's table.

    python benchmarks/pocket_seeds.py [--seeds 0 1 2 3 4] [--work runs/pocket-seeds] [--set key=value ...]

One cache serves all seeds (the training seed is no part of its identity); each seed trains every arm and scores its
last checkpoint on all test problems. What is there is not done again. Prints a Markdown table and writes seeds.json.

Intervals are 95 %. A baseline has one run: Wilson's over the test problems. An arm's mean over seeds, and the
difference of two arms paired by seed and by problem, have the interval of `stage3_eval.compare.over_seeds`: which
problems were drawn and which seed, in quadrature.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage3_eval.compare import over_seeds

STUDENT, TASK, METRIC = "pocket", "pocket_math", "strict"


def run_seed(seed: int, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the recipe with one training seed (or find it done); its conditions on the test problems."""
    run_dir = folder / f"seed-{seed}"
    settings = [*overrides, f"train.seed={seed}", f"run_dir={run_dir}"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "pipeline", "run", "--recipe", "pocket", *arguments]
    print(f"--- seed {seed}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)
    results = json.loads((run_dir / "report" / "results.json").read_text(encoding="utf-8"))
    conditions: dict[str, Any] = results["students"][STUDENT]["blocks"]["test"][TASK][METRIC]["rows"]
    return conditions


def summary(by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Every condition, and every arm's difference to sft."""
    first = next(iter(by_seed.values()))
    out: dict[str, Any] = {}
    for name, cell in first.items():
        cells = [conditions[name] for conditions in by_seed.values()]
        if cell["checkpoint"] is None:  # a baseline: no training, the same in every run
            out[name] = {"n": cell["n"], "mean": cell["mean"], "interval": cell["interval"], "seeds": []}
            continue
        out[name] = {"n": cell["n"], **_row([c["mean"] for c in cells], [c["standard_error"] for c in cells])}
        if cell["difference"] is not None:
            found = [c["difference"] for c in cells]
            widths = [(d["interval"][1] - d["interval"][0]) / (2 * 1.96) for d in found]
            out[name]["difference_to_sft"] = _row([d["mean"] for d in found], widths)
    return out


def _row(values: Sequence[float], errors: Sequence[float]) -> dict[str, Any]:
    found = over_seeds(values, errors)
    return {"mean": found.mean, "interval": [found.low, found.high], "seeds": list(values)}


def table(rows: dict[str, Any]) -> str:
    """The Markdown table."""

    def points(cell: dict[str, Any]) -> str:
        low, high = cell["interval"]
        return f"{100 * cell['mean']:.1f} | {100 * low:.1f} to {100 * high:.1f}"

    lines = [
        "| condition | n | accuracy, % | 95 % interval | single seeds | minus sft, points | 95 % interval |",
        "| --- | ---: | ---: | --- | --- | ---: | --- |",
    ]
    for name, cell in rows.items():
        seeds = " ".join(f"{100 * value:.1f}" for value in cell["seeds"]) or "not trained"
        gain = points(cell["difference_to_sft"]) if "difference_to_sft" in cell else " | "
        lines.append(f"| {name} | {cell['n']} | {points(cell)} | {seeds} | {gain} |")
    return "\n".join(lines)


def main() -> int:
    """Run what is missing, then print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--work", type=Path, default=Path("runs/pocket-seeds"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    if len(set(args.seeds)) < 3:
        parser.error("an interval over seeds needs three different ones at least")
    rows = summary({seed: run_seed(seed, args.work, args.overrides) for seed in args.seeds})
    (args.work / "seeds.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
