"""What of the cache's promises was tried, how often, and what was lost: runs their tests and counts.

    python benchmarks/promises.py [--quick] [--table]

The tests are those marked `promise`, the slow ones too unless --quick. Each says what it tried and how often, and fails
if anything is lost. Writes benchmarks/results/promises.json and the tables in PROMISES.md and the README, between
their markers; --table makes them again from the file.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from harness import RESULTS, commit, machine, write_between

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

import promised  # noqa: E402

RESULT = RESULTS / "promises.json"


def run(quick: bool) -> dict[str, Any]:
    """Run the tests; promise -> what was tried how often, which files prove it, what failed or was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        which = "promise and not slow" if quick else "promise"
        command = [sys.executable, "-m", "pytest", "-m", which, "-n", "2"]
        command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]  # the later ones have no properties
        started = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        seconds = time.monotonic() - started
        if code not in (0, 1) or not report.is_file():
            sys.exit("the tests did not run to their end; see above")
        found = {promise: _Found() for promise in promised.ALL}
        for case in ET.parse(report).iter("testcase"):  # noqa: S314
            _add(found, case)
    missing = [promise for promise, proof in found.items() if not proof.tests]
    if missing:
        sys.exit(f"no test proves: {'; '.join(missing)}")
    return {
        "machine": machine(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "quick": quick,
        "seconds": round(seconds),
        "promises": {promise: proof.as_json() for promise, proof in found.items()},
    }


class _Found:
    """Of one promise."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.files: set[str] = set()
        self.lost: list[str] = []
        self.skipped: list[str] = []
        self.tests = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "tried": dict(self.tried),
            "lost": self.lost,
            "skipped": self.skipped,
            "tests": self.tests,
            "files": sorted(self.files),
        }


def _add(found: dict[str, _Found], case: ET.Element) -> None:
    """One test's count."""
    name = f"{case.get('classname', '')}::{case.get('name', '')}"
    properties = [(item.get("name"), item.get("value", "")) for item in case.iter("property")]
    sentences = [value for key, value in properties if key == "promise"]
    failed = case.find("failure") is not None or case.find("error") is not None
    if unknown := set(sentences) - found.keys():
        sys.exit(f"{name} proves a promise that is not listed: {unknown.pop()}")
    skipped = case.find("skipped")
    if not failed and skipped is None and not any(key == "tried" for key, _ in properties):
        sys.exit(f"{name} proves a promise and does not say what it tried")
    for sentence in sentences:
        proof = found[sentence]
        proof.tests += 1
        proof.files.add(case.get("classname", "").replace(".", "/") + ".py")
        if failed:
            proof.lost.append(name)
        if skipped is not None:
            proof.skipped.append(f"{name}: {skipped.get('message', '')}")
        for key, value in properties:
            if key == "tried":
                count, what = re.fullmatch(r"(\d+) (.*)", value, re.DOTALL).groups()  # type: ignore[union-attr]
                proof.tried[what] += int(count)


def table(result: dict[str, Any]) -> str:
    """The table of the page."""
    lines = ["| promise | tried | lost | proof |", "| --- | --- | ---: | --- |"]
    for promise, proof in result["promises"].items():
        tried = ", ".join(f"{count:,} {what}" for what, count in proof["tried"].items())
        skipped = f" ({len(proof['skipped'])} tests skipped here)" if proof["skipped"] else ""
        lost = f"**{len(proof['lost'])}**" if proof["lost"] else "0"
        places = ", ".join(f"`{_short(place)}`" for place in proof["files"])
        lines.append(f"| {promise} | {tried}{skipped} | {lost} | {places} |")
    where = f"{result['machine']['cores']} cores of {result['machine']['cpu']}, {result['machine']['gpu'] or 'no GPU'}"
    which = "the quick tests" if result["quick"] else "all tests"
    return "\n".join([*lines, "", f"{which} in {result['seconds']} s on {where}; commit {result['commit']}."])


def _short(place: str) -> str:
    return place.removeprefix("tests/")


def headline(result: dict[str, Any]) -> str:
    """The README's table: how often anything was tried against each promise."""
    lines = ["| promise | tried | lost |", "| --- | ---: | ---: |"]
    for promise, proof in result["promises"].items():
        lines.append(f"| {promise} | {sum(proof['tried'].values()):,} | {len(proof['lost'])} |")
    return "\n".join(lines)


def write_tables() -> None:
    """The whole table into PROMISES.md, its headline into the README."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    write_between(Path(__file__).parent / "PROMISES.md", "promises", table(result))
    write_between(ROOT / "README.md", "promises", headline(result))


def main() -> int:
    """Run, count, write; not zero where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="without the tests marked slow")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    args = parser.parse_args()
    if not args.table:
        RESULT.write_text(json.dumps(run(args.quick), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_tables()
    print(table(json.loads(RESULT.read_text(encoding="utf-8"))))
    return 1 if any(proof["lost"] for proof in json.loads(RESULT.read_text())["promises"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
