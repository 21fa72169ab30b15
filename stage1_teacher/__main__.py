"""`python -m stage1_teacher --recipe R`: fill the cache, or go on filling it.

Any number of processes may run at once, by hand, by torchrun or on several machines that share the folder: each claims
shards, and the one that commits the last of them seals the cache. `--executor ray` does so on a cluster; see RAY.md.
A process ends when the cache is complete, or with exit code 3 when what is missing has failed here: until then it waits
for the shards that others work at, and takes over what they leave behind.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cache_schema.errors import IncompleteCache, NotACache
from pipeline.cli import (
    EXIT_INCOMPLETE,
    add_executor_argument,
    add_probe_arguments,
    guarded,
    parsed,
    probe_folder,
    recipe_arguments,
    recipe_of,
    recipe_parser,
)
from pipeline.output import facts, result

if TYPE_CHECKING:
    from cache_schema.manifest import Manifest
    from cache_schema.reader import CacheReader
    from cache_schema.writer import CacheWriter
    from pipeline.fingerprint import Experiment
    from pipeline.handout import Handout
    from pipeline.progress import Progress


EXAMPLES = (
    "python -m stage1_teacher",
    "python -m stage1_teacher --recipe gsm8k-qwen3 --set cache.dir=s3://bucket/gsm8k",
    "python -m stage1_teacher --recipe flan-uld --shard 17 --shard 18",
    "python -m stage1_teacher --recipe flan-uld --executor ray",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = recipe_parser("stage1_teacher", "Run the teacher once and cache its logits.", EXAMPLES)
    add_executor_argument(parser)
    parser.add_argument(
        "--shard", type=int, action="append", metavar="N", help="this shard alone; may be given often (all)"
    )
    add_probe_arguments(parser, "run so many examples alone and say what they cost: what `pipeline plan` asks for")
    parser.add_argument("--probe-dry", action="store_true", help="with --probe: count tokens, load no model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, and say at once if there is nothing to do: only then is a model loaded."""
    args = parsed(parser(), argv)
    recipe = recipe_of(args)

    from pipeline.fingerprint import Experiment

    experiment = Experiment(recipe)
    if args.probe is not None:
        from stage1_teacher.probe import probe

        probe(experiment, args.probe, probe_folder(args), args.probe_dry)
        return 0
    try:
        reader = experiment.open_cache()
    except (NotACache, IncompleteCache):
        pass
    else:
        _asked([], args.shard, reader.manifest.shards)
        _say_complete(experiment, reader, "complete", "; the teacher is not loaded")
        return 0
    return fill(experiment, ["stage1_teacher", *recipe_arguments(args)], args.shard)


def fill(experiment: "Experiment", command: Sequence[str], shards: Sequence[int] | None = None) -> int:
    """Capture every shard that is missing, or those of `shards`, then seal what is complete; the exit code."""
    from cache_schema.writer import CacheWriter
    from pipeline.handout import Handout
    from pipeline.progress import progress
    from pipeline.stopping import requested
    from stage1_teacher.plan import planned

    examples = experiment.training_set.cached
    manifest, texts = planned(experiment, command)
    writer = CacheWriter.open(experiment.cache_dir, manifest, texts)
    if not writer.exclusive:
        _alone(experiment)
    missing, rows = writer.missing(), manifest.provenance["rows"]
    print(
        f"cache {experiment.cache_dir}: {manifest.shards - len(missing)} of {manifest.shards} shards are there; "
        f"{len(examples)} examples of {rows['training_rows']} training rows "
        f"({rows['shots_taken_out']} are the worked examples, {rows['held_out']} held out)",
        flush=True,
    )
    todo = _asked(missing, shards, manifest.shards)
    handout = Handout(_spread(todo))
    if todo:
        there = len(examples) - sum(len(manifest.examples_of(shard)) for shard in todo)
        with progress("stage 1", len(examples), "examples", done=there) as bar:
            try:
                _capture(experiment, command, writer, handout, bar)
            finally:
                if handout.failures or requested() is None:  # asked to stop, that much was not tried is no news
                    for line in handout.report("shard {}".format):
                        print(line, file=sys.stderr)
    left = _asked(writer.missing(), shards, manifest.shards)
    if left:
        _say_missing(left, manifest, command)
        return EXIT_INCOMPLETE
    others = writer.missing()
    if others:
        said = f"the shards asked for are there; {len(others)} others of {manifest.shards} are missing"
        result(said, cache=str(experiment.cache_dir), shards=manifest.shards, missing=list(others), sealed=False)
        return 0
    writer.seal()
    reader = experiment.open_cache()
    _say_complete(experiment, reader, "sealed")
    return 0


