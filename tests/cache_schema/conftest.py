"""A toy teacher and the caches made from it: every number is computed over the full vocabulary, none is invented."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema.manifest import Manifest, vocabulary_sha256
from cache_schema.schema import CacheRow, QuarantinedExample, Status
from cache_schema.writer import CacheWriter


def log_sum_exp(values: np.ndarray) -> np.ndarray:
    """Of the last axis, in float64."""
    top = values.max(axis=-1, keepdims=True)
    return (top + np.log(np.exp(values - top).sum(axis=-1, keepdims=True)))[..., 0]


@dataclass
class Toy:
    """A cache of `examples` examples; example i is a function of i and `seed` alone."""

    examples: int = 7
    shard_examples: int = 3
    top_k: int = 8
    vocab_size: int = 40
    temperatures: tuple[float, ...] = (1.0, 2.5)
    step: float = 1 / 64
    store_ids: bool = True
    selector: str = "topk"
    codec: str = "fine"
    seed: int = 0
    max_positions: int = 6
    quarantined: dict[int, str] = field(default_factory=dict)  # example -> reason
    provenance: dict[str, Any] = field(default_factory=lambda: {"recipe": "toy", "device": "cpu"})

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "schema_version": 2,
            "teacher": {"model": "toy", "seed": self.seed},
            "cache": {"top_k": self.top_k, "temperatures": list(self.temperatures), "step": self.step},
        }

    @property
    def vocabulary(self) -> list[str | None]:
        return [f"w{i}" if i % 7 else None for i in range(self.vocab_size)]

    @property
    def manifest(self) -> Manifest:
        return Manifest.create(
            identity=self.identity,
            provenance=self.provenance,
            selector=self.selector,
            top_k=self.top_k,
            vocab_size=self.vocab_size,
            temperatures=self.temperatures,
            step=self.step,
            codec=self.codec,
            store_ids=self.store_ids,
            examples=self.examples,
            shard_examples=self.shard_examples,
            vocabulary_sha256=vocabulary_sha256(self.vocabulary),
        )

    def full_logits(self, example: int) -> np.ndarray:
        """[N, V] float32, with ties."""
        rng = np.random.default_rng([self.seed, example])
        positions = int(rng.integers(1, self.max_positions + 1))
        logits = rng.normal(0, 4, (positions, self.vocab_size))
        return np.where(rng.random(logits.shape) < 0.5, np.rint(logits * 4) / 4, logits).astype(np.float32)

    def row(self, example: int) -> CacheRow:
        """What a teacher hands to the writer for an example."""
        logits = self.full_logits(example)
        rng = np.random.default_rng([self.seed, example, 1])
        n = len(logits)
        order = np.argsort(-logits, axis=1, kind="stable").astype(np.int32)
        head, tail = order[:, : self.top_k], np.take_along_axis(logits, order[:, self.top_k :], axis=1)
        scaled = [logits.astype(np.float64) / t for t in self.temperatures]
        draws = None
        if self.selector == "sampled":
            cumulative = np.exp(scaled[0] - log_sum_exp(scaled[0])[:, None]).cumsum(axis=1)
            slices = (np.arange(self.top_k) + rng.random((n, self.top_k))) / self.top_k * cumulative[:, -1:]
            drawn = [np.searchsorted(c, s, side="right") for c, s in zip(cumulative, slices, strict=True)]
            counts = np.stack([np.bincount(ids, minlength=self.vocab_size) for ids in drawn])
            ranked = np.take_along_axis(counts, order, axis=1)
            slots = np.argsort(ranked == 0, axis=1, kind="stable")[:, : self.top_k]  # drawn ids first, by rank
            draws = np.take_along_axis(ranked, slots, axis=1).astype(np.int32)
            drawn = np.take_along_axis(order, slots, axis=1)
            last = np.take_along_axis(drawn, np.count_nonzero(draws, axis=1)[:, None] - 1, axis=1)
            head, ids = np.where(draws > 0, drawn, last), np.where(draws > 0, drawn, 0)
        answer = "ab é🙂" * n
        ends = np.sort(rng.integers(0, len(answer) + 1, n))
        ends[-1] = len(answer)
        starts = np.concatenate([[0], ends[:-1]])
        starts[-1] = len(answer)
        status = np.where(np.arange(n) % 4 == 3, Status.NOT_FINITE, Status.USABLE).astype(np.uint8)
        top = np.take_along_axis(logits, head, axis=1)
        return CacheRow(
            example_id=f"toy-{example}",
            task="toy",
            prompt=f"What is {example}?\n\t次",
            answer=answer,
            answer_ids=rng.integers(0, self.vocab_size, n).astype(np.int32),
            answer_start=10 + example,
            answer_offsets=np.stack([starts, ends], axis=1).astype(np.int32),
            status=status,
            top_logit=np.where(status == 0, top[:, 0], np.nan).astype(np.float32),
            logits=np.where(status[:, None] == 0, top, np.nan).astype(np.float32),
            token_ids=(head if draws is None else ids) if self.store_ids else None,
            draws=draws,
            logsumexp=np.stack([log_sum_exp(s) for s in scaled], axis=1).astype(np.float32),
            log_tail=np.stack([log_sum_exp(tail.astype(np.float64) / t) for t in self.temperatures], axis=1).astype(
                np.float32
            )
            if self.manifest.stores_tail
            else None,
        )

    def shard(self, shard: int) -> tuple[list[CacheRow], list[QuarantinedExample]]:
        """Rows and quarantined examples of a shard."""
        planned = self.manifest.examples_of(shard)
        rows = [self.row(i) for i in planned if i not in self.quarantined]
        bad = [QuarantinedExample(f"toy-{i}", "toy", self.quarantined[i], 4) for i in planned if i in self.quarantined]
        return rows, bad

    def writer(self, folder: Path) -> CacheWriter:
        return CacheWriter.open(folder, self.manifest, self.vocabulary)

    def commit(self, writer: CacheWriter, shard: int) -> Any:
        return writer.commit(shard, *self.shard(shard), {"device": "cpu"})

    def build(self, folder: Path) -> Path:
        """A sealed cache."""
        writer = self.writer(folder)
        for shard in writer.missing():
            self.commit(writer, shard)
        writer.seal()
        return folder


@pytest.fixture(scope="session")
def make_toy() -> Callable[..., Toy]:
    """`make_toy(top_k=4)`: a toy with these settings."""
    return Toy


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy()


@pytest.fixture
def cache(toy: Toy, tmp_path: Path) -> Path:
    """A sealed cache of the plain toy, free to be broken."""
    return toy.build(tmp_path / "cache")
