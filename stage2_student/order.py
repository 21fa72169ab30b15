"""Which examples a training step sees: pure functions of the seed and the step. Called by `train`.

The whole state of the data loader is one integer, the step. Step b trains on examples b*B .. (b+1)*B of the epochs'
orders laid end to end, whatever the number of processes, and however often the run was stopped in between.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

BLOCK = 256  # examples that lie together in the cache and are read together
WINDOW = 8  # blocks that are mixed; 2,048 decoded examples at most are in use at a time

T = TypeVar("T")


@lru_cache(maxsize=2)  # a step asks for one epoch, or for two where one ends
def order(seed: int, epoch: int, n: int, block: int = BLOCK, window: int = WINDOW) -> NDArray[np.int64]:
    """The order of examples 0..n-1 in one epoch, a permutation int64[n], read-only.

    Blocks of `block` neighbours are shuffled, and the examples inside each `window` consecutive blocks of that order
    are shuffled among themselves. So a window reads `window` stretches of the cache and no more, while neighbours in
    the cache (one task's examples, say) end up far apart.

    RandomState over MT19937 is frozen by NumPy's policy (NEP 19): the order never changes with a NumPy release.
    """
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
    blocks = random.permutation(-(-n // block))
    windows = [
        np.concatenate([np.arange(b * block, min((b + 1) * block, n)) for b in blocks[start : start + window]])
        for start in range(0, len(blocks), window)
    ]
    for mixed in windows:
        random.shuffle(mixed)
    whole = np.concatenate(windows)
    whole.flags.writeable = False
    return whole


def batch_indices(
    step: int, batch_size: int, n: int, seed: int, block: int = BLOCK, window: int = WINDOW
) -> NDArray[np.int64]:
    """The global batch of a step, int64[batch_size]: that slice of the concatenated epochs over n examples."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // n
    return np.concatenate(
        [order(seed, int(epoch), n, block, window)[places[epochs == epoch] % n] for epoch in np.unique(epochs)]
    )


def rank_slice(batch: Sequence[T], rank: int, ranks: int) -> Sequence[T]:
    """One process's part of a global batch. Parts differ by one example at most and may be empty."""
    return batch[rank * len(batch) // ranks : (rank + 1) * len(batch) // ranks]


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed from anything that names a random draw, such as ("dropout", seed, step, micro-batch, rank)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
