"""One Parquet file of the cache: its bytes from rows, and reading that believes nothing it has not checked.

Called by writer (`encode_shard`), reader and verify (`ShardFile`). Plain Parquet: pandas, DuckDB and `datasets` open
a shard without this package. What each column takes, and why it is stored so, `benchmarks/cache_bytes.py` measures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cache_schema.bounds import (
    GROUP_TEXT_BYTES,
    GROUP_VALUES,
    MAX_FOOTER_BYTES,
    most_bytes,
    most_numbers,
    text_bytes,
    widest,
)
from cache_schema.check import problem_of
from cache_schema.codec import listed_ids, order_of, places_of
from cache_schema.errors import CorruptShard, InvalidRow, StorageError, shown
from cache_schema.jsondoc import canonical
from cache_schema.layout import data as data_path
from cache_schema.manifest import Manifest
from cache_schema.pages import check_footer, check_pages
from cache_schema.record import CommitRecord
from cache_schema.schema import TEXT_COLUMNS, CacheRow, Columns, Status
from cache_schema.store import UNREACHABLE, Store
from cache_schema.table import ARROW_SCHEMA, COLUMN_PATHS, RowGroup, encode_row, flat, to_table

_ENCODINGS = {
    **dict.fromkeys(("example_id", "prompt", "answer"), "PLAIN"),
    "answer_ids.list.element": "BYTE_STREAM_SPLIT",
    "answer_start": "DELTA_BINARY_PACKED",
    "answer_offsets.list.element": "DELTA_BINARY_PACKED",
    "status.list.element": "PLAIN",
    "top_logit.list.element": "BYTE_STREAM_SPLIT",
    "id_order.list.element": "BYTE_STREAM_SPLIT",
    "slots.list.element": "BYTE_STREAM_SPLIT",
    "id_excess.list.element": "BYTE_STREAM_SPLIT",
    "height_excess.list.element": "BYTE_STREAM_SPLIT",
    "draws.list.element": "BYTE_STREAM_SPLIT",
    "rank_steps.list.element": "BYTE_STREAM_SPLIT",
    "rank_excess.list.element": "BYTE_STREAM_SPLIT",
    "logsumexp.list.element": "BYTE_STREAM_SPLIT",
    "log_tail.list.element": "BYTE_STREAM_SPLIT",
}
_WITH_DICTIONARY = ("task", "height_low.list.element")
_EXPECTED_ENCODINGS = {path: {"RLE", _ENCODINGS.get(path, "PLAIN")} for path in COLUMN_PATHS} | {
    path: {"RLE", "PLAIN", "RLE_DICTIONARY"} for path in _WITH_DICTIONARY
}
_LEVELS = {"height_low.list.element": 1}  # noise; of the others level 9 makes 15 bytes less than 3, of 370


@dataclass(frozen=True)
class EncodedShard:
    """The bytes of a data file and what its commit record says of them."""

    data: memoryview
    sha256: str
    footer_sha256: str
    codec_error_max: float


def encode_shard(rows: Sequence[CacheRow], shard: int, manifest: Manifest) -> EncodedShard:
    """The data file of a shard, in memory: the same rows give the same bytes.

    Raises InvalidRow, naming shard, row and position, where a row breaks an invariant.
    """
    sink = pa.BufferOutputStream()
    writer = parquet_writer(sink)
    for i, row in enumerate(rows):
        problem = problem_of(row, manifest, decoded=False)
        if problem is not None:
            raise InvalidRow(f"shard {shard}, row {i} (example {row.example_id!r}): {problem}")
    listed, place_V = _order(rows, manifest) if manifest.store_ids else (None, None)
    error_max = 0.0
    with writer:
        for group in _groups(rows, manifest):
            encoded = []
            for i in group:
                columns, error = encode_row(rows[i], manifest, place_V)
                if i == 0 and listed is not None:
                    columns["id_order"] = listed
                encoded.append(columns)
                error_max = max(error_max, error)
            writer.write_table(to_table(encoded), row_group_size=len(encoded))
        writer.add_key_value_metadata({"logitbank": _tag(shard, manifest)})
    data = memoryview(sink.getvalue())
    if len(footer_of(data)) > MAX_FOOTER_BYTES:
        raise InvalidRow(f"shard {shard} has too many logits for one file: set cache.shard_examples lower")
    return EncodedShard(data, hashlib.sha256(data).hexdigest(), hashlib.sha256(footer_of(data)).hexdigest(), error_max)


def parquet_writer(sink: Any) -> Any:
    """Writes tables of `ARROW_SCHEMA` as FORMAT.md has them, and as the reader insists on."""
    return pq.ParquetWriter(
        sink,
        ARROW_SCHEMA,
        compression="zstd",
        compression_level={name: _LEVELS.get(name, 9) for name in COLUMN_PATHS},
        data_page_size=1 << 28,  # a column of a row group is one page: slots 126 bytes where pages of 1 MiB have 136
        use_dictionary=list(_WITH_DICTIONARY),
        column_encoding=_ENCODINGS,
        write_statistics=False,
        store_schema=False,
        write_page_checksum=True,
    )


def _order(rows: Sequence[CacheRow], manifest: Manifest) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The ids that go into `id_order`, and the place of every id."""
    kept = (row.token_ids[row.status == Status.USABLE] for row in rows if row.token_ids is not None)
    listed = listed_ids(kept, manifest.vocab_size)
    return listed, places_of(order_of(listed, manifest.vocab_size))


