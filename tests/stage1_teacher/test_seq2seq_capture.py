"""The capture loop over an encoder-decoder: rows without ids, batches of both sides, unknown tokens, the table."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema.reader import CacheReader
from cache_schema.schema import QuarantinedExample, Status
from pipeline.data import Shots
from pipeline.models import ModelSource, load_seq2seq_lm, load_tokenizer
from pipeline.prompts import Encoded, PromptBuilder
from pipeline.recipe import load_recipe
from pipeline.tasks import Example
from stage1_teacher.capture import Capture, Job, token_budget_batches
from stage1_teacher.ledger import task_table
from stage1_teacher.teacher import Seq2SeqTeacher, TeacherInput

NO_SHOTS = Shots(0, "shared", 0, {})
TOKENS = {"pad_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 0}  # of the toy tokenizer


def examples(count: int) -> list[Example]:
    return [Example(f"train/{i}", "toy", r["question"], r["answer"]) for i, r in enumerate(toys.rows(count))]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return PromptBuilder(toys.tiny_tokenizer(tmp_path_factory.mktemp("tok")), seq2seq=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = toys.tiny_t5(tmp_path_factory.mktemp("t5"), **TOKENS)
    return load_seq2seq_lm(ModelSource(str(folder), None), "float32", "none", torch.device("cpu"))


def capture(teacher: Any, prompts: PromptBuilder, shots: Shots = NO_SHOTS, **options: Any) -> Capture:
    settings = {"top_k": 8, "temperatures": [1.2], "step": 0.015625, "batch_tokens": 600, "store_ids": False} | options
    return Capture(teacher, prompts, shots, **settings)


@pytest.mark.parametrize("count", [0, 2])
def test_rows_are_what_the_model_says_of_each_example_alone(model, prompts, count):
    """Worked examples included: an encoder shares none of them between prompts, whatever the policy."""
    shots = Shots(count, "shared", 0, {"toy": tuple(examples(12)[10:])})
    rows, quarantined = capture(Seq2SeqTeacher(model), prompts, shots).shard(examples(9))
    assert not quarantined and [row.example_id for row in rows] == [e.id for e in examples(9)]
    for example, row in zip(examples(9), rows, strict=True):
        encoded = prompts.encode(example.prompt, example.answer, shots.of(example))
        logits_NV = toys.answer_logits(model, encoded)
        kept = toys.top_k(logits_NV, 8, [1.2])
        assert row.answer_start == 1 and row.answer_ids.tolist() == encoded.answer_ids and len(row.logits) > 1
        for name in ("top_logit", "logits", "logsumexp", "log_tail"):
            np.testing.assert_allclose(getattr(row, name), kept[name], rtol=0, atol=3e-5)
        shifted = np.roll(kept["logits"], 1, axis=0)
        assert np.abs(row.logits - shifted).max() > 1  # the control: rows shifted by one


def test_without_ids_everything_else_is_the_same(model, prompts):
    with_ids, without = (
        capture(Seq2SeqTeacher(model), prompts, store_ids=store).shard(examples(5))[0] for store in (True, False)
    )
    for one, other in zip(with_ids, without, strict=True):
        assert one.token_ids is not None and one.token_ids.shape == one.logits.shape and other.token_ids is None
        assert np.array_equal(one.logits, other.logits) and np.array_equal(one.log_tail, other.log_tail)


def test_out_of_memory_halves_the_batch_and_goes_on(model, prompts):
    class Small(Seq2SeqTeacher):
        sizes: Sequence[int] = ()

        def answer_logits(self, batch, context_ids):
            if len(batch) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.sizes = [*self.sizes, len(batch)]
            return super().answer_logits(batch, context_ids)

    teacher = Small(model)
    rows, _ = capture(teacher, prompts, batch_tokens=4096).shard(examples(7))
    assert [row.example_id for row in rows] == [e.id for e in examples(7)]
    assert sum(teacher.sizes) == 7 and max(teacher.sizes) == 2


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(2, 12)), min_size=1, max_size=25),
    skipped=st.integers(0, 1),
    budget=st.integers(1, 200),
)
def test_batches_stay_within_the_budget_of_both_sides(lengths, skipped, budget):
    def job(i: int, encoder: int, decoder: int) -> Job:
        read = TeacherInput([0] * decoder, 0, [0] * encoder)
        return Job(Example(f"{i:02}", "toy", "", ""), Encoded([], 0, []), read)

    jobs = [job(i, *pair) for i, pair in enumerate(lengths)]
    batches = list(token_budget_batches(jobs, skipped, budget))
    assert sorted(j.example.id for batch in batches for j in batch) == [j.example.id for j in jobs]
    for batch in batches:
        padded = [max(side) for side in zip(*(j.lengths for j in batch), strict=True)]
        assert len(batch) == 1 or len(batch) * (sum(padded) - skipped) <= budget
    flat = [j.lengths for batch in batches for j in batch]
    assert flat == sorted(flat, reverse=True)  # longest first, the encoder's side leading


def test_the_padded_tokens_that_the_model_reads_are_those_of_the_budget(model, prompts):
    teacher = Seq2SeqTeacher(model)
    read: list[int] = []
    hooks = [
        side.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        for side in (model.encoder, model.decoder)
    ]
    capture(teacher, prompts, batch_tokens=400).shard(examples(30))
    for hook in hooks:
        hook.remove()
    batches = [encoder + decoder for encoder, decoder in zip(read[::2], read[1::2], strict=True)]
    assert len(batches) > 2 and max(batches) <= 400
    assert sum(batches) < 1.3 * sum(  # sorting by length keeps padding down
        len(encoded.encoder_ids) + len(encoded.input_ids)
        for encoded in (prompts.encode(e.prompt, e.answer) for e in examples(30))
    )


def test_an_empty_prompt_is_an_end_of_sequence(model, prompts):
    (row,), quarantined = capture(Seq2SeqTeacher(model), prompts).shard([Example("train/0", "toy", "", "Yes.")])
    assert not quarantined and (row.status == Status.USABLE).all() and len(row.status) == len(row.answer_ids) > 1


def test_the_table_counts_every_position_by_task(tmp_path):
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path, teacher={"shots": 0}, eval={"baselines": ["zero_shot"]})))

    def edit(row: Any) -> Any:
        if row.example_id.endswith("3"):
            return QuarantinedExample(row.example_id, row.task, "empty_answer", 4)
        row.status[:] = Status.USABLE
        if row.example_id.endswith("5"):
            row.status[-2:] = Status.UNKNOWN_TOKEN
        return row

    reader = CacheReader.open(toys.fill_cache(recipe, edit))
    planned = [Example(f"train/{i}", "gsm8k", "", "", truncated=i < 7) for i in range(24)]
    head, _, line = (
        [cell.strip() for cell in row.strip("| ").split("|")] for row in task_table(reader, planned).splitlines()
    )
    cells = dict(zip(head, line, strict=True))
    totals, ledger = reader.totals(), {name: int(cells[name].replace(",", "")) for name in head[1:]}
    assert (cells["task"], ledger["examples"], ledger["truncated_contexts"]) == ("gsm8k", 24, 7)
    assert ledger["positions"] == totals.positions.input and ledger["usable"] == totals.positions.written
    lost = sum(example.positions for record in reader.records for example in record.quarantined)
    assert ledger["no_row"] == lost == totals.positions.quarantined["empty_answer"] > 0
    assert ledger["unknown_token"] == totals.positions.quarantined["unknown_token"] > 0
    assert ledger["positions"] == sum(
        ledger[name] for name in ("usable", "unknown_token", "not_finite", "cut", "no_row")
    )


def test_tasks_have_a_line_each_and_one_for_all(tmp_path):
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path, teacher={"shots": 0}, eval={"baselines": ["zero_shot"]})))
    reader = CacheReader.open(toys.fill_cache(recipe))
    planned = [Example("train/0", task, "", "") for task in ("other", "gsm8k")]
    tasks = [line.split()[1] for line in task_table(reader, planned).splitlines()[2:]]
    assert tasks == ["other", "gsm8k", "all"]


DATA = os.environ.get("LOGITBANK_DATA")


@pytest.mark.skipif(not DATA, reason="needs the real T5 tokenizer: set LOGITBANK_DATA to the folder that has it")
@pytest.mark.parametrize(
    ("answer", "known"),
    [
        ("x = [1, 2]", 8),  # all of it, end-of-sequence included
        ("d = {1: 2}", 4),  # ▁ d ▁ = known; then "{", and all that comes after it
        ("a ~ b", 3),
        ("two\nlines", 3),  # a line break is white space to T5, and nothing unknown
        ("日本", 1),  # the lone ▁ before it
        ("¿Dónde está?", None),
    ],
)
def test_what_t5_cannot_read_is_quarantined_from_there_on(tmp_path, answer, known):
    tokenizer = load_tokenizer(ModelSource(str(Path(str(DATA)) / "tokenizers" / "t5"), None))
    folder = toys.tiny_t5(tmp_path, vocab_size=32128, hidden=8)
    model = load_seq2seq_lm(ModelSource(str(folder), None), "float32", "none", torch.device("cpu"))
    (row,), _ = capture(Seq2SeqTeacher(model), PromptBuilder(tokenizer, seq2seq=True)).shard(
        [Example("train/0", "toy", "What?", answer)]
    )
    tokens = tokenizer.convert_ids_to_tokens(row.answer_ids)
    unknown = tokens.index("<unk>") if "<unk>" in tokens else len(tokens)
    expected = [Status.USABLE] * unknown + [Status.UNKNOWN_TOKEN] * (len(tokens) - unknown)
    assert row.status.tolist() == expected
    assert known is None or unknown == known
