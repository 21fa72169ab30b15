"""Damage and malice: every flipped byte, cut or wrong document is an error or changes nothing. Never silent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_schema import jsondoc
from cache_schema.__main__ import main
from cache_schema.errors import (
    CacheError,
    CorruptShard,
    DamagedDocument,
    IncompleteCache,
    InvalidManifest,
    NotACache,
    UnknownVersion,
)
from cache_schema.manifest import Manifest
from cache_schema.reader import CacheReader
from cache_schema.store import open_store
from cache_schema.verify import verify

ARRAYS = ("answer_ids", "answer_offsets", "status", "top_logit", "logits", "token_ids", "logsumexp", "log_tail")
TEXTS = ("example_id", "task", "prompt", "answer", "answer_start")


def everything(cache: Path) -> list[object]:
    """All that a reader can get out of a cache, in comparable form."""
    reader = CacheReader.open(cache)
    rows = [[getattr(r, n) for n in TEXTS] + [getattr(r, n).tobytes() for n in ARRAYS] for r in reader.rows()]
    return [reader.manifest, reader.records, reader.vocabulary(), rows]


def is_white_space_only(before: bytes, after: bytes) -> bool:
    """Whether a change of a JSON document changes no value."""
    try:
        return json.loads(after) == json.loads(before)
    except ValueError:
        return False


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    cache = toy.build(tmp_path_factory.mktemp("whole") / "cache")
    return cache, everything(cache), sorted(p for p in cache.rglob("*") if p.is_file())


def assert_never_silent(whole, path: Path, damaged: bytes) -> None:
    """The reader raises or returns the same; verify names the file, unless nothing but white space changed."""
    cache, expected, _ = whole
    before = path.read_bytes()
    harmless = path.suffix == ".json" and path.name != "vocabulary.json" and is_white_space_only(before, damaged)
    try:
        path.write_bytes(damaged)
        try:
            assert everything(cache) == expected
        except CacheError as error:
            assert path.name in str(error)
        try:
            report = verify(cache)
        except CacheError as error:  # no manifest, no cache
            assert path.name == "manifest.json" and path.name in str(error)
        else:
            assert report.good == harmless
            assert harmless or any(path.name in problem.file for problem in report.problems)
    finally:
        path.write_bytes(before)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_byte(whole, data):
    path = data.draw(st.sampled_from(whole[2]))
    damaged = bytearray(path.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    assert_never_silent(whole, path, bytes(damaged))


def test_flipped_bytes_of_a_whole_footer(whole):
    """Page checksums do not cover the footer; its SHA-256 in the record does: the reader alone notices every flip."""
    cache, _, files = whole
    path = next(p for p in files if p.suffix == ".parquet")
    data = path.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    try:
        for place in range(len(data) - footer, len(data)):
            path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
            with pytest.raises(CorruptShard):
                CacheReader.open(cache).read([0])
    finally:
        path.write_bytes(data)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_or_extended_file(whole, data):
    path = data.draw(st.sampled_from(whole[2]))
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 2))  # the last byte of a document is a line end
    damaged = data.draw(st.sampled_from([content[:cut], content + content[:cut] + b"x"]))
    assert_never_silent(whole, path, damaged)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_of_another_file(whole, data):
    """A block written in the wrong place, or a file restored under another's name."""
    path, other = data.draw(st.permutations(whole[2]))[:2]
    content, source = path.read_bytes(), other.read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(1, 600))
    damaged = data.draw(st.sampled_from([source, content[:start] + source[:length] + content[start + length :]]))
    if damaged != content:
        assert_never_silent(whole, path, damaged)


# --- documents -------------------------------------------------------------------------------------------------------


def rewrite(path: Path, **changes: object) -> None:
    """Change a document and give it a right checksum: what a hostile author would do."""
    body = json.loads(path.read_text())
    kind = body.pop("format").removeprefix("logitbank.")
    del body["checksum"], body["schema_version"]
    path.write_bytes(jsondoc.dump(kind, {**body, **changes}))


def rewrite_seal(cache: Path, **changes: object) -> None:
    records = json.loads((cache / "sealed.json").read_text())["records"]
    records[1] |= changes
    rewrite(cache / "sealed.json", records=records)


