"""Caches of a stranger that are small and say that they are large: refused before the memory is taken.

Every hash in them is right. Each is opened, read, verified and shown in a child that may take 700 MB more than it
began with; each step must end well or in a CacheError, never in a MemoryError, a signal, or too late.
"""

import hashlib
import json
import shutil

import promised
import pytest
import thrift
from jail import Jail
from strangers import Parquet, Toy, change_record, checksummed, data_file, put_shard, rewrite
from thrift import I32, I64, Field

from cache_schema.manifest import Manifest
from cache_schema.store import open_store

HUGE = 2**31 - 1


def manifest_of(**changes):
    """A manifest with other numbers, and a vocabulary's hash that fits whatever lies there."""
    return lambda cache: rewrite(cache / "manifest.json", **changes)


def raw_document(name, body):
    """A document of this text, its checksum right."""

    def forge(cache):
        honest = json.loads((cache / name).read_text())
        text = body(honest) if callable(body) else body
        (cache / name).write_bytes(checksummed(text))

    return forge


def deep_manifest(depth, field="provenance", opening=b"[", closing=b"]"):
    def body(honest):
        del honest["checksum"]
        honest[field] = {"x": "@"}
        text = json.dumps(honest, sort_keys=True, separators=(",", ":")).encode()
        return text.replace(b'"@"', opening * depth + b"1" * (opening != b"[") + closing * depth)

    return raw_document("manifest.json", body)


def filler(name, field, content):
    """A document with a field of this JSON text."""

    def body(honest):
        del honest["checksum"]
        honest[field] = "@"
        return json.dumps(honest, sort_keys=True, separators=(",", ":")).encode().replace(b'"@"', content)

    return raw_document(name, body)


def vocabulary_of(content):
    def forge(cache):
        (cache / "vocabulary.json").write_bytes(content)
        rewrite(cache / "manifest.json", vocabulary_sha256=hashlib.sha256(content).hexdigest())

    return forge


def sparse(name, size):
    """A file of this size that takes no room on the disk."""

    def forge(cache):
        with (cache / name).open("r+b") as file:
            file.truncate(size)

    return forge


