"""Reducing full logits to ranks and normalisers: against float64 NumPy, with ties, tails and broken rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_teacher.topk import select_top_k


def reference(logits_NV: np.ndarray, k: int, temperature: float):
    """Ranks by (-logit, id) and normalisers in float64."""
    order = np.lexsort((np.broadcast_to(np.arange(logits_NV.shape[1]), logits_NV.shape), -logits_NV), axis=1)
    scaled = logits_NV.astype(np.float64) / temperature
    head = np.take_along_axis(scaled, order[:, :k], 1)
    tail = np.take_along_axis(scaled, order[:, k:], 1)
    return order[:, :k], np.logaddexp.reduce(scaled, axis=1), np.logaddexp.reduce(tail, axis=1), head


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 5),
    vocab=st.integers(2, 60),
    coarse=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 1.2, 4.0]),
    data=st.data(),
)
def test_agrees_with_a_stable_sort_in_float64(seed, rows, vocab, coarse, temperature, data):
    k = data.draw(st.integers(1, vocab))
    logits = np.random.default_rng(seed).normal(0, 6, (rows, vocab)).astype(np.float32)
    if coarse:  # many ties, at the cut too
        logits = np.round(logits / 4) * 4
    kept = select_top_k(torch.from_numpy(logits.copy()), k, [temperature])
    ids, logsumexp, tail, _ = reference(logits, k, temperature)
    assert np.array_equal(kept.token_ids_NK.numpy(), ids)
    assert np.array_equal(kept.logits_NK.numpy(), np.take_along_axis(logits, ids, 1))
    assert np.allclose(kept.logsumexp_NT[:, 0].numpy(), logsumexp, rtol=1e-6, atol=1e-5)
    if k == vocab:
        assert kept.log_tail_NT is None
    else:
        assert np.allclose(kept.log_tail_NT[:, 0].numpy(), tail, rtol=1e-6, atol=1e-5)


def test_the_tail_of_a_peaked_row_keeps_its_digits():
    """1 - sum(p) in float32 would be lost in rounding here; the stored tail is right to 6 digits."""
    logits = torch.full((1, 50_000), -3.0)
    logits[0, :4] = torch.tensor([25.0, 12.0, 11.0, 10.0])
    kept = select_top_k(logits, 4, [1.0])
    assert kept.log_tail_NT[0, 0].item() == pytest.approx(np.log(49_996) - 3.0, rel=1e-6)


def test_several_temperatures_have_their_own_columns():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 5
    both = select_top_k(logits.clone(), 7, [1.0, 2.5])
    assert both.logsumexp_NT.shape == (3, 2)
    alone = select_top_k(logits.clone(), 7, [2.5])
    assert torch.equal(both.logsumexp_NT[:, 1], alone.logsumexp_NT[:, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_is_marked_and_the_others_are_untouched(bad):
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    clean = select_top_k(logits.clone(), 5, [1.0])
    logits[2, 17] = bad
    kept = select_top_k(logits, 5, [1.0])
    assert kept.finite_N.tolist() == [True, True, False, True]
    assert kept.logits_NK.isfinite().all() and kept.logsumexp_NT.isfinite().all() and kept.log_tail_NT.isfinite().all()
    assert torch.equal(kept.logits_NK[[0, 1, 3]], clean.logits_NK[[0, 1, 3]])


def test_a_masked_vocabulary_is_fine_below_the_cut_and_not_above():
    logits = torch.arange(20.0)[None].repeat(2, 1)
    logits[0, :10] = -torch.inf  # ten ids are left: enough for K = 5, not for K = 15
    assert select_top_k(logits.clone(), 5, [1.0]).finite_N.tolist() == [True, True]
    assert select_top_k(logits.clone(), 15, [1.0]).finite_N.tolist() == [False, True]
