"""Shards through the capture loop and into the cache: the shard function of every executor, and the local one.

`ShardWorker` is what a process does with a shard, here or on a cluster. Rows are encoded and written by a thread of
their own while the teacher computes the next shard, so a shard's outcome may be told with the next one's. An error of
one shard is an outcome; one that concerns all of them (`concerns_all`) is raised. Called by `__main__`, `executor_ray`.
"""

import errno
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from cache_schema.errors import CacheError, FingerprintMismatch, NotACache, PlanMismatch, StorageError
from cache_schema.writer import CacheWriter
from pipeline import stopping
from pipeline.fingerprint import Experiment
from pipeline.handout import Handout, Outcome, Unit, failed
from pipeline.models import provenance
from pipeline.tasks import Example
from stage1_teacher.capture import Capture
from stage1_teacher.plan import longest
from stage1_teacher.teacher import load_teacher

LOOK_AGAIN_S = 2.0  # at shards that others have claimed
QUIET_S = 60.0  # without a claim of theirs: then no other process of torchrun is at work any more
TAKEN_IN_A_ROW = 8  # then one listing says what others have done: to try each costs requests, in an object store
_NOWHERE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOTCONN}


def concerns_all(error: Exception) -> bool:
    """Whether no other shard could fare better: another cache lies there, or nothing can be written at all."""
    if isinstance(error, StorageError):
        cause = error.__cause__
        return isinstance(cause, PermissionError) or getattr(cause, "errno", None) in _NOWHERE
    return isinstance(error, FingerprintMismatch | PlanMismatch | NotACache)


class ShardWorker:
    """A process's teacher and its place in the cache. Close it. provenance: for every commit record."""

    def __init__(
        self, capture: Capture, examples: Sequence[Example], writer: CacheWriter, provenance: dict[str, Any]
    ) -> None:
        self.capture, self.examples, self.writer = capture, examples, writer
        self.captured: dict[Unit, int] = {}  # examples done of the shards whose outcome is not told yet
        self._provenance = provenance
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: tuple[int, Future[Any]] | None = None

    def work(self, shard: int, ours: bool = False, report: Callable[[], None] = lambda: None) -> list[Outcome]:
        """Capture a shard and begin to write it; the outcomes that are known by now.

        The claim on a shard is renewed with every batch, so that a slow shard is not taken for an abandoned one.
        ours: work at it whoever has claimed it, since we know that the claim is a dead worker's. report: called when
        `captured` has changed.
        """
        try:
            if not self.writer.claim(shard) and not ours:
                return [Outcome(shard, "taken")]
            self.captured[shard] = 0

            def renew(finished: int) -> None:
                self.captured[shard] += finished
                self._renew(shard)
                report()

            planned, started = self.writer.manifest.examples_of(shard), time.monotonic()
            rows, quarantined = self.capture.shard([self.examples[i] for i in planned], renew)
            took = {"seconds": round(time.monotonic() - started, 3)}  # of this shard, without loading the teacher
        except Exception as error:
            return [self._failed(shard, error)]
        outcomes = self.finish()
        provenance = self._provenance | self.capture.teacher.provenance | took
        self._writing = shard, self._pool.submit(self.writer.commit, shard, rows, quarantined, provenance)
        return outcomes

    def _renew(self, shard: int) -> None:
        """Renew the claim, a hint: where that fails, no shard that is being captured is lost, and the next batch tries
        again."""
        try:
            self.writer.claim(shard)
        except StorageError as error:
            if concerns_all(error):
                raise

    def finish(self) -> list[Outcome]:
        """Wait until what was captured is written; its outcome."""
        if self._writing is None:
            return []
        (shard, future), self._writing = self._writing, None
        try:
            future.result()
        except Exception as error:
            return [self._failed(shard, error)]
        self.captured.pop(shard, None)
        return [Outcome(shard, "done")]

    def close(self) -> None:
        """Wait for the writing thread."""
        self._pool.shutdown()

    def _failed(self, shard: int, error: Exception) -> Outcome:
        self.captured.pop(shard, None)
        with suppress(CacheError, OSError):
            self.writer.release(shard)
        if concerns_all(error):
            raise error
        return failed(shard, error)


