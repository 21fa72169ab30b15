"""From cached rows to tensors: which place predicts which token, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys

from cache_schema.reader import CacheReader
from cache_schema.schema import CacheRow, Status
from pipeline.errors import DataError, ModelError, RunError
from pipeline.fingerprint import Experiment
from pipeline.models import ModelSource, load_tokenizer
from pipeline.prompts import PromptBuilder
from pipeline.recipe import load_recipe
from pipeline.sections import Arm
from stage2_student.batches import Collator
from stage2_student.usable import Usable, lengths, usable_rows

DISTILL = Arm(ce=1.0, logit_mse=0.5)


def opened(tmp_path: Path, edit: Callable[[Any], Any] = lambda row: row, **overrides: Any) -> CacheReader:
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path, **overrides)))
    return CacheReader.open(toys.fill_cache(recipe, edit), expect=Experiment(recipe).identity)


def prompts_of(folder: Path) -> PromptBuilder:
    return PromptBuilder(load_tokenizer(ModelSource(str(folder), None)), None)


def test_every_answer_token_is_read_one_place_before_it(tmp_path: Path) -> None:
    reader, prompts = opened(tmp_path), prompts_of(tmp_path / "model")
    rows = reader.read([3, 0, 20])
    for padding in ("right", "left"):
        batch = Collator(reader, prompts, 320, DISTILL, "boundary").collate(rows, padding)
        flat = batch.input_ids_BL.flatten()
        following = torch.cat([flat[1:], flat[:1]])
        first = torch.tensor(np.cumsum([0] + [len(row.answer_ids) for row in rows[:-1]]))
        inside = torch.ones(len(batch.labels_N), dtype=torch.bool)
        assert batch.labels_N.tolist() == [token for row in rows for token in row.answer_ids.tolist()]
        assert (following[batch.read_at_N] == batch.labels_N)[inside].all()
        for row, start in zip(rows, first.tolist(), strict=True):
            encoded = prompts.encode(row.prompt, row.answer)
            assert flat[batch.read_at_N[start]] == encoded.input_ids[encoded.answer_start - 1]
        assert batch.attention_mask_BL.sum(1).tolist() == [
            len(prompts.encode(row.prompt, row.answer).input_ids) for row in rows
        ]
        read_positions = batch.position_ids_BL.flatten()[batch.read_at_N]
        assert read_positions[0] == prompts.encode(rows[0].prompt, rows[0].answer).answer_start - 1


def test_teacher_rows_lie_beside_their_labels(tmp_path: Path) -> None:
    def edit(row: CacheRow) -> CacheRow:
        status = np.zeros_like(row.status)
        status[2] = Status.NOT_FINITE
        return replace(row, status=status)

    reader = opened(tmp_path, edit, cache={"temperatures": [1.0, 2.0]})
    rows = reader.read([5, 1])
    batch = Collator(reader, prompts_of(tmp_path / "model"), 320, Arm(kl=1.0, temperature=2.0), "boundary").collate(
        rows
    )
    teacher = batch.teacher
    n = len(rows[0].answer_ids)
    assert torch.equal(teacher.logits_NK[n:], torch.from_numpy(rows[1].logits))
    assert torch.equal(teacher.ids_NK[:n], torch.from_numpy(rows[0].token_ids).long())
    assert torch.equal(teacher.logsumexp_N[n:], torch.from_numpy(rows[1].logsumexp[:, 1]))
    assert torch.equal(teacher.log_tail_N[:n], torch.from_numpy(rows[0].log_tail[:, 1]))
    assert (~teacher.usable_N).nonzero().squeeze(1).tolist() == [2, n + 2]
    usable = len(batch.labels_N) - 2
    assert batch.counts() == {
        "tokens": int(batch.attention_mask_BL.sum()),
        "ce": len(batch.labels_N),  # the text of a quarantined position is known all the same
        **dict.fromkeys(("logit_mse", "kl", "uld"), usable),
    }


SAMPLED = {"selector": "sampled", "top_k": 24, "temperatures": [0.1, 1.0]}
KL = {"distill": {"logit_mse": 0.0, "kl": 1.0, "temperature": 0.1}}


@pytest.mark.parametrize(("temperature", "column"), [(0.1, 0), (1.0, 1)])
def test_drawn_ids_are_weighed_and_empty_slots_left_out(tmp_path: Path, temperature: float, column: int) -> None:
    reader = opened(tmp_path, cache=SAMPLED, arms=KL)
    rows = reader.read([5, 1])
    arm = Arm(kl=1.0, temperature=temperature)
    teacher = Collator(reader, prompts_of(tmp_path / "model"), 320, arm, "boundary").collate(rows).teacher
    draws = np.concatenate([row.draws for row in rows])
    slots = int((draws > 0).sum(axis=1).max())
    assert teacher.weights_NK.shape == teacher.ids_NK.shape == teacher.logits_NK.shape == (len(draws), slots)
    assert slots < 24 and teacher.log_tail_N is None and not draws[:, slots:].any()
    logits, sums = (np.concatenate([getattr(row, name) for row in rows]) for name in ("logits", "logsumexp"))
    p0, p = (np.exp(logits / t - sums[:, i, None]) for i, t in enumerate((0.1, 1.0)))
    expected = draws / 24 * (p / p0 if column else 1)
    np.testing.assert_allclose(teacher.weights_NK.numpy(), expected[:, :slots], rtol=1e-5)
    assert torch.equal(teacher.logsumexp_N, torch.from_numpy(sums[:, column]))


@pytest.mark.parametrize("arm", [Arm(logit_mse=0.5), Arm(ce=1.0, uld=0.5, kl=1.0)])
def test_a_cache_of_drawn_ids_is_refused_where_the_largest_are_needed(tmp_path: Path, arm: Arm) -> None:
    reader, prompts = opened(tmp_path, cache=SAMPLED, arms=KL), prompts_of(tmp_path / "model")
    loss = "logit_mse" if arm.logit_mse else "uld"
    with pytest.raises(
        RunError, match=rf"cache at {reader.location} keeps drawn ids .*{loss} .* --set cache.selector=topk"
    ):
        Collator(reader, prompts, 320, arm, "boundary")
    Collator(reader, prompts, 23, Arm(kl=1.0), "boundary")  # fewer ids than draws: each row's ids are checked instead


@pytest.mark.parametrize(
    ("arm", "columns"), [(Arm(ce=1.0), "text"), (Arm(ce=1.0, uld=0.5), "ranked"), (Arm(uld=0.5, kl=0.1), "all")]
)
def test_only_what_the_losses_need_is_read(tmp_path: Path, arm: Arm, columns: str) -> None:
    reader = opened(tmp_path)
    (batch,) = Collator(reader, prompts_of(tmp_path / "model"), 320, arm, "boundary").read([0, 1], 4)
    assert len(batch.example_ids) == 2
    assert {key[2].value for key in reader._groups} == {columns}
    assert (batch.teacher is None) == (columns == "text")
    if batch.teacher is not None:
        assert (batch.teacher.ids_NK is None) == (columns == "ranked")


def test_micro_batches_keep_the_order_and_may_be_none(tmp_path: Path) -> None:
    reader = opened(tmp_path)
    collator = Collator(reader, prompts_of(tmp_path / "model"), 320, DISTILL, "boundary")
    batches = collator.read([4, 2, 9, 7, 0], 2)
    assert [len(b.example_ids) for b in batches] == [2, 2, 1]
    assert [i for b in batches for i in b.example_ids] == [row.example_id for row in reader.read([4, 2, 9, 7, 0])]
    assert collator.read([], 2) == []


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    reader = opened(tmp_path)
    toys.tiny_tokenizer(tmp_path / "other", vocab_size=300)
    with pytest.raises(ModelError, match=r"other \(sha256 \w{12}\) is not the one that the cache was made with"):
        Collator(reader, prompts_of(tmp_path / "other"), 320, DISTILL, "boundary")
    Collator(reader, prompts_of(tmp_path / "other"), 320, Arm(ce=1.0, uld=1.0), "boundary")  # these suit any tokenizer


def test_other_answer_tokens_are_named(tmp_path: Path) -> None:
    """The same tokenizer, but a chat template has come: its turns end otherwise and have no space in front."""
    reader = opened(tmp_path)
    toys.tiny_tokenizer(tmp_path / "chat", chat=True)
    collator = Collator(reader, prompts_of(tmp_path / "chat"), 320, DISTILL, "boundary")
    with pytest.raises(ModelError) as error:
        collator.read([6], 2)
    row = reader.read([6])[0]
    theirs = collator.prompts.tokenizer.convert_ids_to_tokens(int(row.answer_ids[0]))
    assert f"example {row.example_id}:" in str(error.value)
    assert "differ first at answer token 0" in str(error.value)
    assert f"the cache has {row.answer_ids[0]} {theirs!r}" in str(error.value)


def test_a_shorter_answer_is_named(tmp_path: Path) -> None:
    reader = opened(tmp_path)
    collator = Collator(reader, prompts_of(tmp_path / "model"), 320, DISTILL, "boundary")
    row = reader.read([0])[0]
    with pytest.raises(ModelError, match=r"the student has nothing \(it is shorter\), the cache has 0 '<\|eos\|>'"):
        collator._check_answer(row, row.answer_ids.tolist()[:-1])


def test_a_vocabulary_too_small_for_the_cache_is_refused(tmp_path: Path) -> None:
    reader, prompts = opened(tmp_path, cache={"top_k": 310}), prompts_of(tmp_path / "model")
    for size in (300, 310):  # at 310 there would be no tail left to compare with
        with pytest.raises(
            ModelError, match=rf"the top 310 of 320 logits, but the student's vocabulary has {size} ids"
        ):
            Collator(reader, prompts, size, DISTILL, "boundary")
    collator = Collator(reader, prompts, 311, DISTILL, "boundary")
    with pytest.raises(ModelError, match=r"example train/gsm8k-\d+: the cache has token id 31\d, .* ends at 310;"):
        collator.read([0], 1)


def usable_of(reader: CacheReader, prompts: PromptBuilder, window: int | None, vocab_size: int | None = None) -> Usable:
    """As one process finds them."""
    return usable_rows(lengths(reader, prompts, range(len(reader)), vocab_size), prompts, window)


def test_what_does_not_fit_the_window_is_dropped_and_counted(tmp_path: Path) -> None:
    reader, prompts = opened(tmp_path), prompts_of(tmp_path / "model")
    plain = [len(prompts.encode(row.prompt, row.answer).input_ids) for row in reader.read(range(len(reader)))]
    window = sorted(plain)[10]
    usable = usable_of(reader, prompts, window)
    assert usable.rows == [i for i, length in enumerate(plain) if length <= window]
    assert usable.dropped == len(reader) - len(usable.rows) > 0
    assert usable.longest == max(plain)
    assert usable_of(reader, prompts, None).dropped == 0
    with pytest.raises(DataError, match=f"reads 5 tokens: the shortest of {len(reader)} examples has {min(plain)}"):
        usable_of(reader, prompts, 5)


def test_what_a_student_cannot_read_is_dropped_and_counted(tmp_path: Path) -> None:
    """Its tokenizer has a token that its output has no row for, or its chat template refuses a text."""
    reader = opened(tmp_path)
    rows = reader.read(range(len(reader)))
    tokenizer = toys.tiny_tokenizer(tmp_path / "more", chat=True)
    name = rows[0].prompt.split()[0]  # of some examples, not of all
    named = [i for i, row in enumerate(rows) if name in row.prompt + row.answer]
    assert 0 < len(named) < len(rows)
    tokenizer.add_tokens([name])
    vocab_size = tokenizer.convert_tokens_to_ids(name)
    usable = usable_of(reader, PromptBuilder(tokenizer), None, vocab_size=vocab_size)
    assert (usable.rows, usable.unreadable) == ([i for i in range(len(rows)) if i not in named], len(named))
    assert usable_of(reader, PromptBuilder(tokenizer), None, vocab_size=vocab_size + 1).dropped == 0  # the control
    refuses = f"{{{{ raise_exception('no') if '{name}' in messages[0].content else '' }}}}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    refused = [i for i, row in enumerate(rows) if name in row.prompt]
    usable = usable_of(reader, PromptBuilder(tokenizer), None)
    assert (usable.rows, usable.unreadable) == ([i for i in range(len(rows)) if i not in refused], len(refused))
    tokenizer.chat_template = "{{ raise_exception('no') if messages[0].content not in ('.', 'quokka', '0', 'a') }}" + (
        toys.CHAT_TEMPLATE
    )
    with pytest.raises(DataError, match=f"it can read none of the {len(rows)} examples at all"):
        usable_of(reader, PromptBuilder(tokenizer), None)
