"""Stage 1 against a plain forward of every whole sequence, and against the least that its own tokens can cost.

    python benchmarks/stage1_cost.py [--model pocket mid] [--device cpu] [--data FOLDER] [--rounds 3]

Stage 1 is all of it: tokenising, batching, the teacher over the worked examples' KV cache, top K and normalisers,
encoding, writing and committing shards. It is held against

    all logits     model(ids).logits of the whole sequence, the answer rows' top K and normalisers
    answer rows    the same, but the head runs on the answer rows only
    the limit      a bare forward of as many own tokens over the ready KV cache, in full batches of equal length, with
                   head, torch.topk and torch.logsumexp, and nothing else

The first two at examples of about 250 own tokens, the limit at the lengths as they come, where batches have padding.
The worked examples are read once for all 7,465 rows; that is in no round here.
"""

import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import stand_ins
import torch
from harness import Row, side_by_side
from torch import Tensor

from cache_schema.writer import CacheWriter
from pipeline.fingerprint import Experiment
from pipeline.handout import Handout
from pipeline.models import kv_cache_argument
from stage1_teacher.capture import Capture
from stage1_teacher.executor import ShardWorker, run_shards
from stage1_teacher.plan import planned
from stage1_teacher.teacher import load_teacher
from stage1_teacher.topk import select_top_k

MODELS = {"cpu": ["pocket", "mid"], "cuda": ["qwen3-1.7b"]}
OWN_TOKENS = 250
# (examples of a round, of a shard, tokens of a batch, whole sequences read plainly, and together). On a processor the
# batches of a small shard are cut so small that their padding is that of the recipe's (256 examples, 4,096 tokens).
SHAPES = {"pocket": (256, 64, None, 32, 8), "mid": (24, 12, 1_024, 2, 1)}
ON_GPU = (512, 256, None, 16, 8)


