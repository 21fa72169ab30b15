"""A fuzzer of caches: everything is changed at random, then hashed again, so that the changes reach the deep code.

    LOGITBANK_FUZZ_S=3600 pytest tests/hostile/test_fuzz.py -m slow     # as long as you like

A finding is anything but a good end or a CacheError: another exception, a signal, more than 700 MB, more than a minute.
It is printed with its seed; the seeds that found something, or went new ways, are kept in corpus/seeds.txt and are
tried first by everybody. A seed says everything: what is changed, where, and to what.
"""

import contextlib
import json
import os
import random
import shutil
import time
from pathlib import Path

import promised
import pytest
from strangers import Parquet, Toy, change_record, data_file, put_shard, rewrite
from thrift import BINARY, I32, I64, LIST, STRUCT

CORPUS = Path(__file__).parent / "corpus" / "seeds.txt"
FUZZ_S = float(os.environ.get("LOGITBANK_FUZZ_S", "240"))
NUMBERS = (0, 1, -1, 2, 3, 7, 15, 16, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1)
# What the forger meets where an earlier change left nothing to change.
NOTHING_LEFT = (AssertionError, AttributeError, IndexError, KeyError, OSError, StopIteration, TypeError, ValueError)
KINDS = ({}, {"store_ids": False}, {"selector": "sampled", "codec": "small"}, {"codec": "small"})
VALUES = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**53, 2**64, 0.5, 1.0, -0.0, 1e308, 5e-324, 1.5, 64.0, 2.0**-24),
    *("", "x", "\x00", "é🙂", "a" * 999, "0" * 64, "00001-0123456789abcdef.parquet", "../x"),
    *([], {}, [[]], [1], [1.0], {"a": 1}, [None]),
)


def mutated(value, rng):
    """A JSON value with one part of it changed."""
    if type(value) in (dict, list) and value and rng.random() < 0.85:
        keys = list(value) if type(value) is dict else range(len(value))
        key = rng.choice(keys)
        copy = dict(value) if type(value) is dict else list(value)
        choice = rng.random()
        if choice < 0.08:
            del copy[key]
        elif choice < 0.14 and type(copy) is dict:
            copy[rng.choice(("extra", "", "format", key + "x"))] = rng.choice(VALUES)
        elif choice < 0.2 and type(copy) is list:
            copy.insert(key, rng.choice((copy[key], rng.choice(VALUES))))
        else:
            copy[key] = mutated(copy[key], rng)
        return copy
    if type(value) in (int, float) and rng.random() < 0.5:
        return value + rng.choice((1, -1, 2, -value, value, 10**6, 2**40))
    return rng.choice(VALUES)


def mutate_document(cache, rng):
    """A field of a document, its checksum and the seal's copy made to fit."""
    name = rng.choice(("manifest.json", "manifest.json", "sealed.json", "record", "vocabulary.json"))
    if name == "record":
        record = json.loads((cache / "sealed.json").read_text())["records"][1]
        changes = mutated(record, rng)
        try:
            change_record(cache, 1, **changes)
        except (TypeError, ValueError, KeyError):
            return
        return
    path = cache / name
    if name == "vocabulary.json":
        import hashlib

        data = json.dumps(mutated(json.loads(path.read_text()), rng)).encode()
        path.write_bytes(data)
        rewrite(cache / "manifest.json", vocabulary_sha256=hashlib.sha256(data).hexdigest())
        return
    body = json.loads(path.read_text())
    for own in ("format", "schema_version", "checksum"):
        del body[own]
    changed = mutated(body, rng)
    fits = name == "manifest.json" and type(changed) is dict and type(changed.get("identity")) is dict
    if fits and rng.random() < 0.7:
        from cache_schema.manifest import fingerprint_of

        changed["fingerprint"] = fingerprint_of(changed["identity"])
    from cache_schema import jsondoc

    try:
        path.write_bytes(jsondoc.dump(name.partition(".")[0].replace("sealed", "seal"), changed))
    except (ValueError, TypeError):
        path.write_bytes(json.dumps(changed).encode())


def fields_of(struct):
    """Every field of a Thrift struct, those of structs inside it as well."""
    for field in struct.values():
        yield field
        many = field.value if field.kind == LIST and field.items == STRUCT else []
        for item in [field.value] if field.kind == STRUCT else many:
            yield from fields_of(item)


