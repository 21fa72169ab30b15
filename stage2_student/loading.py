"""The micro-batches of one process, a step ahead of the training. Called by `train`."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from pipeline.sections import Train
from stage2_student.batches import Batch, Collator
from stage2_student.group import CONTAINED
from stage2_student.order import batch_indices, rank_slice
from stage2_student.usable import Usable


def loader(
    collator: Collator, usable: Usable, settings: Train, seed: int, rank: int, ranks: int
) -> Callable[[int], list[Batch]]:
    """What gives one process its micro-batches of a step: a pure function of the step, so it can run ahead in a
    thread, and the processes' parts together are the same global batch however many they are."""

    def load(step: int) -> list[Batch]:
        batch = batch_indices(step, settings.batch_size, len(usable.rows), seed)
        mine = rank_slice(batch.tolist(), rank, ranks)
        return collator.read([usable.rows[i] for i in mine], settings.micro_batch_size)

    return load


def prefetched(load: Callable[[int], list[Batch]], steps: range) -> Iterator[tuple[int, list[Batch] | Exception]]:
    """Every step with its micro-batches, or with what kept them from being loaded; those of the next one are loaded in
    a thread meanwhile."""

    def loaded(step: int) -> list[Batch] | Exception:
        try:
            return load(step)
        except CONTAINED as error:
            return error

    with ThreadPoolExecutor(1) as ahead:
        upcoming = ahead.submit(loaded, steps.start)
        for step in steps:
            batches = upcoming.result()
            if step + 1 in steps:
                upcoming = ahead.submit(loaded, step + 1)
            yield step, batches
