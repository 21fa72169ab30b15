"""The invariants of a row, as FORMAT.md states them. Called by the writer, before, and by `verify`, after.

A row that breaks one is never written, and a shard that holds one is bad, whatever its checksums say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.bounds import GROUP_TEXT_BYTES, MAX_ROW_VALUES, text_bytes, widest
from cache_schema.codec import Codec, usable_positions
from cache_schema.manifest import Manifest
from cache_schema.schema import CacheRow, Status

# The normalisers are computed in float32 by the teacher and compared with sums over K logits here: the bound below
# is for those roundings. What it must catch (a wrong temperature, base-2 logarithms, a shifted row) is far larger.
NORMALISER_TOLERANCE = 1e-3

# Of K slices of the cumulative probability, an id of probability p covers more than K p - 2 whole ones, each of which
# draws it, and parts of two more.
MAX_DRAWS_ERROR = 2


def problem_of(row: CacheRow, manifest: Manifest, *, decoded: bool) -> str | None:
    """The first invariant that a row breaks, in words; None when it is sound.

    `decoded`: the logits went through the codec, so the normalisers agree with them to within its bound more.
    """
    return (
        _text_problem(row)
        or _shape_problem(row, manifest)
        or _position_problem(row, manifest)
        or _numbers_problem(row, manifest, decoded)
    )


def _text_problem(row: CacheRow) -> str | None:
    for name in ("example_id", "task", "prompt", "answer"):
        value = getattr(row, name)
        if not isinstance(value, str):
            return f"{name} is a {type(value).__name__}, expected text"
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"{name} is not valid Unicode (a lone surrogate)"
    if text_bytes(row) > GROUP_TEXT_BYTES:
        return f"its text takes {text_bytes(row)} bytes, expected {GROUP_TEXT_BYTES} at most"
    return None if row.example_id else "example_id is empty"


def _shape_problem(row: CacheRow, manifest: Manifest) -> str | None:
    n, k, t = len(row.answer_ids), manifest.top_k, len(manifest.temperatures)
    if n == 0:
        return "no positions; an example without an answer token is quarantined, not written"
    if n * widest(manifest) > MAX_ROW_VALUES:
        return f"{n} positions of {widest(manifest)} numbers, expected {MAX_ROW_VALUES} numbers in all at most"
    expected: dict[str, tuple[type[np.generic], tuple[int, ...]] | None] = {
        "answer_ids": (np.int32, (n,)),
        "answer_offsets": (np.int32, (n, 2)),
        "status": (np.uint8, (n,)),
        "top_logit": (np.float32, (n,)),
        "logits": (np.float32, (n, k)),
        "token_ids": (np.int32, (n, k)) if manifest.store_ids else None,
        "draws": (np.int32, (n, k)) if manifest.sampled else None,
        "logsumexp": (np.float32, (n, t)),
        "log_tail": (np.float32, (n, t)) if manifest.stores_tail else None,
    }
    for name, want in expected.items():
        value = getattr(row, name)
        found = (value.dtype, value.shape) if isinstance(value, np.ndarray) else value
        if found != want:
            return f"{name} is {_described(found)}, expected {_described(want)}"
    return None


def _described(array: Any) -> str:
    """(float32, (5, 8)) as `float32[5, 8]`; anything else by its type."""
    if isinstance(array, tuple):
        return f"{np.dtype(array[0])}{list(array[1])}"
    return "None" if array is None else type(array).__name__


def _position_problem(row: CacheRow, manifest: Manifest) -> str | None:
    if not 0 <= row.answer_start < 2**31:
        return f"answer_start is {row.answer_start}, expected an index into the teacher input"
    if row.answer_ids.min() < 0 or row.answer_ids.max() >= manifest.vocab_size:
        return f"answer_ids run from {row.answer_ids.min()} to {row.answer_ids.max()}, vocabulary {manifest.vocab_size}"
    if row.status.max() > max(Status):
        return f"status {row.status.max()} is unknown"
    start_N, end_N = row.answer_offsets[:, 0], row.answer_offsets[:, 1]
    if start_N.min() < 0 or end_N.max() > len(row.answer) or (start_N > end_N).any():
        return f"answer_offsets leave the answer text of {len(row.answer)} code points, or end before they start"
    if (np.diff(start_N) < 0).any() or (np.diff(end_N) < 0).any():
        return "answer_offsets go backwards"
    return None


def _numbers_problem(row: CacheRow, manifest: Manifest, decoded: bool) -> str | None:
    usable_N = row.status == Status.USABLE
    at = np.flatnonzero(usable_N)  # to name the position in the row

    def first(bad_M: NDArray[np.bool_], what: str) -> str | None:
        return f"position {at[bad_M.argmax()]}: {what}" if bad_M.any() else None

    top_M, logits_MK, lse_MT = row.top_logit[usable_N], row.logits[usable_N], row.logsumexp[usable_N]
    ids_MK = None if row.token_ids is None else row.token_ids[usable_N]
    draws_MK = None if row.draws is None else row.draws[usable_N]
    tail_MT = None if row.log_tail is None else row.log_tail[usable_N]
    if not len(at):
        return None
    error_MK = Codec(manifest.codec, manifest.step).bound(top_M, logits_MK) if decoded else np.zeros((1, 1))
    return (
        first(
            ~usable_positions(top_M, logits_MK, lse_MT, tail_MT, manifest.step),
            "a number that is not finite, or too far below the top logit, in a position marked usable",
        )
        or first(top_M != logits_MK[:, 0], "top_logit is not the logit of rank 0")
        or first((np.diff(logits_MK) > 0).any(axis=1), "logits are not sorted, largest first")
        or (None if draws_MK is None else _slots_problem(ids_MK, logits_MK, draws_MK, first))
        or (None if ids_MK is None else _ids_problem(ids_MK, logits_MK, draws_MK, manifest, decoded, first))
        or (
            _normaliser_problem(logits_MK, error_MK, lse_MT, tail_MT, manifest, first)
            if draws_MK is None
            else _probability_problem(logits_MK, error_MK, draws_MK, lse_MT, manifest, first)
        )
    )


def _slots_problem(ids_MK: Any, logits_MK: NDArray[np.float32], draws_MK: NDArray[np.int32], first: Any) -> str | None:
    """A position has K draws; slots left over come last, with id 0 and the logit before them."""
    left_MK = draws_MK == 0
    problem: str | None = first((draws_MK < 0).any(axis=1), "a negative number of draws")
    problem = problem or first(draws_MK.sum(axis=1) != draws_MK.shape[1], f"draws are not {draws_MK.shape[1]} in all")
    problem = problem or first((left_MK[:, :-1] & ~left_MK[:, 1:]).any(axis=1), "a slot without draws before one with")
    like_MK = (ids_MK[:, 1:] == 0) & (logits_MK[:, 1:] == logits_MK[:, :-1])
    return problem or first((left_MK[:, 1:] & ~like_MK).any(axis=1), "a slot without draws has numbers of its own")


def _ids_problem(
    ids_MK: NDArray[np.int32],
    logits_MK: NDArray[np.float32],
    draws_MK: NDArray[np.int32] | None,
    manifest: Manifest,
    decoded: bool,
    first: Any,
) -> str | None:
    outside_M = (ids_MK.min(axis=1) < 0) | (ids_MK.max(axis=1) >= manifest.vocab_size)
    problem: str | None = first(outside_M, f"a token id outside the vocabulary of {manifest.vocab_size}")
    if draws_MK is not None:  # slots left over get ids of their own, in order
        ids_MK = np.where(draws_MK > 0, ids_MK, manifest.vocab_size + np.arange(ids_MK.shape[1]))
    problem = problem or first((np.diff(np.sort(ids_MK, axis=1)) == 0).any(axis=1), "a token id twice")
    if problem is None and not decoded:  # levels far apart can round to the same float32
        swapped_MK = (np.diff(logits_MK) == 0) & (np.diff(ids_MK) < 0)
        problem = first(swapped_MK.any(axis=1), "equal logits are not ordered by lower id")
    return problem


def _normaliser_problem(
    logits_MK: NDArray[np.float32],
    error_MK: NDArray[Any],
    lse_MT: NDArray[np.float32],
    tail_MT: NDArray[np.float32] | None,
    manifest: Manifest,
    first: Any,
) -> str | None:
    """log(exp(head) + exp(log_tail)) is logsumexp: ties logits, temperatures and both normalisers together."""
    for i, temperature in enumerate(manifest.temperatures):
        lse_M = lse_MT[:, i].astype(np.float64)
        bounds = []
        for error in (-error_MK, error_MK):
            total_M = _log_sum((logits_MK.astype(np.float64) + error) / temperature)
            bounds.append(total_M if tail_MT is None else np.logaddexp(total_M, tail_MT[:, i].astype(np.float64)))
        tolerance_M = _tolerance(lse_M)
        what = f"at temperature {temperature}, logsumexp is not that of the top K and log_tail together"
        problem: str | None = first((lse_M < bounds[0] - tolerance_M) | (lse_M > bounds[1] + tolerance_M), what)
        if problem is not None:
            return problem
    return None


def _probability_problem(
    logits_MK: NDArray[np.float32],
    error_MK: NDArray[Any],
    draws_MK: NDArray[np.int32],
    lse_MT: NDArray[np.float32],
    manifest: Manifest,
    first: Any,
) -> str | None:
    """The drawn ids have no more than probability 1 together, and each has the draws that its own stands for."""
    drawn_MK, total = draws_MK > 0, draws_MK.shape[1]
    for i, temperature in enumerate(manifest.temperatures):
        lse_M = lse_MT[:, i].astype(np.float64)
        away_MK = _tolerance(lse_M)[:, None] + error_MK / temperature
        log_p_MK = logits_MK.astype(np.float64) / temperature - lse_M[:, None]
        sum_M = np.where(drawn_MK, np.exp(log_p_MK - away_MK), 0).sum(axis=1)
        what = f"at temperature {temperature}, the drawn ids have a probability above 1 together"
        problem: str | None = first(sum_M > 1, what)
        if problem is None and i == 0:  # the temperature that they were drawn at
            low_MK, high_MK = (total * np.exp(log_p_MK + sign * away_MK) for sign in (-1, 1))
            off_MK = (draws_MK < low_MK - MAX_DRAWS_ERROR) | (draws_MK > high_MK + MAX_DRAWS_ERROR)
            what = f"at temperature {temperature}, an id was drawn more or less often than its probability allows"
            problem = first((drawn_MK & off_MK).any(axis=1), what)
        if problem is not None:
            return problem
    return None


def _tolerance(lse_M: NDArray[np.float64]) -> NDArray[np.float64]:
    return NORMALISER_TOLERANCE * np.maximum(1, np.abs(lse_M) / 100)


def _log_sum(scaled_MK: NDArray[np.float64]) -> NDArray[np.float64]:
    """[M] log of the sum of exponentials; rank 0 is about the largest, so none overflows."""
    top_M1 = scaled_MK[:, :1]
    total_M: NDArray[np.float64] = top_M1[:, 0] + np.log(np.exp(scaled_MK - top_M1).sum(axis=1))
    return total_M
