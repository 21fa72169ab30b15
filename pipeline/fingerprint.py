"""What a cached number means, as one dictionary; its hash is the cache's fingerprint.

Everything here changes what is stored, or which examples are. What is left out on purpose (where things lie, the
device, batch sizes, numbers of workers, evaluation limits) goes into the manifest as provenance.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cache_schema.copies import Copies
from cache_schema.manifest import fingerprint_of
from cache_schema.reader import CacheReader
from cache_schema.schema import SCHEMA_VERSION
from pipeline.data import TrainingSet, task_options, training_set
from pipeline.models import ModelSource, load_tokenizer, locate, tokenizer_digest
from pipeline.prompts import PromptBuilder
from pipeline.recipe import Recipe
from pipeline.run_dir import default_cache_dir
from pipeline.tasks import get_task


@dataclass(frozen=True)
class Experiment:
    """A recipe with what it stands for on this machine, computed when asked for. Loads no model's weights."""

    recipe: Recipe

    @cached_property
    def training_set(self) -> TrainingSet:
        return training_set(self.recipe)

    @cached_property
    def teacher_source(self) -> ModelSource:
        return locate(self.recipe.teacher.model, self.recipe.teacher.revision)

    @cached_property
    def teacher_tokenizer(self) -> Any:
        return load_tokenizer(self.teacher_source)

    @cached_property
    def teacher_prompts(self) -> PromptBuilder:
        teacher = self.recipe.teacher
        return PromptBuilder(self.teacher_tokenizer, teacher.thinking, seq2seq=teacher.kind == "seq2seq")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The hashed fields (design: "Identity" in cache_schema/FORMAT.md)."""
        teacher, cache, data = self.recipe.teacher, self.recipe.cache, self.recipe.data
        return {
            "schema_version": SCHEMA_VERSION,
            "teacher": {
                "weights": self.teacher_source.identity(),
                "kind": teacher.kind,
                "engine": teacher.engine,
                "quantization": teacher.quantization,
                "dtype": teacher.dtype,
                "head_dtype": "float32",
            },
            "tokenizer": {
                "sha256": tokenizer_digest(self.teacher_tokenizer),
                **self.teacher_prompts.describe(),
            },
            "shots": {"count": teacher.shots, "seed": teacher.shot_seed, "policy": teacher.shot_policy},
            "tasks": {
                name: {
                    "version": get_task(name).version,
                    "options": task_options(name, data).model_dump(mode="json"),
                }
                for name in self.recipe.trained_tasks
            },
            "data": {"examples": len(self.training_set.cached), "sha256": self.training_set.content_digest()},
            "answers": "reference",
            "cache": {
                "selector": cache.selector,
                "top_k": cache.top_k,
                "temperatures": list(cache.temperatures),
                "step": cache.step,
                "codec": cache.codec,
                "store_ids": cache.store_ids,
                **({"sample_seed": cache.sample_seed} if cache.selector == "sampled" else {}),
            },
        }

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self.identity)

    @cached_property
    def cache_dir(self) -> str:
        """Where the cache lies, a folder or a URL; the fingerprint is computed only where its name needs it."""
        if self.recipe.cache.dir is not None:
            return self.recipe.cache.dir
        return default_cache_dir(self.recipe, self.fingerprint)

    def open_cache(self, require_sealed: bool = True) -> CacheReader:
        """The cache, of this very identity. Raises CacheError as `CacheReader.open` does."""
        runtime = self.recipe.runtime
        copies = Copies(runtime.copies, int(runtime.copies_gb * 1e9))
        return CacheReader.open(self.cache_dir, expect=self.identity, require_sealed=require_sealed, copies=copies)
