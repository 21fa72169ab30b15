"""The capture loop: rows in their places, ledgers that reconcile, memory that runs out, writers that fail."""

import numpy as np
import pytest
import torch
import toys

from cache_schema.manifest import Manifest, vocabulary_sha256
from cache_schema.reader import CacheReader
from cache_schema.schema import Status
from cache_schema.writer import CacheWriter
from pipeline.data import Shots
from pipeline.errors import UserError
from pipeline.handout import Handout
from pipeline.models import ModelSource, load_causal_lm
from pipeline.prompts import PromptBuilder
from pipeline.tasks import Example
from stage1_teacher.capture import Capture
from stage1_teacher.executor import ShardWorker, run_shards
from stage1_teacher.teacher import CausalTeacher, FullLogitsTeacher

NO_SHOTS = Shots(0, "shared", 0, {})


def examples(count):
    return [Example(f"train/{i}", "toy", r["question"], r["answer"]) for i, r in enumerate(toys.rows(count))]


class CountingTeacher(FullLogitsTeacher):
    """A teacher whose logits say what they were read from: after token t, id t + 1 is the likeliest, then t + 2."""

    model, vocab_size = None, 320

    def __init__(self, window=None, fail=None):
        self.window, self.fail, self.batches = window, fail or (lambda batch: None), []

    def answer_logits(self, batch, context_ids):
        self.fail(batch)
        self.batches.append(len(batch))
        for item in batch:
            assert item.input_ids[: len(context_ids)] == list(context_ids)
            read = torch.tensor(item.input_ids[item.first_row : -1])
            distance = (torch.arange(320)[None, :] - read[:, None] - 1) % 320
            yield -distance.float() / 8


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return PromptBuilder(toys.tiny_tokenizer(tmp_path_factory.mktemp("tok")))


def capture(teacher, prompts, shots=NO_SHOTS, batch_tokens=4096):
    return Capture(teacher, prompts, shots, 8, [1.0], 0.015625, batch_tokens)


def test_row_t_is_read_one_place_before_answer_token_t(prompts):
    (row,), quarantined = capture(CountingTeacher(), prompts).shard(examples(1))
    assert not quarantined and (row.status == Status.USABLE).all()
    encoded = prompts.encode(row.prompt, row.answer)
    before = encoded.input_ids[encoded.answer_start - 1 : -1]
    assert row.token_ids[:, 0].tolist() == [(token + 1) % 320 for token in before]
    assert row.answer_ids.tolist() == encoded.answer_ids and row.answer_start == encoded.answer_start


def test_rows_do_not_depend_on_how_they_were_batched(prompts):
    shots = Shots(2, "shared", 0, {"toy": tuple(examples(12)[10:])})
    whole, _ = capture(CountingTeacher(), prompts, shots).shard(examples(10))
    alone, _ = capture(CountingTeacher(), prompts, shots, batch_tokens=1).shard(examples(10))
    assert [r.example_id for r in whole] == [r.example_id for r in alone] == [e.id for e in examples(10)]
    for one, other in zip(whole, alone, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids) and np.array_equal(one.logits, other.logits)