DOCUMENTS = {
    **{f"nested {d} deep, {field}": deep_manifest(d, field) for d in (50, 500, 900, 950, 980, 990, 10**5)
       for field in ("identity", "provenance")},
    "objects nested 400 deep": deep_manifest(400, "provenance", b'{"a":', b"}"),
    "a manifest of 2 million lists": filler("manifest.json", "provenance", b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"),
    "a manifest of 12 million lists": filler("manifest.json", "identity", b'{"a":[' + b"[]," * 12_000_000 + b"[]]}"),
    "a seal of 12 million objects": filler("sealed.json", "records", b"[" + b"{}," * 12_000_000 + b"{}]"),
    "a seal of 30 million numbers": filler("sealed.json", "records", b"[" + b"1000," * 30_000_000 + b"1]"),
    "a record of 12 million lists": filler("shards/00001.json", "quarantined", b"[" + b"[]," * 12_000_000 + b"[]]"),
    "a number of a million digits": filler("manifest.json", "examples", b"9" * 10**6),
    "a number of 4000 digits": filler("manifest.json", "examples", b"9" * 4000),
    "4000 digits of K": filler("manifest.json", "top_k", b"9" * 4000),
    "a step of 1e999": filler("manifest.json", "step", b"1e999"),
    "a seal of 64 GiB": sparse("sealed.json", 2**36),
    "a manifest of 64 GiB": sparse("manifest.json", 2**36),
    "a record of 64 GiB": sparse("shards/00001.json", 2**36),
    "a vocabulary of 64 GiB": sparse("vocabulary.json", 2**36),
    "a vocabulary of 12 million lists": vocabulary_of(b"[" + b"[]," * 12_000_000 + b"[]]"),
    "a vocabulary that is no list of texts": vocabulary_of(b"[" + b"[[]]," * 39 + b"1]"),
    "2**31 - 1 ids and ranks": manifest_of(vocab_size=HUGE, top_k=HUGE),
    "2**31 - 1 ids": manifest_of(vocab_size=HUGE),
    "10**15 examples, one a shard": manifest_of(examples=10**15, shard_examples=1),
    "10**15 examples in a shard": manifest_of(examples=10**15, shard_examples=10**15),
    "10**30 examples": manifest_of(examples=10**30, shard_examples=10**30),
    "a step of 2**-1074": manifest_of(step=2.0**-1074),
    "a step of 2**1023": manifest_of(step=2.0**1023),
    "the smallest step of codec small": manifest_of(step=2.0**-1074, codec="small"),
    "the largest step of codec small": manifest_of(step=2.0**1023, codec="small"),
    "a temperature of 1e-308": manifest_of(temperatures=[1e-308, 2.5]),
    "a temperature of 1e308": manifest_of(temperatures=[1e308, 2.5]),
    "300 thousand temperatures": manifest_of(temperatures=[1.0 + i for i in range(300_000)]),
    **{f"{field} of 10**18 and more": lambda cache, f=field: change_record(cache, 1, **{f: 10**18})
       for field in ("positions", "bytes")},
    "10**4000 positions": lambda cache: change_record(cache, 1, positions=10**4000),
    "10**4000 bytes": lambda cache: change_record(cache, 1, bytes=10**4000),
    "a codec error of 1e308": lambda cache: change_record(cache, 1, codec_error_max=1e308),
    "10**4000 positions quarantined": lambda cache: change_record(
        cache, 1, rows=2, quarantined=[{"example_id": "e", "task": "t", "reason": "r", "positions": 10**4000}]
    ),
}  # fmt: skip


# -- data files


def footer_of(change):
    """Shard 1 with a changed footer, recorded rightly."""

    def forge(cache):
        parquet = Parquet.of(data_file(cache, 1).read_bytes())
        change(parquet)
        put_shard(cache, 1, parquet.data())

    return forge


def set_chunk(name, positions=None, **fields):
    """Numbers of a column's ColumnMetaData; positions: what the record says."""

    def forge(cache):
        parquet = Parquet.of(data_file(cache, 1).read_bytes())
        for number, value in fields.items():
            parquet.chunk(0, name)[int(number[1:])].value = value
        put_shard(cache, 1, parquet.data(), **({} if positions is None else {"positions": positions}))

    return forge


def page(name, size, content=None, values=None, positions=None, says=None, footer=None):
    """A column whose page unpacks to `size` bytes of zeros; its header says so, or `says`; so does the footer."""

    def forge(cache):
        import pyarrow as pa

        parquet = Parquet.of(data_file(cache, 1).read_bytes())
        header, _ = parquet.header(0, name)
        compressor = pa.CompressedOutputStream(sink := pa.BufferOutputStream(), "zstd")
        for chunk in content or [bytes(2**20)] * (size >> 20):
            compressor.write(chunk)
        compressor.close()
        header[1].value, header[2].value = 0, size if says is None else says
        header.pop(7, None)
        count = Field(I32, parquet.chunk(0, name)[5].value if values is None else values)
        encoding = header[5].value[2] if 5 in header else Field(I32, 0)
        header[5] = Field(thrift.STRUCT, {1: count, 2: encoding, 3: Field(I32, 3), 4: Field(I32, 3)})
        parquet.chunk(0, name)[5].value = count.value
        parquet.put_page(0, name, header, sink.getvalue().to_pybytes())
        parquet.chunk(0, name)[6].value = parquet.chunk(0, name)[6].value if footer is None else footer
        put_shard(cache, 1, parquet.data(), **({} if positions is None else {"positions": positions}))

    return forge


def empty_groups(count):
    def change(parquet):
        groups = parquet.footer[4].value
        empty = {1: Field(thrift.LIST, [], thrift.STRUCT), 2: Field(I64, 0), 3: Field(I64, 0)}
        groups.extend([empty] * count)

    return footer_of(change)


def many_columns(count):
    def change(parquet):
        group = parquet.footer[4].value[0]
        group[1].value = [{2: Field(I64, 0)}] * count

    return footer_of(change)


def columns_of_lies(parquet):
    """A footer of 2 MB, all of it columns that have hardly a byte each."""
    group = {1: Field(thrift.LIST, [{2: Field(I64, 0)}] * 2000, thrift.STRUCT), 2: Field(I64, 0), 3: Field(I64, 0)}
    parquet.footer[4].value = [group] * 345


def said_size(change):
    """A footer in which a length is said that its bytes do not have."""

    def forge(cache):
        parquet = Parquet.of(data_file(cache, 1).read_bytes())
        put_shard(cache, 1, parquet.data(change(thrift.dumps(parquet.footer))))

    return forge


def a_long_text(size):
    def change(parquet):
        parquet.footer[6].value = b"x" * size

    return footer_of(change)


def expanding_dictionary(rows, size):
    """`task` as one text of `size` bytes, said once, for every one of the rows."""

    def forge(cache):
        import pyarrow as pa

        shutil.rmtree(cache)
        Toy(examples=rows, shard_examples=rows, max_positions=1).build(cache)
        parquet = Parquet.of(data_file(cache, 0).read_bytes())
        chunk = parquet.chunk(0, "task")
        dictionary, _ = parquet.header(0, "task")
        header, end = thrift.loads(parquet.pages, chunk[9].value)
        indices = parquet.pages[end : end + header[3].value]
        text = size.to_bytes(4, "little") + b"x" * size
        dictionary[2].value = len(text)
        packed = pa.Codec("zstd").compress(text).to_pybytes()
        parquet.put_pages(0, "task", [(dictionary, packed), (header, indices)])
        put_shard(cache, 0, parquet.data())

    return forge


def honest_zeros(positions, top_k):
    """A row of this many positions, all zeros and consistent in everything: a megabyte unpacks to what it says."""

    def forge(cache):
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        from cache_schema.shard import _tag, parquet_writer
        from cache_schema.table import ARROW_SCHEMA

        rewrite(cache / "manifest.json", top_k=top_k, vocab_size=2**20, store_ids=False)
        manifest = Manifest.load(open_store(cache))
        table = pq.read_table(data_file(cache, 1))
        n, t = positions, len(manifest.temperatures)
        lists = {"answer_ids": (n, "i4"), "answer_offsets": (2 * n, "i4"), "status": (n, "u1"),
                 "top_logit": (n, "f4"), "rank_steps": (n * -(-top_k // 4), "u1"), "rank_excess": (0, "i4"),
                 "logsumexp": (n * t, "f4"), "log_tail": (n * t, "f4")}  # fmt: skip
        columns = []
        for field in ARROW_SCHEMA:
            if not pa.types.is_list(field.type):
                columns.append(table[field.name].combine_chunks()[:1])
            elif field.name in lists:
                size, kind = lists[field.name]
                values = pa.array(np.zeros(size, kind), field.type.value_type)
                columns.append(pa.ListArray.from_arrays(pa.array([0, size], pa.int32()), values, type=field.type))
            else:
                columns.append(pa.nulls(1, field.type))
        table = pa.Table.from_arrays(columns, schema=ARROW_SCHEMA)
        with parquet_writer(sink := pa.BufferOutputStream()) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"logitbank": _tag(1, manifest)})
        gone = {"example_id": "e", "task": "t", "reason": "r", "positions": 0}
        put_shard(cache, 1, sink.getvalue().to_pybytes(), rows=1, positions=n, quarantined=[gone, gone],
                  quarantined_positions={})  # fmt: skip

    return forge


def decoy(size):
    """`prompt` twice: a page of `size` bytes, where the data are said to be, and behind it the honest one, where a
    dictionary is said to be: all that is checked of a reader that believes it."""

    def forge(cache):
        import pyarrow as pa

        parquet = Parquet.of(data_file(cache, 1).read_bytes())
        honest, content = parquet.header(0, "prompt")
        lies, _ = parquet.header(0, "prompt")
        texts = ((size // 3).to_bytes(4, "little") + b"x" * (size // 3)) * 3
        lies[2].value = len(texts)
        parquet.put_page(0, "prompt", lies, pa.Codec("zstd").compress(texts).to_pybytes())
        at, room = (parquet.chunk(0, "prompt")[n].value for n in (9, 7))
        for _ in range(3):  # as long as the other, its header too
            parquet.pages = parquet.pages[: at + room]
            parquet.put_page(0, "prompt", honest, content)
            longer = room - parquet.chunk(0, "prompt")[7].value
            content = content + bytes(longer) if longer > 0 else content[: len(content) + longer]
        assert not longer
        parquet.set_dictionary(0, "prompt", parquet.chunk(0, "prompt")[9].value)
        parquet.chunk(0, "prompt")[9].value = at
        put_shard(cache, 1, parquet.data())

    return forge


def set_dictionary(size):
    """`task` with a dictionary that says it has so many texts."""

    def forge(cache):
        parquet = Parquet.of(data_file(cache, 1).read_bytes())
        chunk = parquet.chunk(0, "task")
        dictionary, text = parquet.header(0, "task")
        data, end = thrift.loads(parquet.pages, chunk[9].value)
        indices = parquet.pages[end : end + data[3].value]
        dictionary[7].value[1].value = size
        parquet.put_pages(0, "task", [(dictionary, text), (data, indices)])
        put_shard(cache, 1, parquet.data())

    return forge


def two_readings(cache):
    """A footer whose list of columns says that it has texts, the first of them long. pyarrow reads columns all the
    same, and goes on inside that text, to a compression that nobody knows; behind the text stands an honest footer."""
    parquet = Parquet.of(data_file(cache, 1).read_bytes())
    root, *others = parquet.footer[2].value
    columns = b"".join(map(thrift.dumps, [{15: Field(thrift.BINARY, bytes(200))} | root, *others]))

    def tail():  # field 2, the list, is here a truth, of one byte
        fields = {n: field for n, field in parquet.footer.items() if n > 2}
        return thrift.dumps({2: Field(thrift.TRUE, True)} | fields)[1:]

    honest = tail()
    parquet.chunk(0, "prompt")[4].value = 65536
    text, at = columns + tail(), 3  # these three bytes are a field and its size to one, the size of all to the other
    assert text[:at] == b"\xf8" + thrift.varint(200)
    start = thrift.dumps({1: parquet.footer[1]})[:-1] + b"\x19\xf8" + thrift.varint(len(others) + 1)
    text = text[:at] + text[at:].ljust(0x78 + 128 * 200, b"\0")
    put_shard(cache, 1, parquet.data(start + text + bytes(len(others)) + honest))


def shared_pages(cache):
    """Two row groups of the same bytes."""
    parquet = Parquet.of(data_file(cache, 0).read_bytes())
    positions = json.loads((cache / "shards" / "00000.json").read_text())["positions"]
    reasons = json.loads((cache / "shards" / "00000.json").read_text())["quarantined_positions"]
    rows = parquet.footer[3].value
    shutil.rmtree(cache)
    Toy(examples=2 * rows, shard_examples=2 * rows).build(cache)
    parquet.footer[3].value = 2 * rows
    parquet.footer[4].value *= 2
    put_shard(cache, 0, parquet.data(), positions=2 * positions,
              quarantined_positions={reason: 2 * n for reason, n in reasons.items()})  # fmt: skip


def said_path(name, path):
    """A column that says it is another."""
    return footer_of(lambda p: p.chunk(0, name)[3].__setattr__("value", path))


DATA = {
    "2**60 rows": footer_of(lambda p: p.footer.__setitem__(3, Field(I64, 2**60))),
    "2**60 rows in the group": footer_of(lambda p: p.footer[4].value[0].__setitem__(3, Field(I64, 2**60))),
    "-1 rows": footer_of(lambda p: p.footer.__setitem__(3, Field(I64, -1))),
    "-1 rows in the group": footer_of(lambda p: p.footer[4].value[0].__setitem__(3, Field(I64, -1))),
    "320 thousand empty groups": empty_groups(320_000),
    "900 thousand columns": many_columns(900_000),
    "a text of 50 MB in the footer": a_long_text(50_000_000),
    "a text of 2 GiB said in the footer": said_size(lambda f: f.replace(b"\x06schema", thrift.varint(HUGE))),
    "2**31 groups said in the footer": said_size(lambda f: f.replace(b"\x19\x1c", b"\x19\xfc\xff\xff\xff\xff\x07")),
    "690 thousand columns in 345 groups": footer_of(columns_of_lies),
    "lists in lists": said_size(lambda f: b"\x19" * 5000),
    "structs in structs": said_size(lambda f: b"\x1c" * 4_000_000),
    **{f"2**50 {what} of {name}": set_chunk(name, **{number: 2**50}) for name in ("slots.list.element", "prompt")
       for what, number in (("numbers", "f5"), ("unpacked bytes", "f6"), ("bytes", "f7"))},
    "2**50 numbers, and the positions for them": set_chunk("slots.list.element", positions=2**50, f5=2**50),
    "2**40 numbers of a text, and the positions": set_chunk("prompt", positions=2**50, f5=2**40),
    "2**40 ids in id_order": set_chunk("id_order.list.element", f5=2**40),
    "a compression that nobody knows": set_chunk("prompt", f4=65536),  # found by the fuzzer: ended the process
    "a type that nobody knows": set_chunk("prompt", f1=999),
    "-1 numbers": set_chunk("slots.list.element", f5=-1),
    "a column from 2**60": set_chunk("slots.list.element", f9=2**60),
    "a column from -1": set_chunk("slots.list.element", f9=-1),
    "a page that says 2 GiB": page("slots.list.element", 2**20, says=HUGE),
    "a page of a text that says 2 GiB": page("prompt", 2**20, says=HUGE),
    "a page that says 2 GiB, where the footer says 600 bytes": page("slots.list.element", 2**20, says=HUGE, footer=600),
    "a page of a text that unpacks to 2 GB, where the footer says 90": page("prompt", 2**31 - 2**20, footer=90),
    "a page that unpacks to 2 GB": page("slots.list.element", 2**31 - 2**20),
    "a page of a text that unpacks to 2 GB": page("prompt", 2**31 - 2**20),
    "a text of 1 GiB": page(
        "prompt", 2**30 + 12, [(2**30).to_bytes(4, "little"), *[b"a" * 2**20] * 2**10, bytes(8)]
    ),
    "a text column of 2**31 empty texts": page("prompt", 2**20, values=HUGE, positions=HUGE),
    "a dictionary that says -1 bytes": page("status.list.element", 2**20, says=-1),
    "a page of a text that unpacks to 300 MB, and a decoy": decoy(300 * 10**6),
    "a footer to be read in two ways": two_readings,
    "two row groups of the same bytes": shared_pages,
    "a column of a name that nobody knows": said_path("prompt", [b"prompu"]),
    "a text that says it is slots": said_path("prompt", [b"slots", b"list", b"element"]),
    "a dictionary of 2**31 - 1 texts": set_dictionary(HUGE),
    "800 rows of one text of 1 MB": expanding_dictionary(800, 10**6),
    "a row of 2**27 logits, all there": honest_zeros(2**17, 2**10),
    "a row of 2**26 logits, all there": honest_zeros(2**14, 2**12),
}  # fmt: skip
BOMBS = DOCUMENTS | DATA


# What takes seconds to forge, or to read to where it is refused.
HEAVY = {name for name in BOMBS if "million lists" in name or "64 GiB" in name or "all there" in name}
HEAVY |= {"a seal of 30 million numbers", "a seal of 12 million objects", "800 rows of one text of 1 MB"}
HEAVY |= {"690 thousand columns in 345 groups", "900 thousand columns", "320 thousand empty groups"}
HEAVY |= {"300 thousand temperatures", "a page of a text that unpacks to 2 GB", "a text of 1 GiB"}

# What says no more than it is: read, or an error all the same.
MAY_BE_READ = {"nested 50 deep, provenance", "a manifest of 2 million lists", "a codec error of 1e308"}
MAY_BE_READ |= {
    "a record of 12 million lists",
    "a record of 64 GiB",
    "800 rows of one text of 1 MB",
}  # verify alone reads it; the text is made once
TOO_LARGE_HERE = {"a row of 2**26 logits, all there"}  # within the bounds, and beyond this child's memory


@pytest.mark.promise(promised.STRANGE_CACHE)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(sorted(DOCUMENTS.keys() - HEAVY), id="documents"),
        pytest.param(sorted(DATA.keys() - HEAVY), id="data files"),
        pytest.param(sorted(HEAVY), id="heavy", marks=pytest.mark.slow),
    ],
)
def test_bombs(forge, jail, tried, names):
    found = {}
    for name in names:
        cache = forge()
        BOMBS[name](cache)
        visit = jail.read(cache)
        refused = [outcome for outcome in visit.outcomes if outcome.error]
        late = [o.message for o in refused if "more memory than there is (" in o.message or "bad_alloc" in o.message]
        if visit.bad:
            found[name] = visit.bad
        elif not refused and name not in MAY_BE_READ:
            found[name] = "it was read"
        elif late and name not in TOO_LARGE_HERE:  # not by what it says, but by what there was
            found[name] = late
    assert not found, "\n".join(f"{name}: {what}" for name, what in found.items())
    tried(len(names), "caches that say they are larger than they are")


def test_the_limits_limit(honest, tmp_path):
    """The control: with little memory, or no time, an honest cache is not read either."""
    large = Toy(examples=1, shard_examples=1, max_positions=1, vocab_size=300_000).build(tmp_path / "large")
    with Jail(memory_mb=1) as jail:
        visit = jail.read(large)
        assert visit.bad or any("memory" in outcome.message for outcome in visit.outcomes)
    with Jail(time_s=0) as jail:
        assert jail.read(honest).bad == ["the process: ended by the clock, after 0 s"]
    with Jail() as jail:
        visit = jail.read(honest)
    assert not visit.bad and not any(outcome.error for outcome in visit.outcomes) and visit.peak_mb < 200
