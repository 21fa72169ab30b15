"""How fast one core reads a cache, verified and decoded: against what a GPU consumes, and against Parquet alone.

    python benchmarks/cache_read.py [--cache FOLDER] [--rounds 7] [--out FILE]

`CacheReader.rows` over a real cache (the most trained one that cache_bytes.py left): footers by SHA-256, pages by
checksum, every number range-checked, decoded to a `CacheRow` with logits and ids by rank. Beside it `pyarrow` reads
the same columns of the same files, checksums verified too, and decodes nothing. This process and its threads have one
core; the files are in memory, as a disk that gives 1 GB/s would add 0.4 us a position. A step of stage 2 at the
published setting consumes 32 answers of 122 positions in 1.1 s on one H200: 3,550 positions/s.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from harness import Row, finish, side_by_side

from cache_schema.schema import CacheRow

H200_POSITIONS_S = 32 * 122 / 1.1


def one_core() -> None:
    """This process and the threads to come run on one core."""
    import pyarrow as pa

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


def reads(cache: Path) -> dict[str, Callable[[], object]]:
    """Name -> a read of the whole cache: by us and by pyarrow, for each projection."""
    import pyarrow.parquet as pq

    from cache_schema.reader import CacheReader
    from cache_schema.schema import ALL, RANKED, TEXT, Columns

    files = [cache / "shards" / record.file for record in CacheReader.open(cache).records]

    def ours(columns: Columns) -> None:
        for _ in CacheReader.open(cache).rows(columns):
            pass

    def plain(columns: Columns) -> None:
        for path in files:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for group in range(file.metadata.num_row_groups):
                    file.read_row_group(group, columns=list(columns.names), use_threads=False)

    runs: dict[str, Callable[[], object]] = {}
    for columns in (ALL, RANKED, TEXT):
        runs[f"{columns.name} ours"] = lambda columns=columns: ours(columns)
        runs[f"{columns.name} plain"] = lambda columns=columns: plain(columns)
    return runs


def column_bytes(cache: Path, names: tuple[str, ...]) -> int:
    """Compressed bytes of these columns in the files."""
    import pyarrow.parquet as pq

    total = 0
    for path in (cache / "shards").glob("*.parquet"):
        metadata = pq.read_metadata(path)
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            columns = map(group.column, range(group.num_columns))
            total += sum(c.total_compressed_size for c in columns if c.path_in_schema.partition(".")[0] in names)
    return total


def sound(row: CacheRow, temperatures: Sequence[float]) -> CacheRow:
    """A row as a teacher hands it over: its normalisers are those of its logits, which the codec has moved."""
    head_NT = np.logaddexp.reduce(row.logits[:, None, :] / np.array(temperatures)[:, None], axis=2)
    return replace(row, logsumexp=np.logaddexp(head_NT, row.log_tail).astype(np.float32))


def measure(cache: Path, rounds: int) -> list[Row]:
    """Rates of reading and of writing."""
    from cache_schema.reader import CacheReader
    from cache_schema.schema import ALL, RANKED, TEXT
    from cache_schema.shard import encode_shard

    reader = CacheReader.open(cache)
    rows = [sound(row, reader.manifest.temperatures) for row in reader.rows()]
    positions, manifest = sum(len(row.answer_ids) for row in rows), reader.manifest
    runs = reads(cache)
    runs["write"] = lambda: encode_shard(rows, 0, manifest)
    times = side_by_side(runs, rounds)
    arrays = ("answer_ids", "answer_offsets", "status", "top_logit", "logits", "token_ids", "logsumexp", "log_tail")
    table = []
    for columns in (ALL, RANKED, TEXT):
        ours, plain = np.array(times[f"{columns.name} ours"]), np.array(times[f"{columns.name} plain"])
        stored = column_bytes(cache, columns.names)
        names = [] if columns is TEXT else [name for name in arrays if columns is ALL or name != "token_ids"]
        decoded = sum(value.nbytes for row in rows for name in names if (value := getattr(row, name)) is not None)
        rate = positions / ours
        what = {"ALL": "read, verify and decode", "RANKED": "the same without ids", "TEXT": "the same, text alone"}
        goal = ">= 10" if columns is ALL else ""
        against = f"what one H200 consumes, {H200_POSITIONS_S:,.0f} positions/s"
        note = f"{np.median(rate):,.0f} positions/s"
        values = rate / H200_POSITIONS_S
        table.append(
            Row(
                f"{what[columns.name]}, one core", against, np.median(values), min(values), max(values), goal, "x", note
            )
        )
        speeds = f"{stored / 1e9 / np.median(ours):.2f} GB/s of the file, pyarrow {stored / 1e9 / np.median(plain):.2f}"
        if decoded:
            speeds += f"; {decoded / 1e9 / np.median(ours):.2f} GB/s of decoded numbers"
        table.append(Row.of_times(f"time, {what[columns.name]}", "pyarrow, the same columns", ours, plain, "", speeds))
    written = positions / np.array(times["write"])
    spread = (float(f(written)) / H200_POSITIONS_S for f in (np.median, np.min, np.max))
    note = f"{np.median(written):,.0f} positions/s"
    table.append(Row("check and encode a shard, one core", f"{H200_POSITIONS_S:,.0f} positions/s", *spread, note=note))
    return table


def main() -> None:
    """Find the cache, measure it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, help="a sealed cache with ids")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    left = sorted(Path("runs/cache-bytes").glob("tokens-*-fine"), key=lambda path: int(path.name.split("-")[1]))
    cache = args.cache or (left[-1] if left else None)
    if cache is None:
        print("skipped: it needs a cache; make some with python benchmarks/cache_bytes.py, or give --cache FOLDER")
        sys.exit(0)
    one_core()
    from cache_schema.reader import CacheReader

    reader = CacheReader.open(cache)
    totals, manifest = reader.totals(), reader.manifest
    conditions = {
        "cache": f"{cache.name}: {totals.positions.written:,} positions, K = {manifest.top_k} of "
        f"{manifest.vocab_size:,}, {totals.bytes_per_position:.1f} bytes a position, codec {manifest.codec}",
        "rounds": args.rounds,
    }
    finish("cache_read", measure(cache, args.rounds), conditions, args.out)


if __name__ == "__main__":
    main()
