"""Identity, plan and the JSON documents: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import jsondoc
from cache_schema.errors import (
    DamagedDocument,
    Difference,
    FingerprintMismatch,
    InvalidManifest,
    PlanMismatch,
)
from cache_schema.manifest import Manifest, differences, fingerprint_of
from cache_schema.reader import CacheReader
from cache_schema.store import open_store
from cache_schema.writer import CacheWriter

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_fingerprint_survives_json_and_key_order(identity):
    again = json.loads(json.dumps(identity))
    reordered = dict(reversed(list(again.items())))
    assert fingerprint_of(identity) == fingerprint_of(again) == fingerprint_of(reordered)


@given(st.dictionaries(st.text(), JSON, max_size=4), st.dictionaries(st.text(), JSON, max_size=4))
def test_fingerprints_differ_where_fields_do(a, b):
    assert (fingerprint_of(a) == fingerprint_of(b)) == (jsondoc.canonical(a) == jsondoc.canonical(b))
    if fingerprint_of(a) != fingerprint_of(b):
        assert differences(a, b)


class Colour(IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (math.nan, "nan has no stable identity"),
        (-math.inf, "-inf has no stable identity"),
        ((1, 2), "tuple"),
        ({1}, "set"),
        (b"x", "bytes"),
        (Path("x"), "PosixPath"),
        (np.float64(1), "float64"),
        (np.int32(1), "int32"),
        (Colour.RED, "Colour"),
        ({1: 2}, "key 1 is a int"),
        ("\ud800", "lone surrogate"),
        (object(), "object"),
    ],
)
def test_no_stable_identity(value, what):
    with pytest.raises(ValueError, match=r"teacher\.list\[1\].*" + what):
        fingerprint_of({"teacher": {"list": [0, value]}})


def test_fingerprint_tells_types_apart():
    values = [1, 1.0, True, "1", None, [1], {"1": 1}]
    assert len({fingerprint_of({"x": value}) for value in values}) == len(values)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("top_k", 41, "1 to the vocabulary's 40"),
        ("top_k", 0, "1 to the vocabulary's 40"),
        ("top_k", True, "1 to"),
        ("vocab_size", 0, "1 to 4194304"),
        ("vocab_size", 2**22 + 1, "1 to 4194304"),
        ("step", 0.01, "a power of two"),
        ("step", -0.5, "a power of two"),
        ("step", 1, "a power of two"),
        ("step", 2.0**-25, "a power of two"),
        ("temperatures", (), "1 to 64 distinct"),
        ("temperatures", (1.0, 1.0), "distinct"),
        ("temperatures", (0.0,), "floats of 1e-6"),
        ("temperatures", tuple(map(float, range(1, 66))), "1 to 64"),
        ("temperatures", (math.inf,), "floats of 1e-6"),
        ("codec", "coarse", "one of fine"),
        ("selector", "largest", "one of topk, sampled"),
        ("examples", 0, "1 to 786432"),
        ("examples", 786433, "more need a larger shard_examples"),
        ("shard_examples", -3, "1 to 1048576"),
        ("shard_examples", 2**20 + 1, "1 to 1048576"),
        ("store_ids", 1, "true or false"),
        ("vocabulary_sha256", "abc", "64 hexadecimal digits"),
        ("fingerprint", "0" * 64, "the hash of the identity"),
        ("schema_version", 1, "2"),
    ],
)
def test_manifest_fields_are_checked(toy, field, value, expected):
    with pytest.raises(InvalidManifest, match=f"{field} is .*expected .*{expected}"):
        replace(toy.manifest, **{field: value})


def test_draws_need_ids_and_leave_no_tail(make_toy):
    manifest = make_toy(selector="sampled").manifest
    assert manifest.sampled and not manifest.stores_tail
    with pytest.raises(InvalidManifest, match="draws mean nothing without ids"):
        replace(manifest, store_ids=False)


@pytest.mark.parametrize(("examples", "shard_examples", "lengths"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (1, 9, [1])])
def test_plan_covers_every_example_once(make_toy, examples, shard_examples, lengths):
    manifest = make_toy(examples=examples, shard_examples=shard_examples).manifest
    planned = [manifest.examples_of(shard) for shard in range(manifest.shards)]
    assert [len(p) for p in planned] == lengths
    assert [i for p in planned for i in p] == list(range(examples))


def test_manifest_round_trips(toy, cache):
    assert Manifest.load(open_store(cache)) == toy.manifest


def test_differences_are_dotted():
    a = {"teacher": {"model": "x", "shots": 8}, "same": 1, "kind": {"deep": {"er": [1]}}}
    b = {"teacher": {"model": "y", "shots": 8, "new": None}, "same": 1, "kind": "flat"}
    assert differences(a, b) == [
        Difference("kind", '{"deep": {"er": [1]}}', '"flat"'),
        Difference("teacher.model", '"x"', '"y"'),
        Difference("teacher.new", "(absent)", "null"),
    ]


def test_other_identity_is_refused(toy, make_toy, cache):
    other = make_toy(seed=1, top_k=4)
    with pytest.raises(FingerprintMismatch) as caught:
        CacheReader.open(cache, expect=other.identity)
    assert caught.value.differences == (Difference("cache.top_k", "8", "4"), Difference("teacher.seed", "0", "1"))
    message = str(caught.value)
    for part in (str(cache), "cache.top_k", "cache: 8", "asked for: 4", "Two ways out", "--set cache.dir="):
        assert part in message
    with pytest.raises(FingerprintMismatch, match=r"teacher\.seed"):
        other.writer(cache)
    CacheReader.open(cache, expect=toy.identity)


def test_long_values_are_shortened(toy, tmp_path):
    template = "{% for message in messages %}" * 50
    with pytest.raises(FingerprintMismatch) as caught:
        CacheReader.open(toy.build(tmp_path / "c"), expect={"teacher": {"chat_template": template}})
    assert max(map(len, str(caught.value).splitlines())) < 400


def test_other_plan_of_the_same_identity_is_refused(make_toy, cache):
    with pytest.raises(PlanMismatch, match=r"shard_examples +cache: 3 +asked for: 4"):
        make_toy(shard_examples=4).writer(cache)


def test_other_provenance_is_welcome(make_toy, toy, cache):
    writer = make_toy(provenance={"device": "cuda"}).writer(cache)
    assert writer.manifest.provenance == toy.provenance
    assert writer.missing() == []


def test_vocabulary_must_be_the_manifests(toy, tmp_path):
    with pytest.raises(InvalidManifest, match="39 entries; expected 40"):
        CacheWriter.open(tmp_path / "c", toy.manifest, toy.vocabulary[1:])
    with pytest.raises(InvalidManifest, match="vocabulary_sha256"):
        CacheWriter.open(tmp_path / "c", toy.manifest, [*toy.vocabulary[1:], "other"])
    assert not (tmp_path / "c").exists()


def test_vocabulary_is_written_and_healed(toy, cache):
    reader = CacheReader.open(cache)
    assert reader.vocabulary() == toy.vocabulary
    (cache / "vocabulary.json").unlink()
    with pytest.raises(DamagedDocument, match="it is gone"):
        reader.vocabulary()
    toy.writer(cache)  # whoever created the manifest may have died before the vocabulary
    assert reader.vocabulary() == toy.vocabulary


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"unknown": 1}, "unknown field 'unknown'"),
        ({"step": 1}, "step is 1, expected a float"),
        ({"store_ids": 1}, "store_ids is 1, expected a bool"),
        ({"top_k": True}, "top_k is True, expected a int"),
        ({"identity": []}, "identity is \\[\\], expected a dict"),
        ({"codec": None}, "codec is None, expected a str"),
        ({"examples": ...}, "the field 'examples' is missing"),
    ],
)
def test_manifest_fields_are_strict_on_disk(toy, cache, change, what):
    """Even with a right checksum: made by a program that read the format carelessly."""
    body = json.loads((cache / "manifest.json").read_text())
    fields = {**body, **change}
    for name in ("format", "schema_version", "checksum"):
        del fields[name]
    (cache / "manifest.json").write_bytes(jsondoc.dump("manifest", {k: v for k, v in fields.items() if v is not ...}))
    with pytest.raises(DamagedDocument, match=what):
        Manifest.load(open_store(cache))
