"""Bytes a position of the two large columns, by Parquet encoding: where the choice in `cache_schema/shard.py` is from.

    python benchmarks/parquet_encodings.py

Synthetic distributions over Qwen's vocabulary (a Zipf prior and Gaussian noise), K=256, step 1/64, zstd 3.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VOCABULARY, TOP_K, POSITIONS, STEP = 151_936, 256, 2_000, 1 / 64
ENCODINGS = ("PLAIN", "BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED")


def columns() -> dict[str, np.ndarray]:
    """`gaps` and `token_ids`, each [POSITIONS, TOP_K] int32."""
    rng = np.random.default_rng(0)
    prior = -1.3 * np.log(np.arange(1, VOCABULARY + 1))
    id_of = rng.permutation(VOCABULARY).astype(np.int32)
    gaps = np.empty((POSITIONS, TOP_K), np.int32)
    ids = np.empty((POSITIONS, TOP_K), np.int32)
    for t in range(POSITIONS):
        logits = prior + rng.normal(0, 2, VOCABULARY)
        top = np.argpartition(-logits, TOP_K)[:TOP_K]
        top = top[np.argsort(-logits[top])]
        gaps[t] = np.rint((logits[top[0]] - logits[top]) / STEP)
        ids[t] = id_of[top]
    return {"gaps": gaps, "token_ids": ids}


def bytes_per_position(values: np.ndarray, encoding: str) -> float:
    """Size of a Parquet file with this one column, lists of 100 positions as in a shard."""
    offsets = np.arange(0, values.size + 1, 100 * TOP_K, dtype=np.int32)
    table = pa.table({"c": pa.ListArray.from_arrays(offsets, values.ravel())})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        column_encoding={"c.list.element": encoding},
        write_page_checksum=True,
    )
    return len(sink.getvalue()) / len(values)


def main() -> None:
    """Print the table."""
    print(f"{'column':<12}" + "".join(f"{encoding:>22}" for encoding in ENCODINGS))
    for name, values in columns().items():
        print(f"{name:<12}" + "".join(f"{bytes_per_position(values, encoding):>22.1f}" for encoding in ENCODINGS))


if __name__ == "__main__":
    main()
