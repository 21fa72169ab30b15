"""How cost grows: bytes, stage 1 seconds and the time of a stage 2 step, against rows, K, context length and processes.

    python benchmarks/growth.py [--work FOLDER] [--rounds 2] [--out FILE]

The pocket model on one thread a process. One thing is varied at a time, the others stay at 256 rows, K = 16, eight
worked examples and one process. A line through the points in log-log axes has the exponent of the growth as its slope:
1 is in proportion, 0 not at all. The picture is benchmarks/results/growth.png. Two processes on two cores cannot halve
a time where one process uses a part of the second core already.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from harness import RESULTS, Row, finish

from cache_schema.reader import CacheReader
from pipeline.fingerprint import Experiment
from pipeline.recipe import load_recipe

AXES: dict[str, tuple[str, Sequence[int]]] = {  # what is varied -> (its recipe key, values)
    "rows": ("data.tasks.pocket_math.train", (136, 264, 520, 1_032)),
    "K": ("cache.top_k", (4, 8, 16, 32, 64)),
    "context tokens": ("teacher.shots", (1, 2, 4, 8)),
    "processes": ("runtime.processes", (1, 2)),
}
BASE = {"rows": 264, "K": 16, "context tokens": 8, "processes": 1}
MEASURES = {"bytes": "bytes of the cache", "stage 1": "stage 1, s", "step": "stage 2 step, s"}
STEPS = 24


@dataclass(frozen=True)
class Point:
    """A recipe with one thing varied, in a folder of its own."""

    axis: str
    value: int
    work: Path

    @property
    def settings(self) -> list[str]:
        """The recipe's changes: a shard of 32 examples is small enough for two processes to share the work."""
        at = BASE | {self.axis: self.value}
        folder = self.work / f"{self.axis.replace(' ', '-')}-{self.value}"
        return [f"{AXES[axis][0]}={value}" for axis, value in at.items()] + [
            "cache.shard_examples=32",
            f"cache.dir={folder / 'cache'}",
            f"run_dir={folder / 'run'}",
            f"train.steps={STEPS}",
            "train.warmup_steps=1",
        ]

    @property
    def experiment(self) -> Experiment:
        return Experiment(load_recipe("pocket", self.settings))

    def place(self) -> float:
        """Where it stands on its axis: rows that are cached, tokens of the context."""
        if self.axis == "rows":
            return len(self.experiment.training_set.cached)
        if self.axis == "context tokens":
            from stand_ins import context_of

            return len(context_of(self.experiment))
        return self.value


def capture(settings: list[str], rank: int, world: int, ready: Any, seconds: Any) -> None:
    """One process of stage 1: load, wait for the others, capture what it can claim; its seconds go into the queue."""
    import torch

    torch.set_num_threads(1)
    from cache_schema.writer import CacheWriter
    from stage1_teacher.capture import Capture
    from stage1_teacher.executor import ShardWorker
    from stage1_teacher.plan import planned
    from stage1_teacher.teacher import load_teacher

    experiment = Experiment(load_recipe("pocket", settings))
    cached, teacher = experiment.training_set.cached, load_teacher(experiment.recipe, lambda: 0)
    manifest, vocabulary = planned(experiment, ["benchmarks"])
    writer = CacheWriter.open(experiment.cache_dir, manifest, vocabulary)
    worker = ShardWorker(Capture.of(experiment, teacher), cached, writer, {})
    first, missing = rank * manifest.shards // world, writer.missing()
    ready.wait()
    started = time.perf_counter()
    for shard in [*missing[first:], *missing[:first]]:
        worker.work(shard)
    worker.finish()
    seconds.put(time.perf_counter() - started)
    ready.wait()
    if rank == 0:
        writer.seal()


def stage1(point: Point) -> float:
    """Seconds until the last process is done, from when all have their teacher loaded; the cache is made anew."""
    spawn, world = get_context("spawn"), point.value if point.axis == "processes" else 1
    shutil.rmtree(point.experiment.cache_dir, ignore_errors=True)
    ready, seconds = spawn.Barrier(world), spawn.Queue()
    workers = [
        spawn.Process(target=capture, args=(point.settings, rank, world, ready, seconds)) for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    found = [seconds.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    return max(found)


def step(point: Point) -> list[float]:
    """Seconds of every step of stage 2 but the first four, as its own log has them."""
    recipe = point.experiment.recipe
    shutil.rmtree(str(recipe.run_dir), ignore_errors=True)
    arguments = [part for setting in point.settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "stage2_student", "--recipe", "pocket", "--arm", "distill", *arguments]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (log,) = Path(str(recipe.run_dir)).rglob("metrics.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line["tokens"] / line["tokens_per_s"] for line in lines[4:]]


def exponent(places: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the line through the points in log-log axes."""
    return float(np.polyfit(np.log(places), np.log(values), 1)[0])


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Small multiples: a row a cost, a column what is varied; dashed: growth in proportion to the first point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(MEASURES), len(AXES), figsize=(11, 6.5), sharex="col", sharey="row")
    for row, (measure, label) in enumerate(MEASURES.items()):
        for column, axis in enumerate(AXES):
            panel, x, y = axes[row][column], found[axis]["places"], found[axis][measure]
            down = axis == "processes" and measure != "bytes"
            panel.plot(x, [y[0] * (p / x[0]) ** (-1 if down else 1) for p in x], "--", color="0.7", linewidth=1)
            panel.plot(x, y, "o-", color="#1f5f99", markersize=4)
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(x, [f"{p:,.0f}" for p in x])
            panel.minorticks_off()
            panel.set_title(f"exponent {exponent(x, y):+.2f}", fontsize=9, loc="right")
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25)
        axes[row][0].set_ylabel(label)
    for column, axis in enumerate(AXES):
        axes[-1][column].set_xlabel(axis)
    figure.suptitle("What a cost grows with (pocket model; dashed: in proportion, for processes: halved by two)")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> int:
    """Measure every axis, fit, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/growth"))
    parser.add_argument("--rounds", type=int, default=2, help="of stage 1; the median counts")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    rows = []
    for axis, (_, values) in AXES.items():
        points = [Point(axis, value, args.work) for value in values]
        times = [[stage1(point) for point in points] for _ in range(args.rounds)]
        measured = {
            "places": [point.place() for point in points],
            "stage 1": [median(of_point) for of_point in zip(*times, strict=True)],
            "bytes": [CacheReader.open(point.experiment.cache_dir).totals().bytes for point in points],
            "step": [median(step(point)) for point in points],
        }
        found[axis] = measured
        for measure, label in MEASURES.items():
            slope = exponent(measured["places"], measured[measure])
            goal = "" if axis == "processes" else "<= 1.1"
            low, high = min(measured[measure]), max(measured[measure])
            note = f"{low:,.3g} to {high:,.3g}"
            rows.append(Row.single(f"growth of {label.split(',')[0]}", f"{axis}", slope, goal, "exponent", note))
        print(axis, measured, flush=True)
    picture = (args.out or RESULTS / "growth.json").with_suffix(".png")
    draw(found, picture)
    finish("growth", rows, {"threads a process": 1, "measured": found}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
