"""Logits to integers and back, rows to Arrow tables and back. Called by `shard`; `usable_positions` by stage 1.

The codec `fine`: `gap = rint((top_logit - logit) / step)`, kept below 2**24. With a power-of-two step, `step * gap` is
then exact in float32, so `top_logit - step * gap` is one rounding in float32 or float64 alike, in any language.
The error is at most step / 2 and that rounding; rank 0 is exact. Shapes: N positions, K ranks, T temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_schema.manifest import Manifest
from cache_schema.schema import TEXT_COLUMNS, AlignmentRow, CacheRow, Columns, Status, TextRow

MAX_GAP = 2**24 - 1

_LISTS = {
    "answer_ids": pa.int32(),
    "answer_offsets": pa.int32(),
    "status": pa.uint8(),
    "top_logit": pa.float32(),
    "gaps": pa.int32(),
    "token_ids": pa.int32(),
    "draws": pa.int32(),
    "logsumexp": pa.float32(),
    "log_tail": pa.float32(),
}
_NULLABLE = ("token_ids", "draws", "log_tail")


def _field(name: str, kind: Any) -> Any:
    return pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), nullable=name in _NULLABLE)


ARROW_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in TEXT_COLUMNS]
    + [_field("answer_ids", pa.int32()), pa.field("answer_start", pa.int32(), nullable=False)]
    + [_field(name, kind) for name, kind in _LISTS.items() if name != "answer_ids"]
)


def usable_positions(
    top_logit_N: NDArray[np.float32],
    logits_NK: NDArray[np.float32],
    logsumexp_NT: NDArray[np.float32],
    log_tail_NT: NDArray[np.float32] | None,
    step: float,
) -> NDArray[np.bool_]:
    """[N] whether the numbers of a position can be stored: all finite, no logit 2**24 steps or more below the top."""
    parts = [logits_NK, logsumexp_NT] + ([] if log_tail_NT is None else [log_tail_NT])
    finite_N = np.isfinite(top_logit_N)
    for part in parts:
        finite_N &= np.isfinite(part).all(axis=1)
    with np.errstate(invalid="ignore"):  # inf - inf, in a position that is already out
        spread_N = top_logit_N.astype(np.float64) - logits_NK.min(axis=1)
    usable_N: NDArray[np.bool_] = finite_N & ~(spread_N > step * MAX_GAP)
    return usable_N


def encode_gaps(top_logit_N: NDArray[np.float32], logits_NK: NDArray[np.float32], step: float) -> NDArray[np.int32]:
    """[N, K] integer gaps below the top logit. The caller has checked `usable_positions`."""
    distance_NK = top_logit_N.astype(np.float64)[:, None] - logits_NK  # float64: exact for float32 near each other
    return np.rint(distance_NK / step).astype(np.int32)


def decode_gaps(top_logit_N: NDArray[np.float32], gaps_NK: NDArray[np.int32], step: float) -> NDArray[np.float32]:
    """[N, K] logits, as FORMAT.md defines them."""
    return top_logit_N[:, None] - np.float32(step) * gaps_NK.astype(np.float32)


def encode_row(row: CacheRow, manifest: Manifest) -> tuple[dict[str, Any], float]:
    """The stored columns of a checked row, numbers flat, and its largest codec error in logit units.

    The numbers of unusable positions become zeros.
    """
    usable_N = row.status == Status.USABLE
    top_N = np.where(usable_N, row.top_logit, np.float32(0))
    logits_NK = np.where(usable_N[:, None], row.logits, np.float32(0))
    gaps_NK = encode_gaps(top_N, logits_NK, manifest.step)
    error = np.abs(decode_gaps(top_N, gaps_NK, manifest.step).astype(np.float64) - logits_NK).max(initial=0.0)

    def cleared(values: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if values is None else np.where(usable_N[:, None], values, values.dtype.type(0)).ravel()

    columns = {name: getattr(row, name) for name in (*TEXT_COLUMNS, "answer_ids", "answer_start", "status")}
    columns |= {
        "answer_offsets": row.answer_offsets.ravel(),
        "top_logit": top_N,
        "gaps": gaps_NK.ravel(),
        "token_ids": cleared(row.token_ids),
        "draws": cleared(row.draws),
        "logsumexp": cleared(row.logsumexp),
        "log_tail": cleared(row.log_tail),
    }
    return columns, float(error)


def to_table(encoded: Sequence[dict[str, Any]]) -> Any:
    """A pyarrow Table of encoded rows."""
    return pa.Table.from_arrays(
        [_array(field, [columns[field.name] for columns in encoded]) for field in ARROW_SCHEMA], schema=ARROW_SCHEMA
    )


def _array(field: Any, values: list[Any]) -> Any:
    if not pa.types.is_list(field.type):
        return pa.array(values, field.type)
    if not values or values[0] is None:
        return pa.nulls(len(values), field.type)
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(v) for v in values], out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values), field.type.value_type), type=field.type)


class RowGroup:
    """Some consecutive rows of a shard in memory, still encoded; `row(i)` decodes one.

    `nbytes` is what it holds. Raises ValueError where lengths do not fit the manifest.
    """

    def __init__(self, table: Any, manifest: Manifest, columns: Columns) -> None:
        self._manifest = manifest
        self._columns = columns
        self.nbytes: int = table.nbytes
        self._rows: int = table.num_rows
        self._plain = {name: table[name].to_pylist() for name in table.column_names if name not in _LISTS}
        self._lists = {name: _flat(table[name]) for name in table.column_names if name in _LISTS}

    def __len__(self) -> int:
        return self._rows

    def row(self, i: int) -> TextRow:
        """Row i of the group, with arrays of its own: of the type that its columns make (see `Columns`)."""
        text = {name: self._plain[name][i] for name in TEXT_COLUMNS}
        if self._columns is Columns.TEXT:
            return TextRow(**text)
        ids_N = self._slice("answer_ids", i)
        if ids_N is None:
            raise ValueError("answer_ids is null")
        n, k, t = len(ids_N), self._manifest.top_k, len(self._manifest.temperatures)
        status_N = self._block("status", i, n)
        _expect_range("status", status_N, max(Status))
        _expect_range("answer_ids", ids_N, self._manifest.vocab_size - 1)
        offsets_N2 = self._block("answer_offsets", i, n, 2)
        _expect_range("answer_offsets", offsets_N2, len(text["answer"]))
        tokens = text | {
            "answer_ids": ids_N.copy(),
            "answer_offsets": offsets_N2,
            "status": status_N,
        }
        if self._columns is Columns.ALIGNMENT:
            return AlignmentRow(**tokens)
        top_N = self._block("top_logit", i, n)
        gaps_NK = self._block("gaps", i, n, k)
        whole = self._columns is Columns.ALL
        ids_NK = self._block("token_ids", i, n, k) if whole and self._manifest.store_ids else None
        draws_NK = self._block("draws", i, n, k) if whole and self._manifest.sampled else None
        _expect_range("gaps", gaps_NK, MAX_GAP)
        _expect_range("token_ids", ids_NK, self._manifest.vocab_size - 1)
        _expect_range("draws", draws_NK, k)
        return CacheRow(
            **tokens,
            answer_start=self._plain["answer_start"][i],
            top_logit=top_N,
            logits=decode_gaps(top_N, gaps_NK, self._manifest.step),
            token_ids=ids_NK,
            draws=draws_NK,
            logsumexp=self._block("logsumexp", i, n, t),
            log_tail=self._block("log_tail", i, n, t) if self._manifest.stores_tail else None,
        )

    def _slice(self, name: str, i: int) -> NDArray[Any] | None:
        offsets, values = self._lists[name]
        return None if offsets is None else values[offsets[i] : offsets[i + 1]]

    def _block(self, name: str, i: int, *shape: int) -> NDArray[Any]:
        values = self._slice(name, i)
        size = int(np.prod(shape))
        if values is None or len(values) != size:
            found = "null" if values is None else f"{len(values)} numbers"
            raise ValueError(f"row {i} of the group: {name} is {found}, expected {' * '.join(map(str, shape))}")
        return values.reshape(shape).copy()  # of its own: Arrow's memory is read-only and as long as the group


def _expect_range(name: str, values: NDArray[Any] | None, highest: int) -> None:
    """These numbers are used as indices, or shifted: out of range they would do damage far from here."""
    if values is not None and values.size and not (values.min() >= 0 and values.max() <= highest):
        raise ValueError(f"{name} run from {values.min()} to {values.max()}, expected 0 to {highest}")


def _flat(column: Any) -> tuple[NDArray[Any] | None, NDArray[Any]]:
    """Offsets and values of a list column as numpy; offsets None for a column of nulls."""
    array = column.combine_chunks()
    if array.null_count:
        if array.null_count != len(array):
            raise ValueError("a column is null in some rows and not in others")
        return None, np.empty(0)
    return array.offsets.to_numpy(), array.values.to_numpy()
