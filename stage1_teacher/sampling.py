"""Drawing the ids of a position instead of keeping its largest: pure functions. Called by the capture loop.

Sparse Logit Sampling (Anshumann et al., ACL 2025, arXiv 2503.16870): ids drawn from the teacher's own softmax p, each
counted d_i times among K draws, estimate the whole distribution without bias, E[d_i / K] = p_i, where the K largest
cannot. The paper draws independently. Here draw k comes from slice [k / K, (k + 1) / K) of the cumulative probability:
as unbiased, for the slices cover the whole once, and no sum over ids has a larger variance (stratified sampling with
equal strata). A head's count then hardly varies; the same K goes further (benchmarks/sampled_bias.py).

Shape suffixes: N positions, V vocabulary, K draws and hence slots, T temperatures.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stage1_teacher.topk import TopK


def uniforms(seed: int, task: str, example_id: str, positions: int, draws: int) -> NDArray[np.float64]:
    """[positions, draws] numbers in [0, 1), multiples of 2**-40: a function of (seed, example, position) alone.

    Position t has places t * draws and on of a counter-based stream (Philox, Salmon et al. 2011) whose key is a hash of
    the seed and the example, made by the CPU. So neither batches, shards, order, processes nor device reach the draws.
    """
    key = hashlib.sha256(f"{seed}\0{task}\0{example_id}".encode()).digest()
    stream = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8"))
    bits: NDArray[np.uint64] = stream.random_raw(positions * draws) >> np.uint64(24)
    return bits.reshape(positions, draws).astype(np.float64) * 2.0**-40


def sample(logits_NV: Tensor, uniforms_NK: NDArray[np.float64], temperatures: Sequence[float]) -> TopK:
    """Draw K ids of every position from softmax(logits / temperatures[0]); one uniform number decides each draw.

    logits_NV: float32, untouched. Drawn ids come first, by logit, equal ones by lower id, with `draws_NK` that sum to
    K; slots left over have draws 0, id 0 and the last logit. There is no tail: its ids have their share of the draws.

    The cumulative sums are float64. Float32 ones would be off by 6e-8, more than most of 151,936 ids have: those before
    a rounding up would never be drawn, their neighbours too often.
    """
    count = uniforms_NK.shape[1]
    slices_NK = torch.from_numpy((np.arange(count) + uniforms_NK) / count).to(logits_NV.device)
    block = max(1, 2**20 // logits_NV.shape[1]) if logits_NV.device.type == "cpu" else max(len(logits_NV), 1)
    parts = [_draw(*rows, temperatures) for rows in zip(logits_NV.split(block), slices_NK.split(block), strict=True)]
    ids_NK, logsumexp_NT, finite_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return _in_slots(logits_NV, ids_NK, logsumexp_NT, finite_N)


def _draw(logits_NV: Tensor, slices_NK: Tensor, temperatures: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_NK, ascending and with repeats, logsumexp_NT, finite_N) of a block of rows that stays in the cache."""
    largest_N1 = logits_NV.amax(dim=1, keepdim=True).double()
    finite_N = largest_N1[:, 0].isfinite()
    below_NV = torch.where(finite_N[:, None], logits_NV.double() - largest_N1, 0.0)
    sums = []
    for i, temperature in enumerate(temperatures):
        weight_NV = (below_NV / temperature).exp_()
        if i == 0:
            cumulative_NV = weight_NV.cumsum(dim=1)
            total_N1 = cumulative_NV[:, -1:]
            # The first id whose cumulative sum exceeds the draw: never one of probability 0.
            ids_NK = torch.searchsorted(cumulative_NV, slices_NK * total_N1, right=True)
            sums.append(total_N1)
        else:
            sums.append(weight_NV.sum(dim=1, keepdim=True))
    logsumexp_NT = torch.cat(sums, dim=1).log() + largest_N1 / largest_N1.new_tensor(temperatures)
    return ids_NK, torch.where(finite_N[:, None], logsumexp_NT, 0.0).float(), finite_N


def _in_slots(logits_NV: Tensor, ids_NK: Tensor, logsumexp_NT: Tensor, finite_N: Tensor) -> TopK:
    """Equal ids share a slot, slots go by logit."""
    new_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    new_NK[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :-1]
    slot_NK = new_NK.cumsum(dim=1) - 1
    draws_NK = torch.zeros_like(ids_NK).scatter_add_(1, slot_NK, torch.ones_like(ids_NK))
    distinct_NK = torch.zeros_like(ids_NK).scatter_(1, slot_NK, ids_NK)  # of equal indices all write the same
    values_NK = torch.where(draws_NK > 0, logits_NV.gather(1, distinct_NK), -torch.inf)
    values_NK, order_NK = values_NK.sort(dim=1, descending=True, stable=True)  # stable: ids ascend in equal logits
    draws_NK = draws_NK.gather(1, order_NK)
    last_N1 = values_NK.gather(1, (draws_NK > 0).sum(dim=1, keepdim=True) - 1)
    values_NK = torch.where(draws_NK > 0, values_NK, last_N1)
    return TopK(
        torch.where(finite_N[:, None], values_NK, 0.0),
        distinct_NK.gather(1, order_NK),
        logsumexp_NT,
        None,
        finite_N,
        draws_NK,
    )
