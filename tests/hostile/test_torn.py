"""A torn or altered file is never read as data; it is named, and repair sets aside it alone."""

import hashlib
import json
import random
import shutil
import zlib

import promised
import pyarrow as pa
import pytest
import thrift
from strangers import Parquet, Toy, data_file, rewrite
from torn import sweep

from cache_schema.__main__ import main
from cache_schema.errors import CacheError
from cache_schema.reader import CacheReader
from cache_schema.verify import verify

KINDS = {
    "topk": {},
    "ranks alone": {"store_ids": False},
    "sampled": {"selector": "sampled", "codec": "small"},
}
DOCUMENTS = ("manifest.json", "sealed.json", "vocabulary.json", "shards/00001.json")


def thorough(quick, slow):
    """The same test twice: some, and many times."""
    return [pytest.param(quick, id="some"), pytest.param(slow, id="many", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=KINDS)
def cache(request, tmp_path_factory):
    return Toy(**KINDS[request.param]).build(tmp_path_factory.mktemp("torn") / "cache")


def flipped(data, bits):
    """These bits of it turned over."""
    damaged = bytearray(data)
    for bit in bits:
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@pytest.mark.promise(promised.TORN)
@pytest.mark.parametrize("step", thorough(97, 1))
def test_a_data_file_cut_at_every_length(cache, tried, step):
    path = data_file(cache, 1)
    data = path.read_bytes()
    lengths = range(0, len(data), step)
    assert sweep(cache, path, ((f"cut to {n} bytes", data[:n]) for n in lengths)) == []
    tried(len(lengths), "lengths a data file was cut to")


@pytest.mark.promise(promised.TORN)
@pytest.mark.parametrize("count", thorough(30, 2500))
def test_bits_of_a_data_file(cache, tried, count):
    """One bit; some anywhere; some beside each other. Pages, their headers and the footer alike."""
    rng = random.Random(count)
    path = data_file(cache, 1)
    data = path.read_bytes()
    bits = 8 * len(data)
    damages = []
    for i in range(count):
        start = rng.randrange(bits)
        chosen = ([start], rng.sample(range(bits), rng.randint(2, 8)), range(start, min(bits, start + 9)))[i % 3]
        damages.append((f"bits {list(chosen)}", flipped(data, chosen)))
    assert sweep(cache, path, damages) == []
    tried(count, "flips of bits in a data file")


@pytest.mark.promise(promised.TORN)
@pytest.mark.parametrize("step", thorough(97, 1))
def test_every_header_of_a_page(cache, tried, step):
    """No checksum covers a page's header, and a decoder believes it: each of its bits is turned over, and bytes set."""
    path = data_file(cache, 1)
    data = path.read_bytes()
    damages = []
    for column in Parquet.of(data).columns():
        start = column[11 if 11 in column else 9].value
        end = thrift.loads(data, start)[1]
        damages += [(f"bit {bit} (a header)", flipped(data, [bit])) for bit in range(8 * start, 8 * end)]
        for at in range(start, end):
            for value in (0x00, 0x0A, 0x10, 0x12, 0x15, 0x18, 0xFF):  # encodings, kinds and the end of a struct
                if data[at] != value:
                    damages.append((f"byte {at} set to {value}", data[:at] + bytes([value]) + data[at + 1 :]))
    damages = damages[::step]
    assert sweep(cache, path, damages) == []
    tried(len(damages), "changes in the headers of pages")


@pytest.mark.promise(promised.TORN)
@pytest.mark.parametrize("count", thorough(12, 400))
def test_blocks_of_a_data_file(cache, tried, count):
    """What a disk or a copy does: blocks of zeros, of other files, moved, doubled; a longer file."""
    rng = random.Random(count)
    path, other = data_file(cache, 1), data_file(cache, 0).read_bytes()
    data = path.read_bytes()
    damages = [("another shard's file", other), ("nothing", b""), ("the file twice", data + data)]
    while len(damages) < count:
        start, size = rng.randrange(len(data)), rng.choice((1, 16, 128, 512, 4096))
        to = rng.randrange(len(data))
        content = rng.choice((bytes(size), b"\xff" * size, other[start : start + size], data[to : to + size]))
        damaged = data[:start] + content + data[start + rng.choice((0, len(content))) :]
        if damaged != data:
            damages.append((f"{len(content)} bytes at {start}", damaged))
    assert sweep(cache, path, damages) == []
    tried(len(damages), "blocks of a data file written wrongly")


@pytest.mark.promise(promised.TORN)
@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("count", thorough(9, 1200))
def test_bits_and_lengths_of_a_document(cache, tried, name, count):
    """White space may change; a value never does unseen."""
    rng = random.Random(name)
    path = cache / name
    data = path.read_bytes()
    damages = [(f"cut to {n}", data[:n]) for n in rng.sample(range(len(data) - 1), min(count // 3, len(data) - 1))]
    damages += [("indented otherwise", data.replace(b"\n", b"\n\n"))] * (name != "vocabulary.json")
    while len(damages) < count:
        bits = rng.sample(range(8 * len(data)), rng.choice((1, 1, 2, 5)))
        damages.append((f"bits {bits}", flipped(data, bits)))
    assert sweep(cache, path, damages) == []
    tried(len(damages), "damages to a JSON document")


def test_what_would_be_found(cache):
    """The control: values that are altered with every checksum that a reader looks at made to fit."""
    seal, path = cache / "sealed.json", data_file(cache, 1)
    before, data = seal.read_bytes(), path.read_bytes()
    rewrite(seal, records=[r | {"codec_error_max": 0.5} for r in json.loads(before)["records"]])
    altered = seal.read_bytes()
    seal.write_bytes(before)
    found = sweep(cache, seal, [("an error that nobody made", altered)])
    assert any("another manifest, record" in what for what in found), found
    parquet = Parquet.of(data)
    start = parquet.chunk(0, "prompt")[9].value
    header, page = parquet.header(0, "prompt")
    text = pa.decompress(page, header[2].value, "zstd").to_pybytes()
    page = pa.Codec("zstd", 9).compress(text.replace(b"What", b"Whom")).to_pybytes()
    end = start + parquet.chunk(0, "prompt")[7].value
    header[3].value, crc = len(page), zlib.crc32(page)
    header[4].value = crc - (crc >> 31 << 32)
    forged = thrift.dumps(header) + page
    assert len(forged) == end - start
    found = sweep(cache, path, [("a page", data[:start] + forged + data[end:])])
    assert any("has other values" in what for what in found), found
    assert not any("verify said good=True" in what for what in found), found


# -- repair


def state(cache):
    """Every file: its inode, when it was written, and its content."""
    files = (path for path in cache.rglob("*") if path.is_file())
    return {
        str(path.relative_to(cache)): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in files
    }


def damaged_data(path, rng):
    data = path.read_bytes()
    return rng.choice((flipped(data, [rng.randrange(8 * len(data))]), data[: rng.randrange(len(data))]))


@pytest.mark.promise(promised.TORN)
@pytest.mark.parametrize("count", thorough(12, 300))
def test_repair_sets_aside_one_shard_and_only_that_is_made_again(tmp_path, tried, capsys, count):
    toy, rng = Toy(), random.Random(count)
    whole = toy.build(tmp_path / "whole")
    for i in range(count):
        cache = tmp_path / f"c{i}"
        shutil.copytree(whole, cache)
        before, shard = state(cache), rng.randrange(3)
        path = data_file(cache, shard)
        damaged = damaged_data(path, rng) if i % 4 else None
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        assert [p.shard for p in verify(cache).problems] == [shard]
        assert main(["repair", str(cache)]) in (0, 1), capsys.readouterr()
        name, record = f"shards/{path.name}", f"shards/{shard:05d}.json"
        after = state(cache)
        touched = {name, record, "sealed.json"}
        assert {n: s for n, s in after.items() if not n.startswith("aside/")} == {
            n: s for n, s in before.items() if n not in touched
        }
        aside = {s[2] for n, s in after.items() if n.startswith("aside/")}
        expected = {before[record][2], before["sealed.json"][2]}
        assert aside == expected | ({hashlib.sha256(damaged).hexdigest()} if damaged is not None else set())
        writer = toy.writer(cache)
        assert writer.missing() == [shard]
        toy.commit(writer, shard)
        writer.seal()
        again = state(cache)
        assert all(again[n] == before[n] for n in before if n not in touched)
        assert {n: again[n][2] for n in touched} == {n: before[n][2] for n in touched}
        assert verify(cache).good and verify(cache).complete
        shutil.rmtree(cache)
    tried(count, "damaged shards set aside and made again")


@pytest.mark.parametrize("name", ["sealed.json", "vocabulary.json", "shards/00001.json"])
def test_repair_of_a_document_makes_no_shard_again(tmp_path, name):
    toy = Toy()
    cache = toy.build(tmp_path / "cache")
    before = state(cache)
    (cache / name).write_bytes(flipped((cache / name).read_bytes(), [800]))
    assert not verify(cache).good
    assert main(["repair", str(cache)]) in (0, 1)
    writer = toy.writer(cache)
    assert writer.missing() == []
    writer.seal()
    after = state(cache)
    assert verify(cache).good
    assert {n: after[n][2] for n in before} == {n: before[n][2] for n in before}
    assert all(after[n] == before[n] for n in before if n != name)


def test_repair_without_a_manifest_touches_nothing(tmp_path):
    cache = Toy().build(tmp_path / "cache")
    (cache / "manifest.json").write_bytes(b"{")
    before = state(cache)
    assert main(["repair", str(cache)]) == 2
    assert state(cache) == before
    with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
        CacheReader.open(cache)