@pytest.mark.parametrize(
    "file",
    ["../../secret.parquet", "/etc/passwd", "..", "", "00001.json", "00000-0123456789abcdef.parquet", "sub/x.parquet"],
)
def test_record_that_names_another_path(cache, file):
    """A file name is derived from shard and hash; whatever else a record says is refused before anything is opened."""
    (cache.parent.parent / "secret.parquet").write_bytes(b"x")
    rewrite_seal(cache, file=file)
    with pytest.raises(DamagedDocument, match=r"records\[1\]: file is .*expected '00001-"):
        CacheReader.open(cache)
    (cache / "sealed.json").unlink()
    rewrite(cache / "shards" / "00001.json", file=file)
    with pytest.raises(DamagedDocument, match="file is"):
        CacheReader.open(cache, require_sealed=False)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rows": 2}, "2 rows and 0 quarantined, expected 3 examples"),
        ({"rows": -1}, "rows is -1"),
        ({"rows": 3.0}, "rows is 3.0, expected a int"),
        ({"shard": 0}, "shard is 0, expected 1"),
        ({"sha256": "ab" * 31 + "zz"}, "sha256 is"),
        ({"quarantined": [3]}, r"quarantined\[0\]: found 3"),
        ({"quarantined_positions": {"usable": 1}}, "unknown field 'usable'"),
        ({"quarantined_positions": {"cut": 10**6}}, "more positions quarantined than there are"),
        ({"extra": 0}, "unknown field 'extra'"),
    ],
)
def test_record_with_wrong_fields(cache, changes, what):
    rewrite_seal(cache, **changes)
    with pytest.raises(DamagedDocument, match=what) as caught:
        CacheReader.open(cache)
    assert "sealed.json" in str(caught.value)


def test_seal_of_another_cache(make_toy, cache, tmp_path):
    other = make_toy(seed=9).build(tmp_path / "other")
    shutil.copy(other / "sealed.json", cache / "sealed.json")
    with pytest.raises(DamagedDocument, match="fingerprint is"):
        CacheReader.open(cache)


def test_shard_of_another_cache(make_toy, cache, tmp_path):
    """With a record made to fit: the footer says where the file belongs."""
    other = make_toy(seed=9).build(tmp_path / "other")
    records = json.loads((other / "sealed.json").read_text())["records"]
    shutil.copy(other / "shards" / records[1]["file"], cache / "shards")
    rewrite_seal(cache, **records[1])
    with pytest.raises(CorruptShard, match="it belongs elsewhere"):
        CacheReader.open(cache).read([4])


def test_lists_longer_than_the_positions_allow(cache):
    """Said by the footer, before anything is allocated for them."""
    rewrite_seal(cache, positions=1, quarantined_positions={})
    with pytest.raises(CorruptShard, match=r"answer_ids.* has 12 numbers, expected up to 4"):
        CacheReader.open(cache).read([3])


def test_seal_with_too_few_records(cache):
    rewrite(cache / "sealed.json", records=json.loads((cache / "sealed.json").read_text())["records"][:2])
    with pytest.raises(DamagedDocument, match="2 records, expected 3"):
        CacheReader.open(cache)


GARBAGE = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": "logitbank.manifest"}', b'{"a": NaN}']


@pytest.mark.parametrize("content", GARBAGE)
@pytest.mark.parametrize("name", ["manifest.json", "sealed.json", "shards/00001.json"])
def test_garbage_documents(cache, name, content):
    (cache / name).write_bytes(content)
    if name.startswith("shards"):
        (cache / "sealed.json").unlink()
    with pytest.raises(DamagedDocument, match=name):
        CacheReader.open(cache, require_sealed=False)
    assert main(["verify", str(cache)]) in (1, 2)


def test_checksum_right_but_nan_inside(cache):
    text = (cache / "manifest.json").read_text().replace("0.015625", "NaN")
    (cache / "manifest.json").write_text(text)
    with pytest.raises(DamagedDocument, match="nan has no stable identity"):
        CacheReader.open(cache)


def test_identity_edited(cache):
    identity = json.loads((cache / "manifest.json").read_text())["identity"]
    rewrite(cache / "manifest.json", identity={**identity, "teacher": "another"})
    with pytest.raises(InvalidManifest, match=r"fingerprint is .*expected the hash of the identity"):
        CacheReader.open(cache)


def test_other_schema_version(cache):
    body = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**body, "schema_version": 3}))
    with pytest.raises(UnknownVersion, match="schema version 3; this reader knows version 2"):
        CacheReader.open(cache)


# --- things in the wrong place ---------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path):
    with pytest.raises(NotACache, match=r"no such folder\n.*stage1_teacher"):
        CacheReader.open(tmp_path / "nothing")


def test_empty_folder(tmp_path):
    with pytest.raises(NotACache, match=r"no manifest\.json"):
        CacheReader.open(tmp_path)


def test_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "c").write_text("x")
    with pytest.raises(NotACache, match="it is a file; expected a folder"):
        CacheReader.open(tmp_path / "c")


