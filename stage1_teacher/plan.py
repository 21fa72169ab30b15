"""What a cache will hold, and how long its longest sequence is: known before any weight is read. Called by `__main__`
and, on a cluster, by every worker, whose machine must come to the same plan.
"""

from collections.abc import Sequence

from cache_schema.manifest import Manifest, vocabulary_sha256
from pipeline.errors import RecipeError
from pipeline.fingerprint import Experiment
from pipeline.models import provenance, vocabulary
from pipeline.tasks import Example
from stage1_teacher.teacher import vocabulary_size


def planned(experiment: Experiment, command: Sequence[str]) -> tuple[Manifest, list[str | None]]:
    """The cache's manifest and the texts of its vocabulary, before any weight is read.

    Raises RecipeError for more ranks than the teacher has ids, ModelError where it is not of the recipe's kind.
    """
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


def longest(experiment: Experiment, examples: Sequence[Example]) -> int:
    """Tokens of the longest sequence that the teacher reads for these examples."""
    prompts, shots = experiment.teacher_prompts, experiment.training_set.shots
    found = (prompts.try_encode(e.prompt, e.answer, shots.of(e)) for e in examples if not e.unusable)
    return max((len(encoded.input_ids) for encoded in found if encoded is not None), default=1)
