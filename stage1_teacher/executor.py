"""Shards through the capture loop and into the cache, in this process. Called by `__main__`.

Rows are encoded and written by a thread of their own while the teacher computes the next shard; that thread's failure
stops the loop.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from cache_schema.writer import CacheWriter
from pipeline.tasks import Example
from stage1_teacher.capture import Capture


def run_shards(
    capture: Capture,
    examples: Sequence[Example],
    writer: CacheWriter,
    shards: Iterator[int],
    provenance: dict[str, Any],
    report: Callable[[int], None],
) -> int:
    """Capture and commit the shards that `shards` hands out; returns how many. Encoding and writing overlap compute.

    The claim on a shard is renewed with every batch, so that a slow shard is not taken for an abandoned one.
    """
    size = writer.manifest.shard_examples
    done = 0
    pending: Future[Any] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        for shard in shards:

            def renew(finished: int, shard: int = shard) -> None:
                writer.claim(shard)
                report(finished)

            rows, quarantined = capture.shard(examples[shard * size : (shard + 1) * size], renew)
            if pending is not None:
                pending.result()  # raises here what went wrong there
            pending = pool.submit(writer.commit, shard, rows, quarantined, provenance | capture.teacher.provenance)
            done += 1
        if pending is not None:
            pending.result()
    return done
