"""Caches as a stranger would make them: whatever is in them, every hash, size and record is right.

    parquet = Parquet.of(data)                            # a data file, taken apart
    parquet.chunk(0, "slots")[5].value = 2**40            # its footer says so many numbers
    put_shard(cache, 1, parquet.data(), rows=3)           # written, hashed, recorded and sealed
    [(what, came)] = jail.read(cache)                     # opened, read and verified in a child, memory limited

`Toy` makes the honest cache that each begins with.
"""

import hashlib
import importlib.util
import json
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import thrift

from cache_schema import jsondoc
from cache_schema.layout import data_name

ROOT = Path(__file__).parent.parent.parent


def _toy() -> Any:
    """The toy cache of tests/cache_schema, which is a conftest and no module to import."""
    name = "toys_of_the_cache"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "cache_schema" / "conftest.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].Toy


Toy = _toy()


# -- documents


def rewrite(path: Path, **changes: Any) -> None:
    """Change a document and give it a right checksum."""
    body = json.loads(path.read_text(encoding="utf-8"))
    kind = body.pop("format").removeprefix("logitbank.")
    del body["checksum"], body["schema_version"]
    path.write_bytes(jsondoc.dump(kind, {**body, **changes}))


def checksummed(body: bytes) -> bytes:
    """The text of a JSON object of canonical form, with its checksum: for objects too large or deep to be dumped."""
    return body[:-1] + b',"checksum":"' + hashlib.sha256(body).hexdigest().encode() + b'"}'


def change_record(cache: Path, shard: int, **changes: Any) -> None:
    """Change a shard's record, in its own document and in the seal; `file` follows from `sha256`."""
    seal = cache / "sealed.json"
    records = json.loads(seal.read_text(encoding="utf-8"))["records"]
    records[shard] |= changes
    records[shard]["file"] = data_name(shard, records[shard]["sha256"])
    rewrite(seal, records=records)
    rewrite(cache / "shards" / f"{shard:05d}.json", **records[shard])


def data_file(cache: Path, shard: int) -> Path:
    """The data file of a shard."""
    return next((cache / "shards").glob(f"{shard:05d}-*.parquet"))


def put_shard(cache: Path, shard: int, data: bytes, **changes: Any) -> Path:
    """Put other bytes in the place of a shard's data file, with a record that says so; where they lie."""
    data_file(cache, shard).unlink()
    sha256 = hashlib.sha256(data).hexdigest()
    footer = hashlib.sha256(data[-min(len(data), int.from_bytes(data[-8:-4], "little") + 8) :]).hexdigest()
    path = cache / "shards" / data_name(shard, sha256)
    path.write_bytes(data)
    change_record(cache, shard, sha256=sha256, footer_sha256=footer, bytes=len(data), **changes)
    return path


# -- data files


@dataclass
class Parquet:
    """A data file as pages and footer. Fields by their numbers in parquet.thrift."""

    pages: bytes  # everything before the footer, the magic at its start included
    footer: thrift.Struct
    magic: bytes = b"PAR1"

    @classmethod
    def of(cls, data: bytes) -> "Parquet":
        start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        return cls(data[:start], thrift.loads(data, start)[0], data[-4:])

    def data(self, footer: bytes | None = None) -> bytes:
        """The file again; `footer`: these bytes instead of its own."""
        footer = thrift.dumps(self.footer) if footer is None else footer
        return self.pages + footer + struct.pack("<I", len(footer)) + self.magic

    def columns(self, group: int = 0) -> list[thrift.Struct]:
        """The ColumnMetaData of a row group, in order."""
        return [column[3].value for column in self.footer[4].value[group][1].value]

    def chunk(self, group: int, name: str) -> thrift.Struct:
        """The ColumnMetaData of a column: 2 encodings, 4 codec, 5 numbers, 6 and 7 bytes, 9 and 11 offsets."""
        return next(column for column in self.columns(group) if b".".join(column[3].value) == name.encode())

    def header(self, group: int, name: str) -> tuple[thrift.Struct, bytes]:
        """The first PageHeader of a column and the compressed bytes of its page."""
        chunk = self.chunk(group, name)
        header, end = thrift.loads(self.pages, chunk[11 if 11 in chunk else 9].value)
        return header, self.pages[end : end + header[3].value]

    def put_page(self, group: int, name: str, header: thrift.Struct, page: bytes, checksum: bool = True) -> None:
        """Another single page for a column, at the end of the file; the footer's sizes and offsets follow it."""
        self.put_pages(group, name, [(header, page)], checksum)

    def put_pages(self, group: int, name: str, pages: list[tuple[thrift.Struct, bytes]], checksum: bool = True) -> None:
        """The same of several pages; where there is more than one, the first is a dictionary."""
        chunk = self.chunk(group, name)
        starts, unpacked = [], 0
        for header, page in pages:
            header[3].value = len(page)
            if checksum:
                crc = zlib.crc32(page)
                header[4] = thrift.Field(thrift.I32, crc - (crc >> 31 << 32))
            raw = thrift.dumps(dict(sorted(header.items())))
            starts.append(len(self.pages))
            unpacked += len(raw) + header[2].value
            self.pages += raw + page
        self.set_dictionary(group, name, starts[0] if len(starts) > 1 else None)
        chunk[9].value = starts[min(1, len(starts) - 1)]
        chunk[7].value = len(self.pages) - starts[0]
        chunk[6].value = unpacked

    def set_dictionary(self, group: int, name: str, at: int | None) -> None:
        """Where the footer says that a column's dictionary is; None: that it has none."""
        chunk = self.chunk(group, name)
        fields = {n: field for n, field in chunk.items() if n != 11}
        if at is not None:
            fields[11] = thrift.Field(thrift.I64, at)
        chunk.clear()
        chunk.update(sorted(fields.items()))  # a footer's fields come in this order