def _groups(rows: Sequence[CacheRow], manifest: Manifest) -> Iterator[range]:
    """Consecutive rows of about GROUP_VALUES logits: a read costs the same whatever the K and the lengths."""
    start = values = text = 0
    for i, row in enumerate(rows):
        size, length = len(row.answer_ids) * widest(manifest), text_bytes(row)
        if i > start and (values + size > GROUP_VALUES or text + length > GROUP_TEXT_BYTES):
            yield range(start, i)
            start, values, text = i, 0, 0
        values, text = values + size, text + length
    if rows:
        yield range(start, len(rows))


def _tag(shard: int, manifest: Manifest) -> bytes:
    """What a data file says of itself, so that a stray one can be recognised and decoded."""
    return canonical(
        {
            "schema_version": manifest.schema_version,
            "fingerprint": manifest.fingerprint,
            "shard": shard,
            "top_k": manifest.top_k,
            "vocab_size": manifest.vocab_size,
            "codec": manifest.codec,
            "store_ids": manifest.store_ids,
            "step": manifest.step,
            "temperatures": list(manifest.temperatures),
        }
    )


def footer_of(data: memoryview) -> memoryview:
    """The end of a Parquet file: metadata, its length in 4 bytes, the magic. Raises ValueError if there is none."""
    length = int.from_bytes(data[-8:-4], "little") + 8
    if len(data) < length + 4 or bytes(data[-4:]) != b"PAR1":
        raise ValueError("the file does not end in a Parquet footer")
    return data[-length:]


