"""What is written is what is read: numbers within half a step, everything else exactly."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema.errors import CorruptShard
from cache_schema.reader import CacheReader
from cache_schema.schema import ALIGNMENT, ALL, RANKED, TEXT, AlignmentRow, CacheRow, TextRow


def assert_same(read: CacheRow, written: CacheRow, step: float, codec: str = "fine") -> None:
    """Equal but for the codec: within its bound at every id, ids whose logits it made equal by lower id."""
    usable = written.status == 0
    for name in ("example_id", "task", "prompt", "answer", "answer_start"):
        assert getattr(read, name) == getattr(written, name)
    for name in ("answer_ids", "answer_offsets", "status"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    for name in ("top_logit", "logsumexp", "log_tail"):
        mine, theirs = getattr(read, name), getattr(written, name)
        if theirs is None:
            assert mine is None
            continue
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine[usable], theirs[usable])
        assert not mine[~usable].any()
    assert read.logits.dtype == np.float32
    assert not read.logits[~usable].any()
    np.testing.assert_array_equal(read.logits[usable][:, :1], written.logits[usable][:, :1])  # rank 0 is exact
    mine, theirs = read.logits[usable], written.logits[usable]
    assert (np.diff(mine) <= 0).all()
    for one in ("token_ids", "draws"):
        assert (getattr(read, one) is None) == (getattr(written, one) is None)
    if written.token_ids is not None:
        assert read.token_ids.dtype == np.int32 and not read.token_ids[~usable].any()
        keys = [np.stack([r.token_ids[usable], np.zeros_like(r.token_ids[usable])]) for r in (read, written)]
        if written.draws is not None:
            assert read.draws.dtype == np.int32 and not read.draws[~usable].any()
            keys = [np.stack([r.token_ids[usable], r.draws[usable]]) for r in (read, written)]
        (ids_r, draws_r), (ids_w, draws_w) = keys
        tied = (np.diff(mine) == 0) & ((draws_r[:, 1:] > 0) | (written.draws is None))
        assert (np.diff(ids_r)[tied] > 0).all()
        by_id = [np.lexsort((draws, ids)) for ids, draws in ((ids_r, draws_r), (ids_w, draws_w))]
        for a, b in ((ids_r, ids_w), (draws_r, draws_w)):
            np.testing.assert_array_equal(*(np.take_along_axis(x, o, 1) for x, o in zip((a, b), by_id, strict=True)))
        mine, theirs = (np.take_along_axis(x, o, 1) for x, o in zip((mine, theirs), by_id, strict=True))
    far = written.top_logit[usable].astype(np.float64)[:, None] - theirs > max(4.0, 8 * step)
    bound = np.where(far & (codec == "small"), 4 * step, step / 2)
    bound = bound + np.spacing(np.abs(written.top_logit[usable])).astype(np.float64)[:, None]
    assert (np.abs(mine.astype(np.float64) - theirs) <= bound).all()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_cache_round_trips(make_toy, data):
    vocab_size = data.draw(st.integers(2, 60))
    examples = data.draw(st.integers(1, 9))
    selector = data.draw(st.sampled_from(["topk", "sampled"]))
    toy = make_toy(
        examples=examples,
        shard_examples=data.draw(st.integers(1, 5)),
        vocab_size=vocab_size,
        top_k=data.draw(st.integers(1, vocab_size)),
        temperatures=tuple(data.draw(st.lists(st.sampled_from([0.5, 1.0, 1.2, 4.0]), min_size=1, unique=True))),
        step=2.0 ** data.draw(st.integers(-12, 0)),
        store_ids=selector == "sampled" or data.draw(st.booleans()),
        selector=selector,
        codec=data.draw(st.sampled_from(["fine", "small"])),
        seed=data.draw(st.integers(0, 2**32)),
        quarantined=dict.fromkeys(data.draw(st.sets(st.integers(0, examples - 1))), "too_long"),
    )
    with tempfile.TemporaryDirectory() as folder:
        reader = CacheReader.open(toy.build(Path(folder) / "cache"), expect=toy.identity)
        written = [toy.row(i) for i in range(examples) if i not in toy.quarantined]
        assert len(reader) == len(written)
        order = data.draw(st.permutations(range(len(written))))
        for read, index in zip(reader.read(order), order, strict=True):
            assert_same(read, written[index], toy.step, toy.codec)
        totals = reader.totals()
        assert totals.examples.reconciles and totals.positions.reconciles
        assert totals.examples.input == examples
        assert totals.positions.written == sum(int((row.status == 0).sum()) for row in written)


def test_order_repeats_and_text_projection(toy, cache):
    reader = CacheReader.open(cache)
    rows = reader.read([6, 0, 6, 3])
    assert [row.example_id for row in rows] == ["toy-6", "toy-0", "toy-6", "toy-3"]
    texts = list(reader.rows(TEXT))
    assert all(type(text) is TextRow for text in texts)
    assert [(t.prompt, t.answer) for t in texts] == [(r.prompt, r.answer) for r in reader.rows()]


@pytest.mark.parametrize("selector", ["topk", "sampled"])
def test_projections_hold_what_they_say_and_read_nothing_else(make_toy, tmp_path, selector):
    """A byte of a column that was not asked for may be wrong; one of a column that was asked for may not."""
    toy = make_toy(examples=3, shard_examples=3, selector=selector)
    cache = toy.build(tmp_path / "c")
    reader = CacheReader.open(cache)
    for aligned, ranked, row in zip(reader.rows(ALIGNMENT), reader.rows(RANKED), reader.rows(), strict=True):
        assert type(aligned) is AlignmentRow and type(ranked) is CacheRow
        assert (aligned.example_id, aligned.answer) == (row.example_id, row.answer)
        for name in ("answer_ids", "answer_offsets", "status"):
            np.testing.assert_array_equal(getattr(aligned, name), getattr(row, name))
        assert ranked.token_ids is None and row.token_ids is not None
        assert ranked.draws is None and (row.draws is not None) == (selector == "sampled")
        for name in ("answer_ids", "answer_offsets", "status", "top_logit", "logits", "logsumexp", "log_tail"):
            np.testing.assert_array_equal(getattr(ranked, name), getattr(row, name))

    path = next((cache / "shards").glob("*.parquet"))
    whole, group = path.read_bytes(), pq.read_metadata(path).row_group(0)
    columns = {group.column(i).path_in_schema.partition(".")[0]: group.column(i) for i in range(group.num_columns)}
    unread_of = {"id_order": (TEXT, ALIGNMENT, RANKED), "slots": (TEXT, ALIGNMENT), "status": (TEXT,)}
    if selector == "sampled":
        unread_of["draws"] = (TEXT, ALIGNMENT, RANKED)
    for victim, unread in unread_of.items():
        damaged = bytearray(whole)
        damaged[columns[victim].data_page_offset + columns[victim].total_compressed_size - 2] ^= 1
        path.write_bytes(damaged)
        for projection in (TEXT, ALIGNMENT, RANKED, ALL):
            rows = CacheReader.open(cache).rows(projection)
            if projection in unread:
                assert len(list(rows)) == 3
            else:
                with pytest.raises(CorruptShard):
                    list(rows)


def test_rows_belong_to_the_caller(cache):
    reader = CacheReader.open(cache)
    (row,) = reader.read([0])
    for array in (row.logits, row.answer_ids, row.token_ids, row.logsumexp, row.status):
        array[:] = 0  # must be writable, and must not reach the next reader
    (again,) = reader.read([0])
    assert again.logits.any() and again.token_ids.any() and again.logsumexp.any()


@pytest.mark.parametrize("index", [-1, 7])
def test_row_number_out_of_range(cache, index):
    with pytest.raises(IndexError, match="rows 0 to 6"):
        CacheReader.open(cache).read([index])


def test_whole_vocabulary_has_no_tail(make_toy, tmp_path):
    toy = make_toy(top_k=12, vocab_size=12)
    for row in CacheReader.open(toy.build(tmp_path / "c")).rows():
        assert row.log_tail is None
        assert row.logits.shape[1] == 12


def test_without_ids(make_toy, tmp_path):
    toy = make_toy(store_ids=False)
    for i, row in enumerate(CacheReader.open(toy.build(tmp_path / "c")).rows()):
        assert row.token_ids is None
        assert_same(row, toy.row(i), toy.step)


def test_ids_above_17_bits(make_toy, tmp_path):
    """Token ids of 131,072 and above survive: packed in 17 bits, as others did, they would not."""
    toy = make_toy(vocab_size=151_936, top_k=256, examples=2, max_positions=2)
    rows = list(CacheReader.open(toy.build(tmp_path / "c")).rows())
    assert max(int(row.token_ids.max()) for row in rows) > 131_071
    for i, row in enumerate(rows):
        assert_same(row, toy.row(i), toy.step)


def test_shard_whose_examples_are_all_quarantined(make_toy, tmp_path):
    toy = make_toy(examples=6, shard_examples=3, quarantined={3: "too_long", 4: "empty_answer", 5: "too_long"})
    reader = CacheReader.open(toy.build(tmp_path / "c"))
    assert len(reader) == 3
    assert reader.records[1].rows == 0
    assert reader.totals().examples.quarantined == {"too_long": 2, "empty_answer": 1}
    assert [row.example_id for row in reader.rows()] == ["toy-0", "toy-1", "toy-2"]


def test_all_examples_quarantined(make_toy, tmp_path):
    toy = make_toy(examples=2, shard_examples=2, quarantined={0: "x", 1: "x"})
    reader = CacheReader.open(toy.build(tmp_path / "c"))
    assert len(reader) == 0 and list(reader.rows()) == []


def test_ledgers_count_every_position(make_toy, tmp_path):
    toy = make_toy(quarantined={2: "too_long"})
    totals = CacheReader.open(toy.build(tmp_path / "c")).totals()
    rows = [toy.row(i) for i in range(7) if i != 2]
    unusable = sum(int((row.status != 0).sum()) for row in rows)
    usable = sum(int((row.status == 0).sum()) for row in rows)
    assert unusable > 0
    assert totals.positions.quarantined == {"not_finite": unusable, "too_long": 4}
    assert totals.positions.written == usable
    assert totals.positions.input == usable + unusable + 4
    assert (totals.examples.input, totals.examples.written) == (7, 6)


def test_several_row_groups(toy, tmp_path, monkeypatch):
    """Rows are found in whichever row group they are, and a small memory only costs time."""
    monkeypatch.setattr("cache_schema.shard.GROUP_VALUES", 40)
    reader = CacheReader.open(toy.build(tmp_path / "c"), memory_bytes=1)
    for i, row in reversed(list(enumerate(reader.read(range(7))))):
        assert_same(row, toy.row(i), toy.step)
    assert [text.example_id for text in reader.rows(TEXT)] == [f"toy-{i}" for i in range(7)]


def test_memory_is_bounded(make_toy, tmp_path, monkeypatch):
    monkeypatch.setattr("cache_schema.shard.GROUP_VALUES", 1)
    path = make_toy(examples=30, shard_examples=30).build(tmp_path / "c")
    reads = []
    from cache_schema.shard import ShardFile

    group = ShardFile.group
    monkeypatch.setattr(ShardFile, "group", lambda self, *a: reads.append(a) or group(self, *a))
    for memory_bytes, expected in ((1 << 30, 30), (1, 60)):
        reads.clear()
        reader = CacheReader.open(path, memory_bytes=memory_bytes)
        reader.read(range(30))
        reader.read(range(30))
        assert len(reads) == expected


def test_same_rows_same_bytes(toy, tmp_path):
    a, b = toy.build(tmp_path / "a"), toy.build(tmp_path / "b")
    for path in sorted((a / "shards").iterdir()):
        assert path.read_bytes() == (b / "shards" / path.name).read_bytes()
    assert (a / "sealed.json").read_bytes() == (b / "sealed.json").read_bytes()


def test_recorded_codec_error_is_the_measured_one(toy, cache):
    reader = CacheReader.open(cache)
    largest = 0.0
    for i, row in enumerate(reader.rows()):
        usable = row.status == 0
        difference = np.abs(row.logits[usable].astype(np.float64) - toy.row(i).logits[usable])
        largest = max(largest, float(difference.max(initial=0)))
    assert 0 < largest <= toy.step / 2
    assert reader.totals().codec_error_max == largest


def test_opening_a_sealed_cache_needs_two_files(toy, cache):
    for path in sorted(cache.iterdir()):
        if path.name not in ("manifest.json", "sealed.json"):
            path.rename(cache.parent / path.name)
    reader = CacheReader.open(cache, expect=toy.identity)
    assert len(reader) == 7 and reader.totals().examples.reconciles
