"""Rows to Arrow tables and back: the columns of a data file. Called by `shard` and, for `RowGroup`, by the reader.

Shapes: N positions, K ranks, T temperatures, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_schema.codec import Codec, decode_ranks, decode_set, encode_ranks, encode_set, heights, unpacked
from cache_schema.manifest import Manifest
from cache_schema.schema import TEXT_COLUMNS, AlignmentRow, CacheRow, Columns, Status, TextRow

_LISTS = {
    "answer_ids": pa.int32(),
    "answer_offsets": pa.int32(),
    "status": pa.uint8(),
    "top_logit": pa.float32(),
    "id_order": pa.int32(),
    "slots": pa.uint8(),
    "id_excess": pa.int32(),
    "height_low": pa.uint8(),
    "height_excess": pa.int32(),
    "draws": pa.int32(),
    "rank_steps": pa.uint8(),
    "rank_excess": pa.int32(),
    "logsumexp": pa.float32(),
    "log_tail": pa.float32(),
}
_ALWAYS = ("answer_ids", "answer_offsets", "status", "top_logit", "logsumexp")


def _field(name: str, kind: Any) -> Any:
    return pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), nullable=name not in _ALWAYS)


ARROW_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in TEXT_COLUMNS]
    + [_field("answer_ids", pa.int32()), pa.field("answer_start", pa.int32(), nullable=False)]
    + [_field(name, kind) for name, kind in _LISTS.items() if name != "answer_ids"]
)
COLUMN_PATHS = [f.name + ".list.element" * pa.types.is_list(f.type) for f in ARROW_SCHEMA]  # as Parquet names them


def encode_row(row: CacheRow, manifest: Manifest, place_V: NDArray[np.int32] | None) -> tuple[dict[str, Any], float]:
    """The stored columns of a checked row, numbers flat, and its largest codec error in logit units.

    place_V: of each id in the shard's order; None where no ids are stored. The numbers of unusable positions become
    zeros.
    """
    usable_N1 = row.status[:, None] == Status.USABLE

    def cleared(values: NDArray[Any]) -> NDArray[Any]:
        return np.where(usable_N1, values, values.dtype.type(0))

    codec = Codec(manifest.codec, manifest.step)
    top_N, logits_NK = cleared(row.top_logit[:, None])[:, 0], cleared(row.logits)
    level_NK = codec.encode(top_N, logits_NK)
    error = np.abs(codec.decode(top_N, level_NK).astype(np.float64) - logits_NK).max(initial=0.0)
    columns = dict.fromkeys(ARROW_SCHEMA.names)
    columns |= {name: getattr(row, name) for name in (*TEXT_COLUMNS, "answer_ids", "answer_start", "status")}
    columns |= {
        "answer_offsets": row.answer_offsets.ravel(),
        "top_logit": top_N,
        "logsumexp": cleared(row.logsumexp).ravel(),
        "log_tail": None if row.log_tail is None else cleared(row.log_tail).ravel(),
    }
    if place_V is None or row.token_ids is None:
        packed_NH, excess = encode_ranks(level_NK)
        columns |= {"rank_steps": packed_NH.ravel(), "rank_excess": excess}
    else:
        draws_NK = None if row.draws is None else cleared(row.draws)
        # an unusable position is zeros: the first id of the order, K times
        ids_NK = np.where(usable_N1, row.token_ids, place_V.argmin())
        slots = encode_set(level_NK, ids_NK, draws_NK, place_V, codec.low_bits)
        columns |= {
            "id_order": np.empty(0, np.int32),  # the file's first row has it
            "slots": slots.packed_NK.ravel(),
            "id_excess": slots.id_excess,
            "height_low": slots.height_low_NK.ravel(),
            "height_excess": slots.height_excess,
            "draws": None if slots.draws_NK is None else slots.draws_NK.ravel(),
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

    order_V: the shard's order of ids, where ids are to be decoded. `nbytes` is what it holds. Raises ValueError where
    lengths do not fit the manifest.
    """

    def __init__(
        self, table: Any, manifest: Manifest, columns: Columns, order_V: NDArray[np.int32] | None = None
    ) -> None:
        self._manifest, self._columns, self._order_V = manifest, columns, order_V
        self._codec = Codec(manifest.codec, manifest.step)
        self.nbytes: int = table.nbytes + (0 if order_V is None else order_V.nbytes)
        self._rows: int = table.num_rows
        self._plain = {name: _plain(table[name]) for name in table.column_names if name not in _LISTS}
        self._lists = {name: flat(table[name]) for name in table.column_names if name in _LISTS}

    def __len__(self) -> int:
        return self._rows

    def row(self, i: int) -> TextRow:
        """Row i of the group, with arrays of its own: of the type that its columns make (see `Columns`)."""
        text = {name: self._plain[name][i] for name in TEXT_COLUMNS}
        if self._columns is Columns.TEXT:
            return TextRow(**text)
        ids_N = self._slice("answer_ids", i)
        n, t = len(ids_N), len(self._manifest.temperatures)
        status_N = self._block("status", i, n)
        _expect_range("status", status_N, max(Status))
        _expect_range("answer_ids", ids_N, self._manifest.vocab_size - 1)
        offsets_N2 = self._block("answer_offsets", i, n, 2)
        _expect_range("answer_offsets", offsets_N2, len(text["answer"]))
        tokens = text | {
            "answer_ids": ids_N.copy(),
            "answer_offsets": offsets_N2.copy(),
            "status": status_N.copy(),
        }
        if self._columns is Columns.ALIGNMENT:
            return AlignmentRow(**tokens)
        top_N = self._block("top_logit", i, n).copy()
        level_NK, ids_NK, draws_NK = self._ranks(i, n)
        for values_NK in (ids_NK, draws_NK):
            if values_NK is not None:
                values_NK[status_N != Status.USABLE] = 0
        return CacheRow(
            **tokens,
            answer_start=self._plain["answer_start"][i],
            top_logit=top_N,
            logits=self._codec.decode(top_N, level_NK),
            token_ids=ids_NK,
            draws=draws_NK,
            logsumexp=self._block("logsumexp", i, n, t).copy(),
            log_tail=self._block("log_tail", i, n, t).copy() if self._manifest.stores_tail else None,
        )

    def _ranks(self, i: int, n: int) -> tuple[NDArray[Any], NDArray[np.int32] | None, NDArray[np.int32] | None]:
        """[n, K] each: levels by rank, and ids and draws where they were read."""
        k, manifest = self._manifest.top_k, self._manifest
        if not manifest.store_ids:
            packed_NH, excess = self._block("rank_steps", i, n, -(-k // 4)), self._slice("rank_excess", i)
            _expect_range("rank_excess", excess, self._codec.max_level)
            level_NK = decode_ranks(packed_NH, excess, k)
            _expect_range("levels", level_NK, self._codec.max_level)
            return level_NK, None, None
        packed_NK, excess, bits = self._block("slots", i, n, k), self._slice("height_excess", i), self._codec.low_bits
        _expect_range("height_excess", excess, self._codec.max_level >> bits)
        low_NK = self._block("height_low", i, n, k)
        _expect_range("height_low", low_NK, 2**bits - 1)
        height_NK = heights(packed_NK, low_NK, excess, bits)
        _expect_range("heights", height_NK, self._codec.max_level)
        if self._order_V is None:
            height_NK.sort(axis=1)
            return height_NK[:, -1:] - height_NK[:, ::-1], None, None
        excess = self._slice("id_excess", i)
        _expect_range("id_excess", excess, manifest.vocab_size - 1)
        draws_NK = self._block("draws", i, n, k) if manifest.sampled else None
        _expect_range("draws", draws_NK, k)
        return decode_set(unpacked("id_excess", packed_NK & 15, 15, excess), height_NK, draws_NK, self._order_V)

    def _slice(self, name: str, i: int) -> NDArray[Any]:
        """The numbers of a list; read-only, and as long-lived as the group."""
        offsets, values = self._lists[name]
        if offsets is None:
            raise ValueError(f"row {i} of the group: {name} is null")
        return values[offsets[i] : offsets[i + 1]]

    def _block(self, name: str, i: int, *shape: int) -> NDArray[Any]:
        values = self._slice(name, i)
        if len(values) != np.prod(shape, dtype=int):
            expected = " * ".join(map(str, shape))
            raise ValueError(f"row {i} of the group: {name} is {len(values)} numbers, expected {expected}")
        return values.reshape(shape)


def _expect_range(name: str, values: NDArray[Any] | None, highest: int) -> None:
    """These numbers are used as indices, or shifted: out of range they would do damage far from here."""
    if values is not None and values.size and not (values.min() >= 0 and values.max() <= highest):
        raise ValueError(f"{name} run from {values.min()} to {values.max()}, expected 0 to {highest}")


def _plain(column: Any) -> list[Any]:
    """The values of a column that has one a row. Of a dictionary, rows share the text that they have in common."""
    array = column.combine_chunks()
    if not pa.types.is_dictionary(array.type):
        values: list[Any] = array.to_pylist()
        return values
    texts, places = array.dictionary.to_pylist(), array.indices.to_numpy()
    _expect_range("places in the dictionary", places, len(texts) - 1)
    return [texts[i] for i in places.tolist()]


def flat(column: Any) -> tuple[NDArray[Any] | None, NDArray[Any]]:
    """Offsets and values of a list column as numpy; offsets None for a column of nulls."""
    array = column.combine_chunks()
    if array.null_count:
        if array.null_count != len(array):
            raise ValueError("a column is null in some rows and not in others")
        return None, np.empty(0)
    return array.offsets.to_numpy(), array.values.to_numpy()