def worker_of(experiment: Experiment, writer: CacheWriter, shards: Sequence[Unit]) -> ShardWorker:
    """This process's worker: loads the teacher. shards: what it may be asked for."""
    recipe, examples, manifest = experiment.recipe, experiment.training_set.cached, writer.manifest

    def longest_of_all() -> int:
        return longest(experiment, [examples[i] for shard in shards for i in manifest.examples_of(int(shard))])

    capture = Capture.of(experiment, load_teacher(recipe, longest_of_all))
    return ShardWorker(capture, examples, writer, {**provenance(), "batch_tokens": recipe.runtime.batch_tokens})


def run_shards(worker: ShardWorker, handout: Handout, show: Callable[[int], None] = lambda done: None) -> None:
    """Hand the shards to this process's worker, until they are done, have failed here, or the worker is given no more.

    Shards that others have claimed are waited for, and taken over where a claim goes stale; a process of torchrun that
    is given no more waits too, see `wait_for_others`; one that is asked to stop finishes what it has in work. `show` is
    called with the number of examples that are captured of the shards handed out. Raises what concerns all shards.
    """
    manifest = worker.writer.manifest

    def report() -> None:
        done = handout.size_done(lambda shard: len(manifest.examples_of(int(shard))))
        show(done + sum(worker.captured.values()))

    waiting, taken = False, 0
    try:
        while True:
            shard = None if stopping.requested() else handout.next(0)
            for outcome in worker.finish() if shard is None else worker.work(int(shard), report=report):
                handout.settle(0, outcome)
                taken = taken + 1 if outcome.state == "taken" else 0
            if taken == TAKEN_IN_A_ROW:
                handout.narrow(set(worker.writer.missing()))
                taken = 0
            report()
            if shard is not None:
                continue
            if stopping.requested():
                break
            if 0 in handout.given_up:
                if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                    wait_for_others(worker.writer, handout.given_up[0])
                break
            if not handout.taken:
                break
            if not waiting:
                print(waiting_for(handout.taken), flush=True)
            waiting = True
            time.sleep(LOOK_AGAIN_S)
            handout.offer_again(set(worker.writer.missing()))
    finally:
        worker.close()


def wait_for_others(writer: CacheWriter, why: str) -> None:
    """Wait until nobody has worked at what is missing for a while: torchrun ends all processes when one of them fails.

    QUIET_S, since a process that loads its teacher, or is between two shards, has claimed none.
    """
    print(f"no more shards are tried here: {why}\nwaiting for the other processes to end theirs", flush=True)
    last_seen, before, found = time.monotonic(), [-1], 0
    while (missing := writer.missing()) and time.monotonic() - last_seen < QUIET_S and not stopping.requested():
        # claimed at two looks: the look of another process that waits like this one claims too, for a moment
        held = found in missing and _claimed(writer, found)
        if held or missing != before:
            last_seen, before = time.monotonic(), missing
        if not held:
            ordered = sorted(missing, key=lambda shard: (shard < found, shard))  # they are near what they had
            found = next((shard for shard in ordered if _claimed(writer, shard)), found)
        time.sleep(LOOK_AGAIN_S)


def _claimed(writer: CacheWriter, shard: int) -> bool:
    """Whether another process has a shard, or has done it."""
    if not writer.claim(shard):
        return True
    writer.release(shard)
    return False


def waiting_for(taken: Sequence[Unit]) -> str:
    """The line that says why nothing seems to happen."""
    return (
        f"waiting for {len(taken)} shards that other processes have claimed; one that is not worked at any more is "
        "taken over, after 15 minutes at the latest"
    )