@pytest.mark.parametrize("name", ["manifest.json", "sealed.json", "vocabulary.json"])
@pytest.mark.parametrize("thing", ["folder", "pipe", "loop"])
def test_something_else_in_place_of_a_document(cache, name, thing):
    path = cache / name
    path.unlink()
    if thing == "folder":
        path.mkdir()
    elif thing == "pipe":
        os.mkfifo(path)  # opening it for reading would wait for ever
    else:
        path.symlink_to(path)
    with pytest.raises(DamagedDocument, match=name):
        CacheReader.open(cache).vocabulary()


@pytest.mark.parametrize("thing", ["nothing", "folder", "pipe", "loop"])
def test_something_else_in_place_of_a_shard(cache, thing):
    path = next((cache / "shards").glob("00001-*"))
    path.unlink()
    if thing == "folder":
        path.mkdir()
    elif thing == "pipe":
        os.mkfifo(path)
    elif thing == "loop":
        path.symlink_to(path)
    reader = CacheReader.open(cache)
    reader.read([0, 6])
    with pytest.raises(CorruptShard, match="no such file" if thing == "nothing" else path.name) as caught:
        reader.read([3])
    assert caught.value.shard == 1 and str(path) in str(caught.value)
    assert [p.shard for p in verify(cache).problems] == [1]


def test_shards_folder_replaced_by_a_file(cache):
    shutil.rmtree(cache / "shards")
    (cache / "shards").write_text("x")
    with pytest.raises(CorruptShard):
        CacheReader.open(cache).read([0])
    assert {p.shard for p in verify(cache).problems} == {0, 1, 2}


def test_unsealed(toy, cache):
    (cache / "sealed.json").unlink()
    (cache / "shards" / "00001.json").unlink()
    with pytest.raises(IncompleteCache, match=r"1 of 3 shards are missing \(1\)") as caught:
        CacheReader.open(cache)
    assert "python -m stage1_teacher --recipe toy" in str(caught.value)
    part = CacheReader.open(cache, require_sealed=False)
    assert not part.sealed and [r.example_id for r in part.rows()] == ["toy-0", "toy-1", "toy-2", "toy-6"]
    assert part.totals().examples.input == 4 and part.totals().examples.reconciles


def test_all_shards_but_no_seal(cache):
    (cache / "sealed.json").unlink()
    with pytest.raises(IncompleteCache, match="the seal was never written"):
        CacheReader.open(cache)


def test_names_that_only_look_like_shards(toy, cache):
    for name in ("000001.json", "1.json", "00009.json.bak", "٠٠٠٠٩.json", "00001-xyz.parquet", "notes.txt"):
        (cache / "shards" / name).write_text("x")
    (cache / "sealed.json").unlink()
    assert len(CacheReader.open(cache, require_sealed=False)) == 7
    toy.writer(cache).seal()
    assert verify(cache).good and (cache / "shards" / "notes.txt").exists()  # what is not ours is not swept


def test_record_of_a_shard_beyond_the_plan(cache):
    (cache / "shards" / "00003.json").write_bytes((cache / "shards" / "00002.json").read_bytes())
    report = verify(cache)
    assert [(p.shard, p.what) for p in report.problems] == [(3, "the plan has 3 shards, there is no shard 3")]


def test_control_characters_do_not_reach_the_terminal(make_toy, tmp_path, capsys):
    from dataclasses import replace

    toy = make_toy(examples=1, shard_examples=1)
    writer = toy.writer(tmp_path / "c")
    writer.commit(0, [replace(toy.row(0), prompt="\x1b[2Jgone\x07\r", task="\x1b]0;x")], [], {})
    writer.seal()
    assert main(["show", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\\x1b[2Jgone" in out


def test_manifest_numbers_are_not_believed_by_type(cache):
    """JSON true is no number and 1 is no float, checksum or not."""
    rewrite(cache / "manifest.json", examples=True)
    with pytest.raises(DamagedDocument, match="examples is True"):
        Manifest.load(open_store(cache))
    rewrite(cache / "manifest.json", examples=7, temperatures=[1, "x"])
    with pytest.raises(InvalidManifest, match="temperatures is"):
        Manifest.load(open_store(cache))


def test_rows_survive_numpy_comparison(whole):
    """The comparison that the tests above rest on sees a changed number."""
    cache, expected, _ = whole
    again = everything(cache)
    assert again == expected
    first = np.frombuffer(again[3][0][len(TEXTS) + 4], np.float32).copy()
    first[0] += 1
    again[3][0][len(TEXTS) + 4] = first.tobytes()
    assert again != expected
