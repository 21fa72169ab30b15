"""The order of training: a pure function, so its properties are checked on whatever Hypothesis thinks of."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stage2_student.order import batch_indices, order, rank_slice, seed_of

sizes = st.integers(1, 300)
small = st.integers(1, 40)


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 5), n=sizes, block=small, window=small)
def test_every_epoch_is_a_permutation(seed: int, epoch: int, n: int, block: int, window: int) -> None:
    assert sorted(order(seed, epoch, n, block, window).tolist()) == list(range(n))


@given(seed=st.integers(0, 99), n=sizes, block=small, window=small)
def test_a_window_reads_no_more_than_its_blocks(seed: int, n: int, block: int, window: int) -> None:
    whole = order(seed, 0, n, block, window)
    blocks_seen: list[set[int]] = [set()]
    for example in whole.tolist():  # greedily: a window ends where one block too many would be needed
        if len(blocks_seen[-1] | {example // block}) > window:
            blocks_seen.append(set())
        blocks_seen[-1].add(example // block)
    assert not any(a & b for i, a in enumerate(blocks_seen) for b in blocks_seen[i + 1 :])


@given(seed=st.integers(0, 99), n=st.integers(1, 60), batch_size=st.integers(1, 70), steps=st.integers(1, 6))
def test_batches_are_slices_of_the_concatenated_epochs(seed: int, n: int, batch_size: int, steps: int) -> None:
    batches = np.concatenate([batch_indices(step, batch_size, n, seed, 8, 2) for step in range(steps)])
    epochs = np.concatenate([order(seed, epoch, n, 8, 2) for epoch in range(steps * batch_size // n + 1)])
    assert batches.tolist() == epochs[: steps * batch_size].tolist()


@given(batch=st.lists(st.integers()), ranks=st.integers(1, 9))
def test_ranks_share_a_batch_without_changing_it(batch: list[int], ranks: int) -> None:
    slices = [rank_slice(batch, rank, ranks) for rank in range(ranks)]
    assert [example for part in slices for example in part] == batch
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_the_order_itself_never_changes() -> None:
    """Golden values: a resumed run trains on the same batches after any upgrade."""
    assert order(0, 0, 10).tolist() == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]
    assert order(7, 1, 9, 2, 2).tolist() == [1, 0, 8, 7, 2, 3, 6, 5, 4]
    assert seed_of("dropout", 0, 1, 2, 3) == 3619757380586056170


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(order(seed, epoch, 50).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_neighbours_are_spread() -> None:
    """4,096 examples of two tasks, one after the other: a batch of 32 has both (16 on average)."""
    share = [np.mean(batch_indices(step, 32, 4096, seed=0) < 2048) for step in range(128)]
    assert 0.45 < np.mean(share) < 0.55
    assert np.mean([0 < s < 1 for s in share]) > 0.9