class ShardFile:
    """A committed data file, its footer checked against the commit record; `group` reads some of its rows.

    Page checksums are verified on every read and the SHA-256 of the footer at opening, so every byte that a read
    depends on is covered at a cost of kilobytes. `verify` hashes the whole file. Holds no open file: it can be used
    after a fork. Raises CorruptShard.
    """

    def __init__(self, store: Store, record: CommitRecord, manifest: Manifest) -> None:
        self._store, self._record, self._manifest = store, record, manifest
        with self.opened() as file:
            self._metadata = self._checked(file)
        self.group_rows = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]

    def _checked(self, file: Any) -> Any:
        """The file's metadata, once its footer is known to be what was written."""
        record, size = self._record, file.size()
        if size != record.bytes:
            raise self.corrupt(f"it has {size} bytes, its commit record says {record.bytes}")
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little") + 8
        if length > MAX_FOOTER_BYTES:
            raise self.corrupt(f"its footer says it has {length} bytes, expected {MAX_FOOTER_BYTES} at most")
        file.seek(max(0, size - length))
        footer = file.read()
        found = hashlib.sha256(footer).hexdigest()
        if found != record.footer_sha256:
            raise self.corrupt(f"its footer has SHA-256 {found}, its commit record says {record.footer_sha256}")
        if (
            b"ARROW:" in footer
        ):  # pyarrow would make types of it, of any library's that is loaded, just to open the file
            raise self.corrupt("its footer has a key of Arrow's, expected 'logitbank' alone")
        check_footer(footer)
        metadata = pq.ParquetFile(file, arrow_extensions_enabled=False).metadata
        says = metadata.metadata or {}
        tag = says.pop(b"logitbank", b"")
        if tag != _tag(record.shard, self._manifest):
            raise self.corrupt(f"it belongs elsewhere: it says {shown(tag.decode(errors='replace'))}")
        if says:
            raise self.corrupt(f"its footer has a key {shown(min(says))}, expected 'logitbank' alone")
        if metadata.schema.to_arrow_schema().remove_metadata() != ARROW_SCHEMA:
            raise self.corrupt(f"its columns are not those of schema version {self._manifest.schema_version}")
        self._expect_sizes(metadata, record)
        return metadata

    def _expect_sizes(self, metadata: Any, record: CommitRecord) -> None:
        """Nothing can be longer than its rows and positions allow: checked before anything is allocated for it."""
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        rows = [group.num_rows for group in groups]
        if min(rows, default=1) < 1 or sum(rows) != metadata.num_rows:
            raise self.corrupt(f"its footer says {metadata.num_rows} rows, of {len(rows)} groups with {sum(rows)}")
        if metadata.num_rows != record.rows:
            raise self.corrupt(f"it has {metadata.num_rows} rows, its commit record says {record.rows}")
        for group in groups:
            text_left = GROUP_TEXT_BYTES
            for column in map(group.column, range(group.num_columns)):
                path, numbers, size = column.path_in_schema, column.num_values, column.total_uncompressed_size
                name = path.partition(".")[0]
                most = most_numbers(name, self._manifest, record.positions, group.num_rows)
                if column.file_path:
                    raise self.corrupt(f"{path} is said to lie in another file")
                if not 0 <= numbers <= most:
                    raise self.corrupt(f"{path} has {numbers} numbers, expected up to {most}")
                most = most_bytes(numbers) + (text_left if name in TEXT_COLUMNS else 0)
                if not 0 <= size <= most:
                    raise self.corrupt(f"{path} has {size} bytes unpacked, expected up to {most}")
                text_left -= size if name in TEXT_COLUMNS else 0
                if column.compression != "ZSTD" or set(column.encodings) - _EXPECTED_ENCODINGS[path]:
                    kinds = " and ".join(column.encodings)
                    raise self.corrupt(f"{path} is {column.compression} of {kinds}, which FORMAT.md does not have")

    def group(self, index: int, columns: Columns) -> RowGroup:
        """Read these columns of one row group, and no byte of the others."""
        with self.opened() as source:
            table = self._read(source, index, columns.names)
            order_V = self._order(source) if columns is Columns.ALL and self._manifest.store_ids else None
            return RowGroup(table, self._manifest, columns, order_V)

    def _read(self, source: Any, index: int, names: Sequence[str]) -> Any:
        """These columns of a row group, once their pages are known to be of the size that the footer says."""
        group = self._metadata.row_group(index)

        def read(at: int, size: int) -> bytes:
            source.seek(at)
            return bytes(source.read(size))

        for i, path in enumerate(COLUMN_PATHS):
            if path.partition(".")[0] in names:
                check_pages(read, group.column(i), group.num_rows, path in _WITH_DICTIONARY)
        with pq.ParquetFile(
            source,
            metadata=self._metadata,
            page_checksum_verification=True,
            arrow_extensions_enabled=False,
            read_dictionary=["task"],  # as it is stored: a name of a megabyte is not made for each of its rows
        ) as file:
            table = file.read_row_group(index, columns=list(names))
        if table.num_rows != group.num_rows:
            raise ValueError(f"row group {index} has {table.num_rows} rows, expected {group.num_rows}")
        return table

    def _order(self, source: Any) -> NDArray[np.int32]:
        """[V] the order of ids that the file's first row begins."""
        offsets, listed = flat(self._read(source, 0, ["id_order"])["id_order"])
        if offsets is None or offsets[1] != len(listed):
            raise ValueError("id_order is not in the first row alone")
        return order_of(listed, self._manifest.vocab_size)

    def sha256(self) -> str:
        """Of the whole file, as it is now."""
        with self.opened() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """The file, open; whatever goes wrong inside is a CorruptShard that names it."""
        with self.reading(), self._store.open_data(self._record.file, self._record.sha256, self._record.bytes) as file:
            yield file

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Whatever goes wrong inside is a CorruptShard that names this file, unless it cannot be read just now."""
        try:
            yield
        except MemoryError as error:  # no damage: `repair` must not set the shard aside
            path = self._store.path(data_path(self._record.file))
            what = f"reading {path} takes more memory than there is ({error or 'no size is known'})"
            raise StorageError(f"{what}\n  next: make memory free, or use a larger machine") from error
        except (ValueError, OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno in UNREACHABLE:
                raise self._store.failed(f"reading {data_path(self._record.file)}", error) from error
            raise self.corrupt(f"it cannot be read: {error}") from error

    def corrupt(self, what: str) -> CorruptShard:
        """The error to raise about this file."""
        return CorruptShard(self._record.shard, self._store, data_path(self._record.file), what)