def mutate_struct(struct, rng):
    field = rng.choice(list(fields_of(struct)))
    if field.kind in (I32, I64):
        number = rng.choice((*NUMBERS, field.value + 1, field.value - 1, field.value * 2, rng.randrange(2**31)))
        field.value = number
    elif field.kind == LIST:
        change = rng.randrange(3)
        if field.value and change == 0:
            field.value = field.value[: rng.randrange(len(field.value))]
        elif field.value and change == 1:
            field.value = field.value + [rng.choice(field.value)] * rng.choice((1, 3, 1000))
        else:
            field.value = sorted(field.value, key=lambda _: rng.random())
    elif field.kind == BINARY:
        field.value = rng.choice((b"", b"x" * 5000, field.value + b"\0", field.value[::-1], b"slots", b"\xff\xfe"))
    elif field.kind == STRUCT and field.value:
        field.value.pop(rng.choice(list(field.value)))


def mutate_data(cache, rng):
    """Footer, page headers or pages of shard 1; checksums and hashes made to fit."""
    parquet = Parquet.of(data_file(cache, 1).read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        try:
            names = [b".".join(c[3].value).decode() for c in parquet.columns()]
            if rng.random() < 0.4:
                mutate_struct(parquet.footer, rng)
                continue
            name = rng.choice(names)
            header, page = parquet.header(0, name)
            if rng.random() < 0.3:
                mutate_struct(header, rng)
            else:
                page = mutated_page(page, header, rng)
            parquet.put_page(0, name, header, page)
        except NOTHING_LEFT:
            break
    data = parquet.data()
    if rng.random() < 0.1:
        data = data[: -8 - rng.randrange(400)] + data[-8:]
    put_shard(cache, 1, data, **({"positions": rng.choice(NUMBERS[:18])} if rng.random() < 0.1 else {}))


def mutated_page(page, header, rng):
    """Other numbers under the compression."""
    import pyarrow as pa

    raw = bytearray(pa.decompress(page, header[2].value, "zstd").to_pybytes())
    for _ in range(rng.choice((1, 1, 3, 20))):
        if raw:
            raw[rng.randrange(len(raw))] = rng.choice((0, 255, 128, 1, rng.randrange(256)))
    if rng.random() < 0.15:
        raw = raw[: rng.randrange(len(raw) + 1)]
    if rng.random() < 0.1:
        raw += bytes(rng.choice((1, 4, 4096, 2**20)))
    header[2].value = len(raw)
    return pa.Codec("zstd").compress(bytes(raw)).to_pybytes()


def forge(caches, folder, seed):
    """The cache of a seed."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(rng.choice(caches), folder)
    for _ in range(rng.choice((1, 1, 2))):
        with contextlib.suppress(*NOTHING_LEFT):
            rng.choice((mutate_document, mutate_data, mutate_data))(folder, rng)
    return folder


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return [Toy(**kind).build(root / str(i)) for i, kind in enumerate(KINDS)]


def fuzz(jail, caches, folder, seeds, until):
    """How many were tried, and the findings. At least one."""
    found, count, errors = {}, 0, 0
    for seed in seeds:
        visit = jail.read(forge(caches, folder, seed))
        count += 1
        errors += any(outcome.error for outcome in visit.outcomes)
        if visit.bad:
            found[seed] = visit.bad
        if time.monotonic() > until:
            break
    return count, errors, found


@pytest.mark.promise(promised.STRANGE_CACHE)
def test_the_corpus(jail, caches, tmp_path, tried):
    """Seeds that found something once, or reach far."""
    seeds = [int(line.split()[0]) for line in CORPUS.read_text().splitlines() if line[:1].isdigit()]
    count, errors, found = fuzz(jail, caches, tmp_path / "c", seeds, time.monotonic() + 60)
    assert not found, found
    assert errors > count // 3  # most changes are seen; a fuzzer that changes nothing finds nothing
    tried(count, "caches of the fuzzer's corpus")


@pytest.mark.promise(promised.STRANGE_CACHE)
@pytest.mark.parametrize(
    "seconds", [pytest.param(4, id="some"), pytest.param(FUZZ_S, id="many", marks=pytest.mark.slow)]
)
@pytest.mark.timeout(FUZZ_S + 300)
def test_fuzzed_caches(jail, caches, tmp_path, tried, seconds):
    start = random.SystemRandom().randrange(2**32)
    seeds = range(start, start + 10**7)
    count, _, found = fuzz(jail, caches, tmp_path / "c", seeds, time.monotonic() + seconds)
    assert not found, found
    tried(count, "fuzzed caches")
