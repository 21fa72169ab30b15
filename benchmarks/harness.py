"""What the benchmarks share: measuring side by side, and saying what was measured, where. No figure is taken alone.

    times = side_by_side({"distill": step, "sft": other}, rounds=7)          # seconds of each round
    rows = [Row.of_times("stage 2 step, distill", "sft", times["distill"], times["sft"], "<= 1.05")]
    finish("stage2_step", rows, {"model": "..."}, args.out)                   # prints the table, writes the JSON

A ratio is the median over rounds of one round's ratio, with the least and the largest: rounds are interleaved, so what
else the machine does at the time meets both sides alike.
"""

import json
import operator
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
_HOLDS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Row:
    """One line of a table: `what` held `against` something. `unit` is x for a ratio; low and high span the rounds."""

    what: str
    against: str
    value: float
    low: float
    high: float
    goal: str = ""  # such as "<= 1.05", or empty
    unit: str = "x"
    note: str = ""

    @classmethod
    def of_times(
        cls, what: str, against: str, mine: Sequence[float], theirs: Sequence[float], goal: str = "", note: str = ""
    ) -> "Row":
        """The ratio mine / theirs of interleaved rounds."""
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        return cls(what, against, median(ratios), min(ratios), max(ratios), goal, "x", note)

    @classmethod
    def single(cls, what: str, against: str, value: float, goal: str = "", unit: str = "x", note: str = "") -> "Row":
        """A figure that does not vary, such as bytes."""
        return cls(what, against, value, value, value, goal, unit, note)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return bool(_HOLDS[sign](self.value, float(bound)))

    def figure(self) -> str:
        """The value with its unit and, where rounds differ, their range."""
        spread = "" if self.low == self.high else f" [{_short(self.low)}, {_short(self.high)}]"
        return _short(self.value) + ("" if self.unit == "x" else f" {self.unit}") + spread

    def markdown(self) -> str:
        """A line of the table."""
        goal = {True: f"{self.goal} met", False: f"{self.goal} **missed**", None: ""}[self.met]
        return f"| {self.what} | {self.against} | {self.figure()} | {goal} | {self.note} |"


HEADER = "| what | against | figure | goal | |\n| --- | --- | ---: | --- | --- |"


def side_by_side(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every run in every round. The runs take turns, and the order turns round with every round."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for name in names if number % 2 else reversed(names):
            started = clock()
            runs[name]()
            if number >= 0:
                times[name].append(clock() - started)
    return times


def finish(name: str, rows: Sequence[Row], conditions: Mapping[str, Any], out: Path | None = None) -> None:
    """Print the table and write it, with the machine and the commit, to `out` or benchmarks/results/<name>.json."""
    print("\n".join(["", HEADER, *(row.markdown() for row in rows), ""]))
    for key, value in conditions.items():
        print(f"{key}: {value}")
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": name,
        "machine": machine(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "conditions": dict(conditions),
        "rows": [asdict(row) | {"met": row.met} for row in rows],
    }
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path}")


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, accelerator, versions."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    packages = ("torch", "transformers", "pyarrow", "numpy")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def commit() -> str:
    """The commit that is measured; marked where tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!results", ":!COSTS.md")
    return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")


def data_folder(given: Path | None) -> Path:
    """The folder of <task>/{train,test}.jsonl and tokenizers/; without one there is nothing to measure, said so."""
    folder = given or (Path(os.environ["LOGITBANK_DATA"]) if os.environ.get("LOGITBANK_DATA") else None)
    if folder is None or not folder.is_dir():
        print(
            f"skipped: it needs real texts and tokenizers; found {folder}. Give --data FOLDER or LOGITBANK_DATA=FOLDER"
        )
        sys.exit(0)
    return folder


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def write_between(page: Path, marker: str, text: str) -> None:
    """Replace what stands between a page's `<!-- marker: begin -->` and `<!-- marker: end -->`."""
    begin, end = (f"<!-- {marker}: {which} -->" for which in ("begin", "end"))
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, there, after = rest.partition(end)
    if not there:
        sys.exit(f"{page}: expected the lines {begin} and {end}; put them where the table belongs")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
