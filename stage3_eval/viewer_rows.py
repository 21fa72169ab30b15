"""One answer of the token viewer: what the teacher and the student expected at every token. Called by `viewer`.

Pure: from a row of the cache and logits to plain JSON. Row t of both predicts answer token t. Shapes: N the teacher's
positions, M the student's, K the teacher's kept logits, V the student's vocabulary.

**Disagreement** is half the L1 distance of two distributions over K + 1 buckets, the teacher's K kept ids and all
others: 0 where they are the same, 1 where they share nothing. Where a token id does not mean the same to both, the
buckets are ranks in place of ids: then it compares how sure the two are, not what they are sure of.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.manifest import Manifest
from cache_schema.schema import CacheRow, Status
from pipeline.alignment import NONE, align

SHOWN = 6  # candidates of a position
Floats = NDArray[np.float64]
Name = Callable[[int], str]


def temperature_of(manifest: Manifest) -> tuple[int, float]:
    """Which of the cache's temperatures is shown, 1 where it is there, and where it stands."""
    column = manifest.temperatures.index(1.0) if 1.0 in manifest.temperatures else 0
    return column, manifest.temperatures[column]


def teacher_probabilities(row: CacheRow, manifest: Manifest) -> tuple[Floats, Floats]:
    """[N, K] of the kept ids (0 in a slot left over) and [N] of all others, at the shown temperature."""
    column, temperature = temperature_of(manifest)
    p_NK = np.exp(row.logits.astype(np.float64) / temperature - row.logsumexp[:, column, None])
    if row.draws is not None:
        p_NK = np.where(row.draws > 0, p_NK, 0.0)
        return p_NK, np.clip(1.0 - p_NK.sum(1), 0.0, 1.0)
    if row.log_tail is None:
        return p_NK, np.zeros(len(p_NK))
    return p_NK, np.exp(row.log_tail[:, column].astype(np.float64) - row.logsumexp[:, column])


def student_probabilities(logits_MV: NDArray[np.float32], temperature: float) -> Floats:
    """[M, V] softmax."""
    scaled_MV = logits_MV.astype(np.float64) / temperature
    p_MV = np.exp(scaled_MV - scaled_MV.max(1, keepdims=True))
    return np.asarray(p_MV / p_MV.sum(1, keepdims=True))


def disagreement(p_K: Floats, p_tail: float, q_V: Floats, ids_K: NDArray[np.integer] | None) -> float:
    """See above; by rank where there are no ids. Between 0 and 1."""
    k = min(len(p_K), len(q_V))
    if ids_K is not None:
        inside_K = ids_K < len(q_V)
        q_K = np.where(inside_K, q_V[np.where(inside_K, ids_K, 0)], 0.0)
        kept = p_K > 0.0  # a slot left over by drawing has no id of its own
        p_K, q_K = p_K[kept], q_K[kept]
    else:
        q_K = np.zeros(len(p_K))
        q_K[:k] = -np.sort(np.partition(-q_V, k - 1)[:k])
    others = abs(p_tail - max(0.0, 1.0 - float(q_K.sum())))
    return float(min(1.0, 0.5 * (np.abs(p_K - q_K).sum() + others)))


class Answer:
    """The answer of one cached example, read by both. same_tokens: an id means the same to both, and the answer has
    the same ids. offsets_M2: the student's. Raises nothing: a position that the teacher cannot be used at has a status.
    """

    def __init__(self, row: CacheRow, manifest: Manifest, offsets_M2: NDArray[np.integer], same_tokens: bool) -> None:
        self.row, self.manifest, self.same_tokens, self.offsets_M2 = row, manifest, same_tokens, offsets_M2
        self.p_NK, self.tail_N = teacher_probabilities(row, manifest)
        self.pairs = {"boundary": align("boundary", row.answer_offsets, offsets_M2, same_tokens)}
        if not same_tokens:
            self.pairs["index"] = align("index", row.answer_offsets, offsets_M2)

    @property
    def ids(self) -> NDArray[np.int32] | None:
        """[N, K] the ids to compare by, None where ranks are compared."""
        return self.row.token_ids if self.same_tokens else None

    def disagreements(self, q_MV: Floats) -> list[float | None]:
        """[M] None where the position has no teacher, or one that cannot be used."""
        found: list[float | None] = []
        for q_V, n in zip(q_MV, self.pairs["boundary"], strict=True):
            usable = n != NONE and self.row.status[n] == Status.USABLE and (self.ids is not None or not self._drawn)
            ids_K = self.ids[n] if usable and self.ids is not None else None
            found.append(disagreement(self.p_NK[n], float(self.tail_N[n]), q_V, ids_K) if usable else None)
        return found

    @property
    def _drawn(self) -> bool:
        return self.row.draws is not None

    def teacher(self, name: Name) -> list[dict[str, Any]]:
        """[N] each position's token, status and first candidates; `name` says the text of an id."""
        positions = []
        for n, (start, end) in enumerate(self.row.answer_offsets.tolist()):
            status = Status(int(self.row.status[n]))
            position: dict[str, Any] = {"start": start, "end": end, "id": int(self.row.answer_ids[n])}
            if status is not Status.USABLE:
                positions.append({**position, "status": status.reason})
                continue
            order = np.argsort(-self.p_NK[n], kind="stable")[:SHOWN]
            ids = self.row.token_ids[n][order].tolist() if self.row.token_ids is not None else None
            positions.append(
                {
                    **position,
                    "status": "usable",
                    "p": _rounded(self.p_NK[n][order]),
                    "others": _rounded([self.tail_N[n] + self.p_NK[n].sum() - self.p_NK[n][order].sum()])[0],
                    "names": [name(i) for i in ids] if ids is not None else None,
                    "ids": ids,
                }
            )
        return positions

    def student(self, q_MV: Floats, target_M: Sequence[int], name: Name) -> dict[str, Any]:
        """What one condition of the student expected: of each position its disagreement, the probability of the token
        that came, its own first candidates, and what it gives to the teacher's where ids mean the same."""
        positions = []
        for m, (q_V, of) in enumerate(zip(q_MV, self.disagreements(q_MV), strict=True)):
            top = np.argsort(-q_V, kind="stable")[:SHOWN]
            position: dict[str, Any] = {
                "disagreement": None if of is None else round(of, 4),
                "target": _rounded([q_V[target_M[m]]])[0],
                "names": [name(int(i)) for i in top],
                "p": _rounded(q_V[top]),
            }
            n = self.pairs["boundary"][m]
            if self.ids is not None and self.row.status[n] == Status.USABLE:
                order = np.argsort(-self.p_NK[n], kind="stable")[:SHOWN]
                ids = self.ids[n][order]
                position["at"] = _rounded([q_V[i] if i < len(q_V) else 0.0 for i in ids])
            positions.append(position)
        return {"mean": mean_of([p["disagreement"] for p in positions]), "positions": positions}


def mean_of(values: Sequence[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]