class Teaching:
    """One teacher and its examples, and ways to read them. `context` is what all prompts begin with."""

    def __init__(self, name: str, args: Namespace, own_tokens: int | None, teacher: Any = None) -> None:
        self.examples, shard, tokens, self.plain_examples, self.together = SHAPES.get(name, ON_GPU)
        settings = [f"cache.shard_examples={shard}"] + ([f"runtime.batch_tokens={tokens}"] if tokens else [])
        self.experiment: Experiment = stand_ins.experiment(name, args, self.examples, own_tokens, settings)
        self.recipe = self.experiment.recipe
        self.teacher = teacher or load_teacher(self.recipe, lambda: 0)
        self.cached = self.experiment.training_set.cached[: self.examples]
        self.manifest, self.vocabulary = planned(self.experiment, ["benchmarks"])
        self.context = stand_ins.context_of(self.experiment) if self.recipe.teacher.kind == "causal" else []
        self.synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None

    def stage1(self) -> Callable[[], None]:
        """Capture and commit every example, in a new cache each time."""
        folder, capture = self.experiment.cache_dir, Capture.of(self.experiment, self.teacher)

        def run() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            writer = CacheWriter.open(folder, self.manifest, self.vocabulary)
            run_shards(ShardWorker(capture, self.cached, writer, {}), Handout(writer.missing()))
            self.synchronize()
            assert not writer.missing()

        return run

    def sequences(self, count: int) -> list[tuple[list[int], int]]:
        """(ids read, first row wanted) of the first examples, worked examples in front."""
        prompts, shots = self.experiment.teacher_prompts, self.experiment.training_set.shots
        found = [prompts.encode(e.prompt, e.answer, shots.of(e)) for e in self.cached[:count]]
        return [(encoded.input_ids[:-1], encoded.answer_start - 1) for encoded in found]

    def plain(self, all_logits: bool) -> Callable[[], None]:
        """Whole sequences through the whole model; `all_logits`, or the head on the answer rows only."""
        read, model = self.sequences(self.plain_examples), self.teacher.model
        batches = [read[i : i + self.together] for i in range(0, len(read), self.together)]

        @torch.no_grad()
        def run() -> None:
            for batch in batches:
                longest = max(len(ids) for ids, _ in batch)
                ids_BL = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in batch], device=model.device)
                if all_logits:
                    out_BLV = model(input_ids=ids_BL, use_cache=False).logits
                    rows_NV = torch.cat([out_BLV[b, first : len(ids)] for b, (ids, first) in enumerate(batch)])
                else:
                    out_BLH = self.teacher.body(input_ids=ids_BL, use_cache=False).last_hidden_state
                    rows_NH = torch.cat([out_BLH[b, first : len(ids)] for b, (ids, first) in enumerate(batch)])
                    rows_NV = model.get_output_embeddings()(rows_NH)
                for chunk_NV in rows_NV.split(self.teacher.rows_per_chunk):
                    select_top_k(chunk_NV.float(), self.recipe.cache.top_k, self.recipe.cache.temperatures)
            self.synchronize()

        return run

    def limit(self) -> Callable[[], None]:
        """As many own tokens and answer rows as stage 1 has, in batches of its size, every sequence of mean length."""
        own, answer = stand_ins.own_lengths(self.experiment)
        length, rows = round(own) - 1, round(answer)
        batch = max(1, min(self.recipe.runtime.batch_tokens // length, self.recipe.cache.shard_examples))
        sizes = [min(batch, len(self.cached) - i) for i in range(0, len(self.cached), batch)]
        ids_BL = torch.randint(4, 90, (batch, length), device=self.teacher.device)
        context = self._ready_context()

        @torch.no_grad()
        def run() -> None:
            for size in sizes:
                hidden_BLH = self.teacher.body(input_ids=ids_BL[:size], **context(size)).last_hidden_state
                for part_NH in hidden_BLH[:, -rows:].flatten(0, 1).split(self.teacher.rows_per_chunk):
                    self._reduced(self.teacher.head(part_NH))
            self.synchronize()

        return run

    def _ready_context(self) -> Callable[[int], dict[str, Any]]:
        """The worked examples' keys and values, read once, as an argument for a batch of any size."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        with torch.no_grad():
            ids_1L = torch.tensor([self.context], device=self.teacher.device)
            self.teacher.body(input_ids=ids_1L, use_cache=True, **kv_cache_argument(self.teacher.body, cache))
        layers: Sequence[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in cache.layers]

        def seen_by(size: int) -> dict[str, Any]:
            own = DynamicCache([(k.expand(size, -1, -1, -1), v.expand(size, -1, -1, -1)) for k, v in layers])
            return {"use_cache": True, **kv_cache_argument(self.teacher.body, own)}

        return seen_by

    def _reduced(self, logits_NV: Tensor) -> None:
        logits_NV.topk(self.recipe.cache.top_k, dim=1)
        block = max(1, 2**20 // logits_NV.shape[1]) if logits_NV.device.type == "cpu" else len(logits_NV)
        for rows_NV in logits_NV.split(block):  # three times as fast on a processor as all rows at once
            for temperature in self.recipe.cache.temperatures:
                (rows_NV if temperature == 1 else rows_NV / temperature).logsumexp(1)


def per_example(times: Sequence[float], examples: int) -> list[float]:
    """Seconds an example."""
    return [seconds / examples for seconds in times]


def measure(name: str, args: Namespace) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one model, and its conditions."""
    near = Teaching(name, args, OWN_TOKENS if name in ("mid", "qwen3-1.7b") else None)
    runs = {"stage 1": near.stage1(), "all logits": near.plain(True), "answer rows": near.plain(False)}
    times = side_by_side(runs, args.rounds)
    counts = {"stage 1": near.examples, "all logits": near.plain_examples, "answer rows": near.plain_examples}
    each = {run: per_example(times[run], counts[run]) for run in runs}
    what = f"stage 1, examples/s with an 8-shot context ({name})"
    rows = [
        Row.of_times(what, "a plain forward of the whole sequence, all logits", each["all logits"], each["stage 1"]),
        Row.of_times(what, "the same, head on answer rows only", each["answer rows"], each["stage 1"]),
    ]
    if name != "pocket":  # whose context is 471 tokens, not 1,200
        rows[0] = Row(**vars(rows[0]) | {"goal": ">= 5"})
    mixed = Teaching(name, args, None, near.teacher)
    pair = side_by_side({"limit": mixed.limit(), "stage 1": mixed.stage1()}, args.rounds)
    what, against = f"stage 1 end to end, examples/s ({name})", "a bare forward of its own tokens: the limit"
    rows.append(Row.of_times(what, against, pair["limit"], pair["stage 1"], ">= 0.85"))
    return rows, {
        "near 250 tokens": stand_ins.describe(near.experiment) | {"s_per_example": _medians(each)},
        "as they come": stand_ins.describe(mixed.experiment)
        | {"s_per_example": _medians({run: per_example(found, mixed.examples) for run, found in pair.items()})},
        "batch_tokens": mixed.recipe.runtime.batch_tokens,
        "shard_examples": mixed.recipe.cache.shard_examples,
    }


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(sorted(found)[len(found) // 2], 4) for name, found in times.items()}


if __name__ == "__main__":
    raise SystemExit(stand_ins.run("stage1_cost", __doc__, measure, MODELS, rounds=3))
