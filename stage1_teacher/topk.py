"""From full logits to what the cache keeps of a position: pure functions on tensors. Called by the capture loop.

Shape suffixes: N positions, V vocabulary, K ranks, T temperatures. Everything is float32 or int64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """N positions reduced to K logits, the largest or drawn ones, and exact normalisers.

    logits_NK: raw logits, rank 0 first. token_ids_NK: their ids; equal logits, at the cut too, go by lower id; None
    once the capture loop, whose cache stores no ids, has let them go.
    logsumexp_NT: of logit/T over the full vocabulary. log_tail_NT: of logit/T over the ids outside the K; None when
    K = V. finite_N: False where a logit is NaN or infinite in a way that leaves no distribution; such a row is zeros.
    """

    logits_NK: Tensor
    token_ids_NK: Tensor | None
    logsumexp_NT: Tensor
    log_tail_NT: Tensor | None
    finite_N: Tensor
    draws_NK: Tensor | None = None  # how often each id was drawn (`sampling.sample`); None for the largest


def select_top_k(logits_NV: Tensor, k: int, temperatures: Sequence[float]) -> TopK:
    """Reduce full float32 logits. **Overwrites its input**: a vocabulary is too large to be copied for nothing.

    The tail is summed over the other ids themselves, never as 1 - sum(p): at K = 256 a peaked row's true tail is 1e-4,
    less than the rounding of the difference.
    """
    vocab_size = logits_NV.shape[1]
    values_NK, ids_NK = _largest(logits_NV, k)
    temperatures_T = torch.tensor(temperatures, dtype=torch.float32, device=logits_NV.device)
    head_NT = torch.logsumexp(values_NK[:, None, :] / temperatures_T[None, :, None], dim=2)
    if k == vocab_size:
        logsumexp_NT, log_tail_NT = head_NT, None
    else:
        others_NV = logits_NV.scatter_(1, ids_NK, -torch.inf)
        log_tail_NT = torch.stack([_logsumexp(others_NV, t) for t in temperatures], dim=1)
        logsumexp_NT = torch.logaddexp(head_NT, log_tail_NT)
    finite_N = values_NK.isfinite().all(1) & logsumexp_NT.isfinite().all(1)
    if log_tail_NT is not None:
        finite_N &= ~log_tail_NT.isnan().any(1)
        log_tail_NT = torch.where(finite_N[:, None], log_tail_NT, 0.0)
    return TopK(
        torch.where(finite_N[:, None], values_NK, 0.0),
        ids_NK,
        torch.where(finite_N[:, None], logsumexp_NT, 0.0),
        log_tail_NT,
        finite_N,
    )


def _largest(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values and their ids, ties by lower id. torch.topk leaves ties in any order."""
    one_more = min(k + 1, logits_NV.shape[1])
    values, ids = logits_NV.topk(one_more, dim=1)
    if one_more > k:
        tied_at_cut = values[:, k - 1] == values[:, k]
        values, ids = values[:, :k].contiguous(), ids[:, :k].contiguous()
        if tied_at_cut.any():  # rare in float32: sort those rows whole, stably
            rows = tied_at_cut.nonzero()[:, 0]
            whole, order = logits_NV[rows].sort(dim=1, descending=True, stable=True)
            values[rows], ids[rows] = whole[:, :k], order[:, :k]
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    if tied.any():  # by id first, then stably by value
        rows = tied.nonzero()[:, 0]
        by_id, order = ids[rows].sort(dim=1)
        by_value, order = values[rows].gather(1, order).sort(dim=1, descending=True, stable=True)
        values[rows], ids[rows] = by_value, by_id.gather(1, order)
    return values, ids


def _logsumexp(logits_NV: Tensor, temperature: float) -> Tensor:
    """logsumexp of logits/T in row blocks that stay in the processor's cache."""
    block = max(1, 2**20 // logits_NV.shape[1]) if logits_NV.device.type == "cpu" else len(logits_NV)
    parts = []
    for rows in logits_NV.split(max(block, 1)):
        largest = rows.amax(dim=1, keepdim=True)
        safe = torch.where(largest.isfinite(), largest, 0.0)  # a row of -inf alone sums to -inf, not to NaN
        total = ((rows - safe).mul_(1 / temperature)).exp_().sum(dim=1)
        parts.append(total.log_() + safe[:, 0] / temperature)
    return torch.cat(parts) if parts else logits_NV.new_zeros(0)
