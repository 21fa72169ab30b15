"""Logits and ids to the integers of a data file and back, as FORMAT.md defines them. Pure numpy; called by `table`,
`shard` and `check`, and `usable_positions` by stage 1.

A logit becomes a *level*: how many steps it lies below the top one. With ids, a position is stored as a set of (id,
level) in the shard's order of ids, commonest first, and sorting finds its ranks again: the order of 256 ranks takes
210 bytes, and says nothing that the levels do not say but for ties. Without ids, levels are stored by rank.
Shapes: N positions, K ranks (or slots of a set, in whatever order), T temperatures, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_GAP = 2**24 - 1  # steps below the top
NEAR, FAR_STEPS = 4.0, 8  # `small`: full steps down to NEAR logits below the top, FAR_STEPS of them a level beyond
LISTED = 2  # an id that a shard holds as often is in `id_order`
STEP_BITS = 2  # of a difference between ranks; the largest number says that more of it is in `rank_excess`


@dataclass(frozen=True)
class Codec:
    """Logits to levels and back: `fine`, every rank to step / 2, or `small`, with a coarser tail.

    With a power-of-two step, `step * gap` is exact in float32, so `top_logit - step * gap` is one rounding in float32
    or float64 alike, in any language. Rank 0 is exact.
    """

    name: str
    step: float

    @property
    def near(self) -> int:
        """The last level at the full step."""
        return MAX_GAP if self.name == "fine" else max(FAR_STEPS, round(NEAR / self.step))

    @property
    def max_level(self) -> int:
        """No storable logit has a higher one."""
        return self.near + -(-(MAX_GAP - self.near) // FAR_STEPS)

    @property
    def low_bits(self) -> int:
        """Bits of a height that are noise, stored as they are: below one logit, where a position's levels end."""
        level = self.step if self.name == "fine" else FAR_STEPS * self.step
        return int(np.clip(np.log2(1 / level), 0, 8))

    def encode(self, top_logit_N: NDArray[np.float32], logits_NK: NDArray[np.float32]) -> NDArray[np.int32]:
        """[N, K] levels. The caller has checked `usable_positions`."""
        gap_NK = top_logit_N.astype(np.float64)[:, None] - logits_NK  # float64: exact for float32 near each other
        gap_NK /= self.step
        if self.name == "small":
            gap_NK = np.where(gap_NK <= self.near, gap_NK, self.near + (gap_NK - self.near) / FAR_STEPS)
        return np.rint(gap_NK, out=gap_NK).astype(np.int32)

    def decode(self, top_logit_N: NDArray[np.float32], level_NK: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """[N, K] logits of levels."""
        gap_NK = level_NK if self.name == "fine" else level_NK + (FAR_STEPS - 1) * np.maximum(level_NK - self.near, 0)
        return top_logit_N[:, None] - np.float32(self.step) * gap_NK.astype(np.float32)

    def bound(self, top_logit_N: NDArray[np.float32], logits_NK: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, K] how far these decoded logits may be from the raw ones, a float32 rounding aside."""
        far_NK = top_logit_N[:, None] - logits_NK > self.near * self.step
        return np.where(far_NK, np.float32(FAR_STEPS), np.float32(1)) * np.float32(self.step / 2)


def usable_positions(
    top_logit_N: NDArray[np.float32],
    logits_NK: NDArray[np.float32],
    logsumexp_NT: NDArray[np.float32],
    log_tail_NT: NDArray[np.float32] | None,
    step: float,
) -> NDArray[np.bool_]:
    """[N] whether the numbers of a position can be stored: all finite, no logit 2**24 steps or more below the top."""
    parts = [logits_NK, logsumexp_NT] + ([] if log_tail_NT is None else [log_tail_NT])
    finite_N = np.isfinite(top_logit_N)
    for part in parts:
        finite_N &= np.isfinite(part).all(axis=1)
    with np.errstate(invalid="ignore"):  # inf - inf, in a position that is already out
        spread_N = top_logit_N.astype(np.float64) - logits_NK.min(axis=1)
    usable_N: NDArray[np.bool_] = finite_N & ~(spread_N > step * MAX_GAP)
    return usable_N


def listed_ids(ids: Iterable[NDArray[np.int32]], vocab_size: int) -> NDArray[np.int32]:
    """The ids that occur LISTED times or more, commonest first, equally common ones by id."""
    counts_V = np.zeros(vocab_size, np.int64)
    for part in ids:
        counts_V += np.bincount(part.ravel(), minlength=vocab_size)
    often = np.flatnonzero(counts_V >= LISTED)
    return often[np.argsort(-counts_V[often], kind="stable")].astype(np.int32)


def order_of(listed: NDArray[np.int32], vocab_size: int) -> NDArray[np.int32]:
    """[V] the shard's order of ids: those listed, then all others by id. ValueError unless that is each id once."""
    if len(listed) and not (listed.min() >= 0 and listed.max() < vocab_size):
        raise ValueError(f"id_order runs from {listed.min()} to {listed.max()}, expected 0 to {vocab_size - 1}")
    others_V = np.ones(vocab_size, np.bool_)
    others_V[listed] = False
    order_V = np.concatenate([listed, np.flatnonzero(others_V).astype(np.int32)])
    if len(order_V) != vocab_size:
        raise ValueError("id_order has an id twice")
    return order_V


def places_of(order_V: NDArray[np.int32]) -> NDArray[np.int32]:
    """[V] the place of each id in an order: its inverse."""
    place_V = np.empty_like(order_V)
    place_V[order_V] = np.arange(len(order_V), dtype=np.int32)
    return place_V


@dataclass(frozen=True)
class Slots:
    """N positions as sets: ids in the order of their places, each with its height above the position's last level.

    A byte of `packed_NK` has the step from the place before in its low half and the height without its low bits in its
    high half; what does not fit is in the excess. Together they compress to 79 bytes of 256 slots, apart to 85.
    """

    packed_NK: NDArray[np.uint8]
    id_excess: NDArray[np.int32]
    height_low_NK: NDArray[np.uint8]
    height_excess: NDArray[np.int32]
    draws_NK: NDArray[np.int32] | None


def encode_set(
    level_NK: NDArray[np.int32],
    ids_NK: NDArray[np.int32],
    draws_NK: NDArray[np.int32] | None,
    place_V: NDArray[np.int32],
    low_bits: int,
) -> Slots:
    """Slots from levels, ids and draws by rank. A slot without draws shares the last place and the last level."""
    place_NK = place_V[ids_NK]
    if draws_NK is not None:
        drawn_NK = draws_NK > 0
        place_NK = np.where(drawn_NK, place_NK, (place_NK * drawn_NK).max(axis=1, keepdims=True))
    key_NK = place_NK.astype(np.int64) << 32 | np.arange(level_NK.shape[1])
    key_NK.sort(axis=1)
    slot_NK = key_NK & (2**32 - 1)
    step_NK = np.diff(key_NK >> 32, axis=1, prepend=0).astype(np.int32)
    height_NK = np.take_along_axis(level_NK.max(axis=1, keepdims=True) - level_NK, slot_NK, axis=1)
    high_NK = height_NK >> low_bits
    return Slots(
        (np.minimum(step_NK, 15) | np.minimum(high_NK, 15) << 4).astype(np.uint8),
        step_NK[step_NK >= 15] - 15,
        (height_NK & (2**low_bits - 1)).astype(np.uint8),
        high_NK[high_NK >= 15] - 15,
        None if draws_NK is None else np.take_along_axis(draws_NK, slot_NK, axis=1),
    )


def heights(
    packed_NK: NDArray[np.uint8], low_NK: NDArray[np.uint8], excess: NDArray[np.int32], low_bits: int
) -> NDArray[np.int32]:
    """[N, K] heights of slots. ValueError where the excess is not one number for each that did not fit."""
    return unpacked("height_excess", packed_NK >> 4, 15, excess) << low_bits | low_NK


def unpacked(name: str, part_NK: NDArray[np.integer[Any]], most: int, excess: NDArray[np.int32]) -> NDArray[np.int32]:
    """[N, K] numbers of which `part_NK` has what is below `most`."""
    whole_NK = part_NK.astype(np.int32)
    more_NK = part_NK == most
    if np.count_nonzero(more_NK) != len(excess):
        raise ValueError(f"{name} has {len(excess)} numbers, expected {np.count_nonzero(more_NK)}")
    whole_NK[more_NK] += excess
    return whole_NK


def decode_set(
    step_NK: NDArray[np.int32],
    height_NK: NDArray[np.int32],
    draws_NK: NDArray[np.int32] | None,
    order_V: NDArray[np.int32],
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32] | None]:
    """[N, K] each, by rank: levels, ids (equal levels by lower id) and draws. A slot without draws comes last, id 0.

    Raises ValueError where a place is outside the vocabulary; the caller has checked that nothing is negative.
    """
    place_NK = np.cumsum(step_NK, axis=1, dtype=np.int64)
    if place_NK.size and place_NK[:, -1].max() >= len(order_V):
        raise ValueError(f"slots lead to place {place_NK[:, -1].max()}, expected 0 to {len(order_V) - 1}")
    ids_NK = order_V[place_NK]
    level_NK = height_NK.max(axis=1, keepdims=True) - height_NK
    if draws_NK is None:
        key_NK = level_NK.astype(np.int64) << 31 | ids_NK
        key_NK.sort(axis=1)  # both numbers in one: 3 times as fast as sorting places and taking along
        return key_NK >> 31, (key_NK & (2**31 - 1)).astype(np.int32), None
    key_NK = level_NK.astype(np.int64) << 31 | np.where(draws_NK > 0, ids_NK, len(order_V))
    rank_NK = np.argsort(key_NK, axis=1, kind="stable")
    level_NK, ids_NK, draws_NK = (np.take_along_axis(x, rank_NK, axis=1) for x in (level_NK, ids_NK, draws_NK))
    return level_NK.astype(np.int64), np.where(draws_NK > 0, ids_NK, np.int32(0)), draws_NK


