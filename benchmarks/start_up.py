"""How long a command line takes to answer: `--help` of every package, against an empty Python and against torch alone.

    python benchmarks/start_up.py [--rounds 9] [--out FILE]

Every run is a process of its own, files in the page cache. An empty Python (`python -c pass`) is the limit;
`python -c "import torch"` is what `--help` would take if a module imported at the top what a stage needs.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from harness import Row, finish, side_by_side

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "stage1_teacher", "stage2_student", "stage3_eval", "cache_schema")
LIMIT_S = 0.3


def main() -> None:
    """Measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    commands = {f"python -m {package} --help": ["-m", package, "--help"] for package in PACKAGES}
    commands |= {"python -c pass": ["-c", "pass"], "python -c 'import torch'": ["-c", "import torch"]}
    times = side_by_side({name: run(command) for name, command in commands.items()}, args.rounds)
    rows = []
    for package in PACKAGES:
        name = f"python -m {package} --help"
        taken = times[name]
        note = f"{modules(package)} modules, {modules(None)} in an empty Python"
        goal = f"<= {LIMIT_S:g}"
        rows.append(Row(f"`{name}`", "", median(taken), min(taken), max(taken), goal, "s", note))
    mine = times["python -m pipeline --help"]
    for against in ("python -c pass", "python -c 'import torch'"):
        rows.append(Row.of_times("`python -m pipeline --help`", f"`{against}`", mine, times[against]))
    finish("start_up", rows, {"rounds": args.rounds}, args.out)


def run(arguments: list[str]) -> Callable[[], object]:
    """Python with these arguments, its output thrown away."""
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def modules(package: str | None) -> int:
    """How many modules are loaded when a package's `--help` has been printed, or by Python itself."""
    arguments = ["-c", "pass"] if package is None else ["-m", package, "--help"]
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sum("|" in line for line in ran.stderr.splitlines()) - 1  # less the header


if __name__ == "__main__":
    main()
