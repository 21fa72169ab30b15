"""What grows with a cache, and what must not: counted in files and in calls, never in seconds."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_schema.reader import CacheReader
from cache_schema.schema import TEXT
from cache_schema.shard import ShardFile
from cache_schema.verify import verify

OPENED = """
import json, sys
from pathlib import Path
from cache_schema.reader import CacheReader

root, touched = sys.argv[1], []
def note(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(root):
        touched.append([event, str(Path(arguments[0]).relative_to(root))])
sys.addaudithook(note)
reader = CacheReader.open(Path(root))
len(reader), reader.totals()
print(json.dumps(touched))
"""


def test_opening_touches_two_files_whatever_the_number_of_shards(make_toy, tmp_path):
    for shards in (1, 40):
        folder = make_toy(examples=shards, shard_examples=1).build(tmp_path / str(shards))
        ran = subprocess.run([sys.executable, "-c", OPENED, str(folder)], capture_output=True, text=True, check=True)
        assert json.loads(ran.stdout) == [["open", "manifest.json"], ["open", "sealed.json"]]


def calls(work: Callable[[], Any]) -> int:
    """How many functions, of Python and of C, are called, and generators resumed, while `work` runs."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def read_all(folder: Path) -> None:
    """Row by row, all that was read kept in memory."""
    for _ in CacheReader.open(folder).rows(TEXT):
        pass


def resume(toy: Any, folder: Path) -> None:
    """What a process does that finds the last shard missing: look for it, claim it, write it, seal."""
    writer = toy.writer(folder)
    for shard in writer.missing():
        assert writer.claim(shard)
        toy.commit(writer, shard)
    writer.seal()


@pytest.mark.parametrize("shard_examples", [1, 1000], ids=["many shards", "many row groups"])
def test_nothing_grows_faster_than_the_cache(make_toy, tmp_path, monkeypatch, shard_examples):
    """Four times the examples: at most four times the calls of everything that walks through a cache."""
    monkeypatch.setattr("cache_schema.shard.GROUP_VALUES", 1)  # a row group for each row
    counts: dict[str, list[int]] = {}
    for examples in (20, 80):
        toy = make_toy(examples=examples, shard_examples=shard_examples, max_positions=1, top_k=2)
        folder = toy.build(tmp_path / str(examples))

        def unsealed(folder: Path = folder, last: int = toy.manifest.shards - 1) -> None:
            (folder / "sealed.json").unlink()
            (folder / "shards" / f"{last:05d}.json").unlink()

        work: dict[str, Callable[[], Any]] = {
            "open": lambda folder=folder: CacheReader.open(folder).totals(),
            "read": lambda folder=folder: read_all(folder),
            "verify": lambda folder=folder: verify(folder),
            "resume": lambda folder=folder, toy=toy, unsealed=unsealed: (unsealed(), resume(toy, folder)),
        }
        for name, run in work.items():
            run()  # once for what is only done once, imports among it
            counts.setdefault(name, []).append(calls(run))
    for name, (few, many) in counts.items():
        assert many <= 4.1 * few, f"{name}: {few} calls for 20 examples, {many} for 80"


def test_the_footers_kept_are_bounded(make_toy, tmp_path, monkeypatch):
    opened = []
    plain = ShardFile.__init__
    monkeypatch.setattr(ShardFile, "__init__", lambda self, *a: opened.append(a) or plain(self, *a))
    folder = make_toy(examples=6, shard_examples=1).build(tmp_path / "c")
    for most, expected in ((6, 6), (3, 12)):
        monkeypatch.setattr("cache_schema.reader.MAX_FILES", most)
        opened.clear()
        reader = CacheReader.open(folder, memory_bytes=1)
        rows = [*reader.read(range(6)), *reader.read(range(6))]
        assert [row.example_id for row in rows] == [f"toy-{i}" for i in range(6)] * 2
        assert len(opened) == expected
