"""FORMAT.md is the norm: its own code decodes a shard that other libraries read, and golden bytes stand still."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cache_schema
from cache_schema.codec import MAX_GAP, Codec, decode_set, encode_ranks, encode_set, places_of, usable_positions
from cache_schema.manifest import Manifest, fingerprint_of, vocabulary_bytes
from cache_schema.record import CommitRecord, Seal
from cache_schema.schema import NUMBER_COLUMNS, TEXT_COLUMNS, QuarantinedExample
from cache_schema.table import ARROW_SCHEMA

FORMAT = Path(cache_schema.__file__).with_name("FORMAT.md").read_text(encoding="utf-8")


def with_pandas(path: Path) -> list[dict[str, Any]]:
    return pd.read_parquet(path).to_dict("records")


def with_datasets(path: Path) -> list[dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(path.parent / "hf"))
    return list(rows.with_format("numpy"))


@pytest.mark.parametrize("codec", ["fine", "small"])
@pytest.mark.parametrize("store_ids", [True, False])
@pytest.mark.parametrize("read", [with_pandas, with_datasets])
def test_formula_of_the_document_decodes_a_shard(read, store_ids, codec, make_toy, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    toy = make_toy(store_ids=store_ids, codec=codec, top_k=18, vocab_size=90)
    cache = toy.build(tmp_path / "cache")
    (formula,) = re.findall(r"```python\n(.*?)```", FORMAT, re.DOTALL)
    record = json.loads((cache / "shards" / "00001.json").read_text())
    file = cache / "shards" / record["file"]
    tag = json.loads(pq.read_metadata(file).metadata[b"logitbank"])
    rows = read(file)
    assert len(rows) == record["rows"] == 3
    for row, example in zip(rows, (3, 4, 5), strict=True):
        names = {"np": np, "row": row, "first_row": rows[0], "K": tag["top_k"], "V": tag["vocab_size"]}
        names |= {name: tag[name] for name in ("step", "codec", "store_ids")}
        names |= {"temperatures": np.array(tag["temperatures"]), "T": len(tag["temperatures"])}
        exec(formula, names)
        written, full = toy.row(example), toy.full_logits(example).astype(np.float64)
        usable = written.status == 0
        assert row["prompt"] == written.prompt and row["answer"] == written.answer
        np.testing.assert_array_equal(row["answer_offsets"].reshape(-1, 2), written.answer_offsets)
        ids = names["ids"] if store_ids else np.argsort(-full, axis=1, kind="stable")[:, : toy.top_k]
        near = written.top_logit[:, None] - written.logits <= 4
        bound = np.where(near | (codec == "fine"), toy.step / 2, 4 * toy.step)[usable]
        assert (np.abs(names["logits"] - written.logits)[usable] <= bound).all()
        for i, temperature in enumerate(toy.temperatures):  # against a softmax over the whole vocabulary
            p = np.exp(full / temperature)
            p /= p.sum(axis=1, keepdims=True)
            off = np.abs(names["log_p"][:, i] - np.log(np.take_along_axis(p, ids, axis=1)))[usable]
            assert (off <= bound / temperature + 1e-6).all()
            rest = np.sort(p, axis=1)[:, : -toy.top_k].sum(axis=1)
            np.testing.assert_allclose(np.exp(names["log_p_tail"])[usable, i], rest[usable], rtol=1e-4)


def test_columns_of_the_document_are_the_columns_of_a_shard(cache):
    path = next((cache / "shards").glob("*.parquet"))
    assert pq.read_schema(path).names == [*TEXT_COLUMNS, *NUMBER_COLUMNS] == ARROW_SCHEMA.names
    table = FORMAT.split("| column |")[1].split("\n\n")[0]
    documented = re.findall(r"^\| ([a-z_, ]+) \|", table, re.MULTILINE)
    assert ", ".join(documented).split(", ") == ARROW_SCHEMA.names


def test_encodings_and_checksums_are_what_the_document_says(cache):
    metadata = pq.read_metadata(next((cache / "shards").glob("*.parquet")))
    columns = {c.path_in_schema: c for c in map(metadata.row_group(0).column, range(metadata.num_columns))}
    assert {c.compression for c in columns.values()} == {"ZSTD"}
    assert "DELTA_BINARY_PACKED" in columns["answer_offsets.list.element"].encodings
    assert "BYTE_STREAM_SPLIT" in columns["slots.list.element"].encodings
    dictionaries = [name for name, c in columns.items() if c.has_dictionary_page]
    assert dictionaries == ["task", "height_low.list.element"]
    assert not any(c.is_stats_set for c in columns.values())


def test_a_stray_shard_says_what_it_is(toy, cache):
    (path,) = (cache / "shards").glob("00002-*.parquet")
    tag = json.loads(pq.read_metadata(path).metadata[b"logitbank"])
    assert tag == {
        "schema_version": 2,
        "fingerprint": toy.manifest.fingerprint,
        "shard": 2,
        "top_k": 8,
        "vocab_size": 40,
        "codec": "fine",
        "store_ids": True,
        "step": 0.015625,
        "temperatures": [1.0, 2.5],
    }


def test_golden_levels():
    """Literal numbers, by hand: halves round to even, rank 0 is exact, 2**24 - 1 is the last gap."""
    top = np.array([10.0, -1.5], np.float32)
    logits = np.array([[10.0, 9.984375, 9.0, -6.0], [-1.5, -1.5078125, -1.5234375, -1.5390625]], np.float32)
    fine = Codec("fine", 1 / 64)
    levels = fine.encode(top, logits)
    assert levels.tolist() == [[0, 1, 64, 1024], [0, 0, 2, 2]]
    assert fine.decode(top, levels).tolist() == [[10.0, 9.984375, 9.0, -6.0], [-1.5, -1.5, -1.53125, -1.53125]]
    lse = np.zeros((1, 1), np.float32)
    for gap, storable in ((MAX_GAP, True), (MAX_GAP + 1, False)):
        low = np.array([[0.0, -gap / 64]], np.float32)
        assert usable_positions(np.zeros(1, np.float32), low, lse, None, 1 / 64).tolist() == [storable]


def test_golden_levels_of_small():
    """256 levels down to four logits below the top; then 8 steps each, and the last stands for 2**24 steps."""
    top = np.zeros(1, np.float32)
    gaps = np.array([[0, 1, 255, 256, 259, 261, 264, MAX_GAP]])
    small = Codec("small", 1 / 64)
    levels = small.encode(top, (-gaps / 64).astype(np.float32))
    assert levels.tolist() == [[0, 1, 255, 256, 256, 257, 257, 256 + (2**24 - 256) // 8]]
    assert levels.max() == small.max_level
    assert (-64 * small.decode(top, levels)).tolist() == [[0, 1, 255, 256, 256, 264, 264, 2**24]]


def test_golden_slots():
    """The ids 7, 2, 39 and 5 at levels 0, 1, 70 and 1000, in the order 2, 5, 0, 1, 3, 4, 6, 7 and on."""
    order = np.array([2, 5, 0, 1, 3, 4, *range(6, 40)], np.int32)
    ids, levels = np.array([[7, 2, 39, 5]], np.int32), np.array([[0, 1, 70, 1000]], np.int32)
    slots = encode_set(levels, ids, None, places_of(order), low_bits=6)
    # places 0, 1, 7, 39 by steps of 0, 1, 6, 32; heights 999, 0, 1000, 930, over 64: 15, 0, 15, 14
    assert slots.packed_NK.tolist() == [[0xF0, 0x01, 0xF6, 0xEF]]
    assert slots.id_excess.tolist() == [17] and slots.height_excess.tolist() == [0, 0]
    assert slots.height_low_NK.tolist() == [[999 % 64, 0, 1000 % 64, 930 % 64]]
    steps, heights = np.array([[0, 1, 6, 32]], np.int32), np.array([[999, 0, 1000, 930]], np.int32)
    decoded = decode_set(steps, heights, None, order)
    assert decoded[0].tolist() == levels.tolist() and decoded[1].tolist() == ids.tolist()


def test_golden_rank_steps():
    """Differences 0, 1, 2, 3, 0, 300, of ranks 0 to 5: bytes of the ranks 0, 2, 4 and 1, 3, 5, H = 2."""
    packed, excess = encode_ranks(np.array([[0, 1, 3, 6, 6, 306]], np.int32))
    assert packed.tolist() == [[0 | 2 << 2 | 0 << 4, 1 | 3 << 2 | 3 << 4]]
    assert excess.tolist() == [0, 297]


def test_float32_and_float64_decode_alike():
    rng = np.random.default_rng(0)
    top = rng.normal(0, 20, 1000).astype(np.float32)
    gaps = rng.integers(0, MAX_GAP + 1, (1000, 16)).astype(np.int32)
    for step in (2.0**-10, 2.0**-6, 1.0):
        wide = (top.astype(np.float64)[:, None] - step * gaps).astype(np.float32)
        np.testing.assert_array_equal(Codec("fine", step).decode(top, gaps), wide)


IDENTITY = {"teacher": {"model": "m", "é": None}, "list": [1, 1.0, True, "x\n"], "a": 0.015625}
MANIFEST = """\
{
 "checksum": "CHECKSUM",
 "codec": "fine",
 "examples": 10,
 "fingerprint": "FINGERPRINT",
 "format": "logitbank.manifest",
 "identity": {
  "a": 0.015625,
  "list": [
   1,
   1.0,
   true,
   "x\\n"
  ],
  "teacher": {
   "model": "m",
   "é": null
  }
 },
 "provenance": {
  "recipe": "toy"
 },
 "schema_version": 2,
 "selector": "topk",
 "shard_examples": 4,
 "step": 0.015625,
 "store_ids": true,
 "temperatures": [
  1.0,
  1.2
 ],
 "top_k": 2,
 "vocab_size": 3,
 "vocabulary_sha256": "VOCABULARY"
}
"""


def golden_manifest() -> Manifest:
    vocabulary = hashlib.sha256(vocabulary_bytes(["a", None, "é\ud7ff"])).hexdigest()
    return Manifest.create(
        identity=IDENTITY,
        provenance={"recipe": "toy"},
        top_k=2,
        vocab_size=3,
        temperatures=[1.0, 1.2],
        step=1 / 64,
        store_ids=True,
        examples=10,
        shard_examples=4,
        vocabulary_sha256=vocabulary,
    )


def test_golden_canonical_json():
    canonical = '{"a":0.015625,"list":[1,1.0,true,"x\\n"],"teacher":{"model":"m","é":null}}'.encode()
    assert fingerprint_of(IDENTITY) == hashlib.sha256(canonical).hexdigest()
    assert vocabulary_bytes(["a", None, "é"]) == '["a",null,"é"]\n'.encode()


def test_golden_manifest_bytes():
    manifest = golden_manifest()
    expected = MANIFEST.replace("FINGERPRINT", manifest.fingerprint).replace("VOCABULARY", manifest.vocabulary_sha256)
    body = json.loads(expected)
    del body["checksum"]
    checksum = hashlib.sha256(
        json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()
    assert manifest.dump().decode() == expected.replace("CHECKSUM", checksum)
    assert manifest.shards == 3 and manifest.examples_of(2) == range(8, 10)


def test_golden_hashes():
    """Any change of these is a change of the format: raise SCHEMA_VERSION."""
    manifest = golden_manifest()
    record = CommitRecord(
        shard=2,
        rows=1,
        positions=5,
        bytes=1234,
        sha256="ab" * 32,
        footer_sha256="cd" * 32,
        codec_error_max=0.0078125,
        quarantined=(QuarantinedExample("q", "toy", "too_long", 9),),
        quarantined_positions={"cut": 2},
        provenance={"device": "cpu"},
    )
    assert manifest.fingerprint == "7f785c9bca22c038e1e00265f3fd647ebe0dda2487843785909d331901dadd32"
    assert record.file == "00002-abababababababab.parquet"
    assert (
        json.loads(record.dump(manifest.fingerprint))["checksum"]
        == "01febe1ea0b636aff0ade42629891546c24b791ab0f8291e6c76592fbea6f928"
    )
    assert (
        json.loads(Seal((record,)).dump(manifest))["checksum"]
        == "a9675aeccb0c66853b6991ab08f38e76a782b4d6432e69504e98854f0f71ea63"
    )


def test_golden_arrow_schema():
    """The physical columns, spelled out."""
    described = [f"{f.name} {str(f.type).replace(' not null', '')}{'?' if f.nullable else ''}" for f in ARROW_SCHEMA]
    assert described == [
        "example_id string",
        "task string",
        "prompt string",
        "answer string",
        "answer_ids list<element: int32>",
        "answer_start int32",
        "answer_offsets list<element: int32>",
        "status list<element: uint8>",
        "top_logit list<element: float>",
        "id_order list<element: int32>?",
        "slots list<element: uint8>?",
        "id_excess list<element: int32>?",
        "height_low list<element: uint8>?",
        "height_excess list<element: int32>?",
        "draws list<element: int32>?",
        "rank_steps list<element: uint8>?",
        "rank_excess list<element: int32>?",
        "logsumexp list<element: float>",
        "log_tail list<element: float>?",
    ]
    assert all(not f.type.value_field.nullable for f in ARROW_SCHEMA if pa.types.is_list(f.type))
