"""Stage 1 on a Ray cluster: the shard function of `executor`, in an actor a GPU. Called by `__main__`; see RAY.md.

A worker makes its experiment and its teacher from the recipe, comes to the same plan as whoever started it or is
refused, and commits to the cache itself; the driver hands out shards and seals.
"""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schema.errors import CacheError
from cache_schema.writer import CacheWriter
from pipeline.cluster import Cluster, started
from pipeline.handout import Handout, Outcome, Unit
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from stage1_teacher.executor import ShardWorker


class RemoteShards:
    """A `pipeline.cluster.Worker`. recipe: as JSON. folder: where relative paths begin. shards: what may be asked."""

    def __init__(self, recipe: str, folder: str, command: Sequence[str], shards: Sequence[Unit]) -> None:
        self._made_of = recipe, folder, command, shards
        self.shards: ShardWorker | None = None

    def start(self) -> str:
        """Load the teacher, and open the cache; "" or what is wrong."""
        recipe, folder, command, shards = self._made_of

        def load() -> None:
            from pipeline.fingerprint import Experiment
            from stage1_teacher.executor import worker_of
            from stage1_teacher.plan import planned

            experiment = Experiment(Recipe.model_validate_json(recipe))
            writer = CacheWriter.open(experiment.cache_dir, *planned(experiment, command))
            self.shards = worker_of(experiment, writer, shards)

        return started(folder, load)

    def work(self, unit: Unit, ours: bool, extra: Any) -> list[Outcome]:
        """See Worker."""
        assert self.shards is not None, "it was started"
        try:
            return self.shards.work(int(unit), ours)
        except CacheError as error:
            return [Outcome(unit, "stop", f"on {socket.gethostname()}: {error}")]

    def finish(self) -> list[Outcome]:
        """See Worker."""
        assert self.shards is not None, "it was started"
        try:
            return self.shards.finish()
        except CacheError as error:
            return [Outcome(-1, "stop", f"on {socket.gethostname()}: {error}")]

    def progress(self) -> dict[Unit, int]:
        """Examples captured of each shard in work."""
        return dict(self.shards.captured) if self.shards is not None else {}


def run_on_cluster(
    recipe: Recipe,
    command: Sequence[str],
    writer: CacheWriter,
    handout: Handout,
    show: Callable[[int], None],
    worker: type = RemoteShards,
) -> None:
    """Have the shards done by the workers of the recipe's cluster. Raises RunError for what concerns all of them."""
    runtime = recipe.runtime
    gpus = None if runtime.device_map else runtime.tensor_parallel
    arguments = (recipe.model_dump_json(), str(Path.cwd()), list(command), handout.waiting)
    with Cluster(recipe, worker, arguments, gpus) as cluster:
        cluster.run(handout, writer.missing, lambda shard: len(writer.manifest.examples_of(int(shard))), show)
