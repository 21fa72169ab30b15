"""Damage to one file of a cache, again and again, and what a reader and `verify` make of it. In a process of its own.

    found = sweep(cache, path, damages)      # one str for each damage that was taken for data, or found by nobody

A child does the reading: a crash of Parquet's reader is a finding too, with the damage that led to it.
"""

import base64
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Damage = tuple[str, bytes]  # in words; the bytes of the whole file instead


def sweep(cache: Path, path: Path, damages: Iterable[Damage]) -> list[str]:
    """Put each damage in the place of the file in turn. The file is whole again afterwards."""
    before = path.read_bytes()
    lines = "".join(f"{json.dumps([what, base64.b64encode(data).decode()])}\n" for what, data in damages)
    root = Path(__file__).parent.parent.parent
    ran = subprocess.run(
        [sys.executable, "-W", "error", __file__, str(cache), str(path)],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    path.write_bytes(before)
    *told, last = ran.stdout.splitlines() or [""]
    if ran.returncode or not last.startswith("done"):
        return [f"the reader's process ended with {ran.returncode} at {last}: {ran.stderr[-2000:]}"]
    assert last == f"done {lines.count(chr(10))}", last
    return [line.removeprefix("found ") for line in told if line.startswith("found ")]


def rows_of(reader: Any, columns: Any, errors: Any) -> list[Any]:
    """Every row as comparable values, or the CacheError that came instead of it."""
    import numpy as np

    rows: list[Any] = []
    for i in range(len(reader)):
        try:
            (row,) = reader.read([i], columns)
        except errors as error:
            rows.append(error)
        else:
            arrays = {n: v for n, v in vars(row).items() if isinstance(v, np.ndarray)}
            rows.append(vars(row) | {n: (v.dtype.str, v.shape, v.tobytes()) for n, v in arrays.items()})
    return rows


def _main(cache: Path, path: Path) -> None:
    from cache_schema.errors import CacheError
    from cache_schema.reader import CacheReader
    from cache_schema.schema import Columns

    reader = CacheReader.open(cache)
    truth = {columns: rows_of(reader, columns, CacheError) for columns in Columns}
    facts = (reader.manifest, reader.records, reader.vocabulary())
    shards = [record.shard for record in reader.records for _ in range(record.rows)]
    assert not any(isinstance(row, CacheError) for rows in truth.values() for row in rows)
    before, count = path.read_bytes(), 0
    for line in sys.stdin:
        what, damaged = json.loads(line)
        print(f"at {what}", flush=True)
        data = base64.b64decode(damaged)
        path.write_bytes(data)
        for found in _findings(cache, path, before, data, truth, facts, shards):
            print(f"found {what}: {found}", flush=True)
        count += 1
    print(f"done {count}")


def _findings(cache: Path, path: Path, before: bytes, data: bytes, truth: Any, facts: Any, shards: Any) -> list[str]:
    from cache_schema.errors import CacheError
    from cache_schema.verify import verify

    is_data = path.suffix == ".parquet"
    try:
        harmless = data == before or (not is_data and json.loads(data) == json.loads(before))
    except ValueError:
        harmless = False
    found = _read(cache, path, truth, facts, shards, harmless)
    try:
        report = verify(cache)
    except CacheError as error:
        if path.name != "manifest.json" or path.name not in str(error) or harmless:
            found.append(f"verify raised {error}")
    else:
        exact = harmless and path.name != "vocabulary.json"  # of which the hash counts, white space and all
        if report.good != exact and data != before:
            found.append(f"verify said good={report.good}, {[str(p) for p in report.problems]}")
        if not report.good and not any(path.name in problem.file for problem in report.problems):
            found.append(f"verify named {[str(p) for p in report.problems]}")
    return found


def _read(cache: Path, path: Path, truth: Any, facts: Any, shards: list[int], harmless: bool) -> list[str]:
    """What a reader takes for data and is none; what it says no to and is all there; an error that names no file."""
    from cache_schema.errors import CacheError, CorruptShard
    from cache_schema.reader import CacheReader

    found = []
    try:
        reader = CacheReader.open(cache)
    except CacheError as error:
        return [] if path.name in str(error) and not harmless else [f"opening raised {error}"]
    try:
        vocabulary = reader.vocabulary()
    except CacheError as error:
        vocabulary = facts[2]
        if path.name != "vocabulary.json" or path.name not in str(error):
            found.append(f"the vocabulary raised {error}")
    if (reader.manifest, reader.records, vocabulary) != facts:
        found.append("another manifest, record or vocabulary was taken for the cache's")
    for columns, expected in truth.items():
        for i, (row, right) in enumerate(zip(rows_of(reader, columns, CacheError), expected, strict=True)):
            if isinstance(row, CacheError):
                named = isinstance(row, CorruptShard) and row.shard == shards[i] and path.name in str(row)
                if not named:
                    found.append(f"row {i} raised {row}")
            elif row != right:
                found.append(f"row {i} of {columns.value} has other values")
    return found


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