def encode_ranks(level_NK: NDArray[np.int32]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """[N, H] differences from rank to rank, four in a byte, and [M] what of them did not fit.

    Byte j has ranks j, j + H, j + 2H and j + 3H, H = K / 4 rounded up: zstd then sees four scales at once. A list of
    plain differences takes 87 bytes of 256 ranks where this takes 70, since zstd finds matches that cost more than
    they save (`benchmarks/cache_bytes.py`).
    """
    n, k = level_NK.shape
    most = 2**STEP_BITS - 1
    width = -(-k * STEP_BITS // 8)
    step_NK = np.diff(level_NK, axis=1, prepend=level_NK[:, :1])
    part = np.zeros((n, 8 // STEP_BITS * width), np.uint8)
    part[:, :k] = np.minimum(step_NK, most)
    shift = np.arange(0, 8, STEP_BITS, dtype=np.uint8)[:, None]
    packed_NH = np.bitwise_or.reduce(part.reshape(n, -1, width) << shift, axis=1)
    return packed_NH, step_NK[step_NK >= most] - most


def decode_ranks(packed_NH: NDArray[np.uint8], excess: NDArray[np.int32], k: int) -> NDArray[np.int64]:
    """[N, K] levels by rank. ValueError where the excess is not one number for each difference that did not fit."""
    most = 2**STEP_BITS - 1
    shift = np.arange(0, 8, STEP_BITS, dtype=np.uint8)[:, None]
    part_NK = ((packed_NH[:, None] >> shift) & most).reshape(len(packed_NH), -1)[:, :k]
    return unpacked("rank_excess", part_NK, most, excess).cumsum(axis=1, dtype=np.int64)
