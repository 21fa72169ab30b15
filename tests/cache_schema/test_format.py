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
from cache_schema.codec import ARROW_SCHEMA, MAX_GAP, decode_gaps, encode_gaps, usable_positions
from cache_schema.manifest import Manifest, fingerprint_of, vocabulary_bytes
from cache_schema.record import CommitRecord, Seal
from cache_schema.schema import NUMBER_COLUMNS, TEXT_COLUMNS, QuarantinedExample

FORMAT = Path(cache_schema.__file__).with_name("FORMAT.md").read_text(encoding="utf-8")


def with_pandas(path: Path) -> list[dict[str, Any]]:
    return pd.read_parquet(path).to_dict("records")


def with_datasets(path: Path) -> list[dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(path.parent / "hf"))
    return list(rows.with_format("numpy"))


@pytest.mark.parametrize("read", [with_pandas, with_datasets])
def test_formula_of_the_document_decodes_a_shard(read, toy, cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (formula,) = re.findall(r"```python\n(.*?)```", FORMAT, re.DOTALL)
    manifest = json.loads((cache / "manifest.json").read_text())
    record = json.loads((cache / "shards" / "00001.json").read_text())
    rows = read(cache / "shards" / record["file"])
    assert len(rows) == record["rows"] == 3
    for row, example in zip(rows, (3, 4, 5), strict=True):
        names = {
            "np": np,
            "row": row,
            "K": manifest["top_k"],
            "step": manifest["step"],
            "temperatures": np.array(manifest["temperatures"]),
            "T": len(manifest["temperatures"]),
        }
        exec(formula, names)
        written, full = toy.row(example), toy.full_logits(example).astype(np.float64)
        usable = written.status == 0
        assert row["prompt"] == written.prompt and row["answer"] == written.answer
        np.testing.assert_array_equal(row["answer_offsets"].reshape(-1, 2), written.answer_offsets)
        ids = row["token_ids"].reshape(-1, toy.top_k)
        np.testing.assert_allclose(names["logits"][usable], written.logits[usable], rtol=0, atol=toy.step / 2)
        for i, temperature in enumerate(toy.temperatures):  # against a softmax over the whole vocabulary
            p = np.exp(full / temperature)
            p /= p.sum(axis=1, keepdims=True)
            top = np.take_along_axis(p, ids, axis=1)[usable]
            np.testing.assert_allclose(np.exp(names["log_p"])[usable, i], top, rtol=toy.step / temperature)
            rest = 1 - np.take_along_axis(p, written.token_ids, axis=1).sum(axis=1)
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
    assert "DELTA_BINARY_PACKED" in columns["gaps.list.element"].encodings
    assert "BYTE_STREAM_SPLIT" in columns["token_ids.list.element"].encodings
    dictionaries = [name for name, c in columns.items() if c.has_dictionary_page]
    assert dictionaries == ["task"]
    assert not any(c.is_stats_set for c in columns.values())


def test_a_stray_shard_says_what_it_is(toy, cache):
    (path,) = (cache / "shards").glob("00002-*.parquet")
    tag = json.loads(pq.read_metadata(path).metadata[b"logitbank"])
    assert tag == {
        "schema_version": 2,
        "fingerprint": toy.manifest.fingerprint,
        "shard": 2,
        "top_k": 8,
        "step": 0.015625,
        "temperatures": [1.0, 2.5],
    }


def test_golden_gaps():
    """Literal numbers, by hand: halves round to even, rank 0 is exact, 2**24 - 1 is the last gap."""
    top = np.array([10.0, -1.5], np.float32)
    logits = np.array([[10.0, 9.984375, 9.0, -6.0], [-1.5, -1.5078125, -1.5234375, -1.5390625]], np.float32)
    gaps = encode_gaps(top, logits, 1 / 64)
    assert gaps.tolist() == [[0, 1, 64, 1024], [0, 0, 2, 2]]
    assert decode_gaps(top, gaps, 1 / 64).tolist() == [
        [10.0, 9.984375, 9.0, -6.0],
        [-1.5, -1.5, -1.53125, -1.53125],
    ]
    lse = np.zeros((1, 1), np.float32)
    for gap, storable in ((MAX_GAP, True), (MAX_GAP + 1, False)):
        low = np.array([[0.0, -gap / 64]], np.float32)
        assert usable_positions(np.zeros(1, np.float32), low, lse, None, 1 / 64).tolist() == [storable]


def test_float32_and_float64_decode_alike():
    rng = np.random.default_rng(0)
    top = rng.normal(0, 20, 1000).astype(np.float32)
    gaps = rng.integers(0, MAX_GAP + 1, (1000, 16)).astype(np.int32)
    for step in (2.0**-10, 2.0**-6, 1.0):
        wide = (top.astype(np.float64)[:, None] - step * gaps).astype(np.float32)
        np.testing.assert_array_equal(decode_gaps(top, gaps, step), wide)


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
        "gaps list<element: int32>",
        "token_ids list<element: int32>?",
        "draws list<element: int32>?",
        "logsumexp list<element: float>",
        "log_tail list<element: float>?",
    ]
    assert all(not f.type.value_field.nullable for f in ARROW_SCHEMA if pa.types.is_list(f.type))