def _say_complete(experiment: "Experiment", reader: "CacheReader", state: str, note: str = "") -> None:
    from dataclasses import asdict

    result(
        f"cache {experiment.cache_dir}: {state}, {_summary(reader)}{note}",
        cache=str(experiment.cache_dir),
        fingerprint=reader.manifest.fingerprint,
        shards=reader.manifest.shards,
        missing=[],
        sealed=True,
        **asdict(reader.totals()),
    )
    print(_by_task(experiment, reader))


def _alone(experiment: "Experiment") -> None:
    """Raise RunError where several processes would write to a store that cannot tell which of two was first."""
    from pipeline.errors import RunError

    if experiment.recipe.runtime.executor != "local" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            f"cache.dir {experiment.cache_dir}: the store has no conditional writes, so of two processes that commit "
            "the same shard neither would know;\n"
            "  next: run one process (no torchrun, --executor local), or use s3://, gs://, az:// or a folder"
        )
    print(f"cache {experiment.cache_dir}: the store has no conditional writes; let no other process write to it")


def _capture(
    experiment: "Experiment", command: Sequence[str], writer: "CacheWriter", handout: "Handout", bar: "Progress"
) -> None:
    """Have the shards of `handout` done where the recipe says."""
    there = int(bar.n)
    if experiment.recipe.runtime.executor != "local":
        from stage1_teacher.executor_ray import run_on_cluster

        run_on_cluster(experiment.recipe, command, writer, handout, lambda done: bar.show(there + done))
        return
    from pipeline.stopping import deferred
    from stage1_teacher.executor import run_shards, worker_of

    worker = worker_of(experiment, writer, handout.waiting)
    with deferred("the shards in work are written"):
        run_shards(worker, handout, lambda done: bar.show(there + done))
    if reused := worker.capture.teacher.provenance.get("vllm"):
        print(
            f"vLLM read {reused['tokens_read']:,} tokens, of which {reused['tokens_from_prefix_cache']:,} "
            "came from its prefix cache"
        )


def _asked(missing: Sequence[int], shards: Sequence[int] | None, planned: int) -> list[int]:
    """The missing shards that `--shard` names, all without it. Raises RecipeError for one that there is not."""
    from pipeline.errors import RecipeError

    if shards is None:
        return list(missing)
    if unknown := [shard for shard in shards if not 0 <= shard < planned]:
        raise RecipeError(f"--shard {unknown[0]}: the cache has the shards 0 to {planned - 1}")
    return [shard for shard in missing if shard in shards]


def _spread(missing: Sequence[int]) -> list[int]:
    """The missing shards in the order of this process. RANK and WORLD_SIZE only spread where the processes begin."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    start = rank * len(missing) // max(world, 1)
    return [*missing[start:], *missing[:start]]


def _say_missing(left: Sequence[int], manifest: "Manifest", command: Sequence[str]) -> None:
    """Which shards are missing at the end, and the command that tries just these."""
    facts(shards=manifest.shards, missing=list(left), sealed=False)
    module, *arguments = command
    again = ["python", "-m", module, *arguments]
    if len(left) <= 50:  # else the command without --shard is as good
        again += [part for shard in left for part in ("--shard", str(shard))]
    print(
        f"{len(left)} of {manifest.shards} shards are missing; the others are kept. To try just these again:\n"
        f"  {shlex.join(again)}",
        file=sys.stderr,
    )


def _by_task(experiment: "Experiment", reader: "CacheReader") -> str:
    from stage1_teacher.ledger import LEGEND, quarantine_list, task_table

    examples = experiment.training_set.cached
    return f"\n{task_table(reader, examples)}\n\n{LEGEND}\n{quarantine_list(reader, examples)}"


def _summary(reader: "CacheReader") -> str:
    totals = reader.totals()
    return (
        f"examples {totals.examples}; positions {totals.positions}; "
        f"{totals.bytes / 1e6:,.1f} MB, {totals.bytes_per_position:.1f} bytes per position"
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
