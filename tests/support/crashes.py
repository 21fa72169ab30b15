"""What the crash tests share: a process that writes a cache, what must be equal in the end, and disks with no room."""

import json
import subprocess
from pathlib import Path

import pytest
from forks import ROOT

LONG = [pytest.mark.slow, pytest.mark.timeout(1800)]
TOY_OF_THE_CACHE = ROOT / "tests" / "cache_schema" / "conftest.py"

LOAD_TOY = f"""
import importlib.util, os, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("toys_of_the_cache", {str(TOY_OF_THE_CACHE)!r})
module = sys.modules["toys_of_the_cache"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
Toy = module.Toy
"""

WRITER = (
    LOAD_TOY
    + """
from dataclasses import replace
from cache_schema.errors import CacheError
from cache_schema.writer import CacheWriter
__import__("pyarrow").array([""])  # imports pandas if it is there: once, here, and not in every child

def careless_link(source, name):
    with open(name, "xb") as file:  # in place: it has its name before it has its content
        file.write(Path(source).read_bytes())

def run(folder, how=""):
    if how == "careless":
        os.link = careless_link
    toy = Toy(examples=6, shard_examples=2, quarantined={3: "empty answer"})
    patience = {"stale_after_s": 0.001} if how == "impatient" else {}
    try:
        writer = CacheWriter.open(Path(folder), toy.manifest, toy.vocabulary, **patience)
        for shard in writer.missing()[: 1 if how == "one shard" else None]:
            if writer.claim(shard):
                rows, bad = toy.shard(shard)
                if how == "impatient":  # other bytes than anyone else's
                    rows = [replace(row, prompt="impatient") for row in rows]
                writer.commit(shard, rows, bad, {"device": how or "cpu"})
        if not writer.missing() and how != "one shard":
            writer.seal()
    except CacheError as error:
        print(f"error: {error}")
        return error.exit_code
"""
)


# --- what must be equal ----------------------------------------------------------------------------------------------


def cache_content(cache: Path) -> dict[str, object]:
    """Every file of a cache; documents as what they say, but for who made it when and where."""
    found: dict[str, object] = {}
    for path in sorted(p for p in cache.rglob("*") if p.is_file()):
        name = str(path.relative_to(cache))
        found[name] = _without_provenance(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()
    return found


def _without_provenance(tree: object) -> object:
    if isinstance(tree, list):
        return [_without_provenance(branch) for branch in tree]
    if isinstance(tree, dict):  # the checksum is of all fields, and so of the provenance too
        return {k: _without_provenance(v) for k, v in tree.items() if k not in ("provenance", "checksum")}
    return tree


def run_content(run: Path) -> dict[str, object]:
    """Every file of the trained students in a run folder, but for how fast they were and TensorBoard's copy of that."""
    found: dict[str, object] = {}
    for path in sorted(p for p in (run / "students").rglob("*") if p.is_file()):
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[str(path.relative_to(run))] = [{**line, "tokens_per_s": None} for line in lines]
        elif "tensorboard" not in path.parts:
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


def cache_sound(cache: Path) -> int:
    """How many shards are committed; fails unless everything is either whole or not there."""
    from cache_schema.errors import NotACache
    from cache_schema.reader import CacheReader
    from cache_schema.verify import verify

    if not (cache / "manifest.json").exists():
        with pytest.raises(NotACache):
            CacheReader.open(cache, require_sealed=False)
        return 0
    report = verify(cache)
    assert report.good, report.problems
    reader = CacheReader.open(cache, require_sealed=False)
    assert len(list(reader.rows())) == sum(record.rows for record in report.records)
    return len(report.records)


# --- small disks -----------------------------------------------------------------------------------------------------


class SmallDisk:
    """A small file system in memory, mounted in a namespace of its own: it ends with this object, whatever happens.

    path: where everybody sees it, through the process that holds the namespace.
    """

    def __init__(self, folder: Path, options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        hold = f"mount -t tmpfs -o {options} tmpfs {folder} && echo ready && exec sleep 1000000"
        command = ["unshare", "--mount", "sh", "-c", hold]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != "ready\n":
            said = self._holder.stderr.read().strip()
            self.__exit__()
            pytest.skip(f"a small file system cannot be mounted here: {said}")
        self.path = Path(f"/proc/{self._holder.pid}/root{folder}")

    def remount(self, options: str) -> None:
        """With another size, or read-only."""
        command = ["nsenter", "--mount", "--target", str(self._holder.pid)]
        subprocess.run([*command, "mount", "-o", f"remount,{options}", str(self._folder)], check=True)

    def __enter__(self) -> "SmallDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.kill()
        self._holder.communicate()