def test_out_of_memory_halves_the_batch_and_goes_on(prompts):
    def only_two_fit(batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    teacher = CountingTeacher(fail=only_two_fit)
    rows, _ = capture(teacher, prompts).shard(examples(7))
    assert [r.example_id for r in rows] == [e.id for e in examples(7)]
    assert max(teacher.batches) <= 2


def test_one_example_too_large_for_memory_is_named(prompts):
    def nothing_fits(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"train/0.*do not fit into memory"):
        capture(CountingTeacher(fail=nothing_fits), prompts).shard(examples(1))


def test_an_answer_beyond_the_window_is_cut_there(prompts):
    example = examples(1)[0]
    encoded = prompts.encode(example.prompt, example.answer)
    n = len(encoded.answer_ids)
    window = encoded.answer_start - 1 + 5  # five rows can be read
    (row,), _ = capture(CountingTeacher(window=window), prompts).shard([example])
    assert row.status.tolist() == [Status.USABLE] * 5 + [Status.CUT] * (n - 5)
    assert row.answer_ids.tolist() == encoded.answer_ids


def test_examples_that_cannot_be_used_are_quarantined_with_a_reason(prompts):
    short, empty, long = examples(3)
    empty = Example(empty.id, "toy", empty.prompt, "  ")
    long = Example(long.id, "toy", "why " * 300, long.answer)
    rows, quarantined = capture(CountingTeacher(window=200), prompts).shard([short, empty, long])
    assert [r.example_id for r in rows] == [short.id]
    assert [(q.example_id, q.reason) for q in quarantined] == [
        (empty.id, "empty_answer"),
        (long.id, "prompt_exceeds_window"),
    ]


def test_a_token_the_teacher_does_not_know_spoils_what_follows(tmp_path):
    tokenizer = toys.tiny_tokenizer(tmp_path)
    tokenizer.unk_token = "<|pad|>"  # stands in for an unknown token that can be written down
    builder = PromptBuilder(tokenizer)
    (row,), _ = capture(CountingTeacher(), builder).shard([Example("train/0", "toy", "Why?", "a b<|pad|>c d")])
    first = row.answer_ids.tolist().index(tokenizer.unk_token_id)
    assert (row.status[:first] == Status.USABLE).all() and (row.status[first:] == Status.UNKNOWN_TOKEN).all()


def test_nan_logits_are_a_status_not_a_number(prompts):
    class Broken(CountingTeacher):
        def answer_logits(self, batch, context_ids):
            for chunk in super().answer_logits(batch, context_ids):
                chunk[3, 7] = torch.nan
                yield chunk

    (row,), _ = capture(Broken(), prompts).shard(examples(1))
    assert row.status[3] == Status.NOT_FINITE and (np.delete(row.status, 3) == Status.USABLE).all()
    assert np.isfinite(row.logits).all() and np.isfinite(row.logsumexp).all()


def test_a_logit_too_far_down_to_be_stored_makes_its_position_unusable(prompts):
    class Steep(CountingTeacher):
        def answer_logits(self, batch, context_ids):
            for chunk in super().answer_logits(batch, context_ids):
                chunk[2] *= 1e7
                yield chunk

    (row,), _ = capture(Steep(), prompts).shard(examples(1))
    assert row.status[2] == Status.NOT_FINITE and (np.delete(row.status, 2) == Status.USABLE).all()


def manifest_for(count, shard_examples, vocabulary):
    return Manifest.create(
        identity={"test": count},
        provenance={},
        top_k=8,
        vocab_size=320,
        temperatures=[1.0],
        step=0.015625,
        store_ids=True,
        examples=count,
        shard_examples=shard_examples,
        vocabulary_sha256=vocabulary_sha256(vocabulary),
    )


def test_shards_are_committed_and_both_ledgers_reconcile(prompts, tmp_path):
    words = [str(i) for i in range(320)]
    items = examples(10)
    items[4] = Example(items[4].id, "toy", items[4].prompt, "")
    writer = CacheWriter.open(tmp_path / "cache", manifest_for(10, 4, words), words)
    done = []
    run_shards(ShardWorker(capture(CountingTeacher(), prompts), items, writer, {}), Handout([0, 1, 2]), done.append)
    writer.seal()
    totals = CacheReader.open(tmp_path / "cache").totals()
    assert done == sorted(done) and done[-1] == 10
    assert (totals.examples.input, totals.examples.written, totals.examples.quarantined) == (10, 9, {"empty_answer": 1})
    assert totals.examples.reconciles and totals.positions.reconciles


def test_a_claim_is_renewed_while_its_shard_is_in_work(prompts, tmp_path, monkeypatch):
    words = [str(i) for i in range(320)]
    writer = CacheWriter.open(tmp_path / "cache", manifest_for(4, 4, words), words)
    claim, renewed = writer.claim, []
    monkeypatch.setattr(writer, "claim", lambda shard: renewed.append(shard) or claim(shard))
    worker = ShardWorker(capture(CountingTeacher(), prompts, batch_tokens=1), examples(4), writer, {})
    assert worker.work(0) == [] and [tuple(outcome[:2]) for outcome in worker.finish()] == [(0, "done")]
    worker.close()
    assert renewed == [0] * 6  # at the start, for the examples that could not be used, and for every batch


def test_shots_are_shared_or_drawn_and_never_the_example_itself():
    pool = tuple(examples(12))
    drawn = Shots(3, "per_example", 0, {"toy": pool})
    for example in pool:
        shots = drawn.of(example)
        assert len({s.id for s in shots}) == 3 and example.id not in {s.id for s in shots}
        assert shots == drawn.of(example)
    assert len({tuple(s.id for s in drawn.of(e)) for e in pool}) > 6
    shared = Shots(3, "shared", 0, {"toy": pool[:3]})
    assert {shared.of(e) for e in pool[3:]} == {pool[:3]}


def test_per_example_shots_give_the_same_rows_as_reading_each_alone(prompts, tmp_path):
    folder = toys.tiny_qwen3(tmp_path / "model", max_position_embeddings=1024)
    teacher = CausalTeacher(load_causal_lm(ModelSource(str(folder), None), "float32", "none", torch.device("cpu")))
    shots = Shots(2, "per_example", 0, {"toy": tuple(examples(8))})
    rows, _ = capture(teacher, prompts, shots).shard(examples(4))
    for example, row in zip(examples(4), rows, strict=True):
        ids = prompts.encode(example.prompt, example.answer, shots.of(example)).input_ids
        with torch.no_grad():
            logits = teacher.model(input_ids=torch.tensor([ids])).logits[0, row.answer_start - 1 : -1]
        np.testing.assert_allclose(row.logits[:, 0], logits.max(dim=1).values.numpy(), atol=1e-4)
