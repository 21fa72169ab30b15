"""`python -m stage1_teacher --recipe R`: fill the cache, or go on filling it.

Any number of processes may run at once, by hand, by torchrun or on several machines that share the folder: each claims
shards, none waits for another, and the one that commits the last shard seals the cache.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cache_schema.errors import IncompleteCache, NotACache
from pipeline.cli import guarded, recipe_arguments, recipe_of, recipe_parser

if TYPE_CHECKING:
    from cache_schema.manifest import Manifest
    from cache_schema.reader import CacheReader
    from pipeline.fingerprint import Experiment
    from pipeline.tasks import Example


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, and say at once if there is nothing to do: only then is a model loaded."""
    parser = recipe_parser("stage1_teacher", "Run the teacher once and cache its logits.")
    args = parser.parse_args(argv)
    recipe = recipe_of(args)

    from cache_schema.reader import CacheReader
    from pipeline.fingerprint import Experiment

    experiment = Experiment(recipe)
    try:
        reader = CacheReader.open(experiment.cache_dir, expect=experiment.identity)
    except (NotACache, IncompleteCache):
        pass
    else:
        print(f"cache {experiment.cache_dir}: complete, {_summary(reader)}; the teacher is not loaded")
        print(_by_task(experiment, reader))
        return 0
    return fill(experiment, ["stage1_teacher", *recipe_arguments(args)])


def fill(experiment: "Experiment", command: Sequence[str]) -> int:
    """Capture every shard that is missing, then seal."""
    from cache_schema.reader import CacheReader
    from cache_schema.writer import CacheWriter
    from pipeline.models import provenance
    from pipeline.progress import progress
    from stage1_teacher.capture import Capture
    from stage1_teacher.executor import run_shards
    from stage1_teacher.teacher import load_teacher

    recipe, examples = experiment.recipe, experiment.training_set.cached
    manifest, texts = planned(experiment, command)
    writer = CacheWriter.open(experiment.cache_dir, manifest, texts)
    missing, rows = writer.missing(), manifest.provenance["rows"]
    print(
        f"cache {experiment.cache_dir}: {manifest.shards - len(missing)} of {manifest.shards} shards are there; "
        f"{len(examples)} examples of {rows['training_rows']} training rows "
        f"({rows['shots_taken_out']} are the worked examples, {rows['held_out']} held out)",
        flush=True,
    )
    if missing:
        todo = [
            example for s in missing for example in examples[s * manifest.shard_examples :][: manifest.shard_examples]
        ]
        teacher = load_teacher(recipe, lambda: _longest(experiment, todo))
        with progress("stage 1", len(examples), "examples", done=len(examples) - len(todo)) as bar:
            run_shards(
                Capture.of(experiment, teacher),
                examples,
                writer,
                _claimed(writer, missing),
                {**provenance(), "batch_tokens": recipe.runtime.batch_tokens},
                bar.advance,
            )
        if reused := teacher.provenance.get("vllm"):
            print(
                f"vLLM read {reused['tokens_read']:,} tokens, of which {reused['tokens_from_prefix_cache']:,} "
                "came from its prefix cache"
            )
    left = writer.missing()
    if left:
        print(
            f"{len(left)} shards are claimed by other processes; the one that commits the last of them seals the cache"
        )
        return 0
    writer.seal()
    reader = CacheReader.open(experiment.cache_dir)
    print(f"cache {experiment.cache_dir}: sealed, {_summary(reader)}")
    print(_by_task(experiment, reader))
    return 0


def planned(experiment: "Experiment", command: Sequence[str]) -> "tuple[Manifest, list[str | None]]":
    """The cache's manifest and the texts of its vocabulary, before any weight is read.

    Raises RecipeError for more ranks than the teacher has ids, ModelError where it is not of the recipe's kind.
    """
    from cache_schema.manifest import Manifest, vocabulary_sha256
    from pipeline.errors import RecipeError
    from pipeline.models import provenance, vocabulary
    from stage1_teacher.teacher import vocabulary_size

    recipe, training = experiment.recipe, experiment.training_set
    vocab_size = vocabulary_size(recipe, experiment.teacher_prompts)
    if recipe.cache.top_k > vocab_size:
        raise RecipeError(
            f"cache.top_k is {recipe.cache.top_k}, but the teacher's vocabulary has {vocab_size} ids; "
            f"--set cache.top_k={min(256, vocab_size)}"
        )
    texts = vocabulary(experiment.teacher_tokenizer, vocab_size)
    rows = {
        "training_rows": training.rows,
        "shots_taken_out": training.rows - len(training.cached) - len(training.held_out),
        "held_out": len(training.held_out),
        "truncated_contexts": training.truncated,
    }
    manifest = Manifest.create(
        identity=experiment.identity,
        provenance={
            "recipe": recipe.name,
            "command": list(command),
            "teacher": recipe.teacher.model,
            "data": recipe.data.dir or "hub or embedded",
            "rows": rows,
            **provenance(),
        },
        selector=recipe.cache.selector,
        top_k=recipe.cache.top_k,
        vocab_size=vocab_size,
        temperatures=recipe.cache.temperatures,
        step=recipe.cache.step,
        codec=recipe.cache.codec,
        store_ids=recipe.cache.store_ids,
        examples=len(training.cached),
        shard_examples=recipe.cache.shard_examples,
        vocabulary_sha256=vocabulary_sha256(texts),
    )
    return manifest, texts


def _longest(experiment: "Experiment", examples: "Sequence[Example]") -> int:
    """Tokens of the longest sequence that the teacher reads for these examples."""
    prompts, shots = experiment.teacher_prompts, experiment.training_set.shots
    return max(len(prompts.encode(e.prompt, e.answer, shots.of(e)).input_ids) for e in examples)


def _claimed(writer: Any, missing: Sequence[int]) -> Iterator[int]:
    """The missing shards this process could claim. RANK and WORLD_SIZE only spread where the processes begin."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    start = rank * len(missing) // max(world, 1)
    for shard in [*missing[start:], *missing[:start]]:
        if writer.claim(shard):
            yield shard


def _by_task(experiment: "Experiment", reader: "CacheReader") -> str:
    from stage1_teacher.ledger import LEGEND, task_table

    return f"\n{task_table(reader, experiment.training_set.cached)}\n\n{LEGEND}\n"


def _summary(reader: "CacheReader") -> str:
    totals = reader.totals()
    return (
        f"examples {totals.examples}; positions {totals.positions}; "
        f"{totals.bytes / 1e6:,.1f} MB, {totals.bytes_per_position:.1f} bytes per position"
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
