"""What stage 1 would cost, measured on a sample: `python -m stage1_teacher --probe 50 --probe-out FOLDER`.

`python -m pipeline plan` starts it and reads FOLDER/teacher.json; stage 2's probe then trains from FOLDER/cache, a
small cache of the sample alone. Nothing is written anywhere else. `pipeline.planning` says what it means for the whole.

Shape suffixes: N answer rows, V vocabulary, R ranks looked at.
"""

import json
import random
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cache_schema.errors import CacheError
from cache_schema.manifest import Manifest, fingerprint_of
from cache_schema.shard import encode_shard
from cache_schema.writer import CacheWriter
from pipeline.errors import DataError, RunError
from pipeline.fingerprint import Experiment
from pipeline.models import device_of, load_config, window_of
from pipeline.planning import RANKS
from pipeline.progress import progress
from pipeline.tasks import Example
from stage1_teacher.capture import Capture, Job
from stage1_teacher.plan import longest, planned
from stage1_teacher.teacher import FullLogitsTeacher, Teacher, TeacherInput, load_teacher
from stage1_teacher.topk import TopK

BUCKETS = (
    ("1st", 0, 1),
    ("2nd-8th", 1, 8),
    ("9th-32nd", 8, 32),
    ("later", 32, 2**31),
)  # answer positions, end excluded


@dataclass
class NotLoaded:
    """A teacher of which only the config was read: it can be asked what fits, not what it says."""

    vocab_size: int
    window: int | None
    provenance: dict[str, Any]

    def top_k(
        self, batch: Sequence[TeacherInput], context_ids: Sequence[int], k: int, temperatures: Sequence[float]
    ) -> Iterator[TopK]:
        """See Teacher."""
        raise AssertionError("a dry probe runs no model")


def probe(experiment: Experiment, examples: int, out: Path, dry: bool) -> None:
    """Write `out`/teacher.json and, unless dry, `out`/cache. Raises DataError where no example drawn is usable."""
    sample = drawn(experiment.training_set.cached, examples)
    manifest, texts = planned(experiment, ["stage1_teacher"])
    manifest = of_sample(manifest, len(sample))
    started = time.perf_counter()
    teacher: Teacher
    if dry:
        teacher = NotLoaded(manifest.vocab_size, window_of(load_config(experiment.teacher_source)), {})
    else:
        teacher = load_teacher(experiment.recipe, lambda: longest(experiment, sample))
    load_s = time.perf_counter() - started
    capture = Capture.of(experiment, teacher)
    jobs, quarantined = capture.prepare(sample)
    if not jobs:
        reasons = ", ".join(sorted({example.reason for example in quarantined}))
        raise DataError(
            f"none of the {len(sample)} examples drawn can be used ({reasons}); look at one: python -m pipeline show"
        )
    found: dict[str, Any] = {
        "tasks": _per_task(experiment.training_set.cached),
        "sample": _lengths(capture, jobs),
        "quarantined": len(quarantined),
        "shard_examples": experiment.recipe.cache.shard_examples,
        "vocab_size": manifest.vocab_size,
        "text_bytes": sum(len((j.example.prompt + j.example.answer).encode()) for j in jobs),
        "dry": dry,
    }
    if not dry:
        found |= _measured(experiment, capture, sample, jobs, manifest, texts, out) | {"load_s": load_s}
    out.mkdir(parents=True, exist_ok=True)
    try:
        (out / "teacher.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"--probe-out {out}: cannot be written: {error.strerror}; name another folder") from None


def drawn(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` of the examples, of each task in proportion and two at least where it has them, in their old order."""
    by_task: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_task.setdefault(example.task, []).append(index)
    taken: list[int] = []
    for task, members in by_task.items():
        share = max(2, round(count * len(members) / len(examples)))
        taken += random.Random(f"probe/{task}").sample(members, min(share, len(members)))
    return [examples[index] for index in sorted(taken)]


def of_sample(manifest: Manifest, examples: int) -> Manifest:
    """The plan of a cache of the sample alone, in one shard; its identity says so: no reader takes it for another."""
    identity = manifest.identity | {"data": {"probe": examples}}
    fingerprint = fingerprint_of(identity)
    return replace(
        manifest, identity=identity, fingerprint=fingerprint, examples=examples, shard_examples=max(examples, 1)
    )


def _per_task(examples: Sequence[Example]) -> dict[str, int]:
    """How many examples of each task stage 1 will be given."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.task] = counts.get(example.task, 0) + 1
    return counts


def _lengths(capture: Capture, jobs: Sequence[Job]) -> dict[str, dict[str, list[int]]]:
    """Task -> for each usable example of the sample its answer positions, and its tokens with the shared context
    (whole) and without (own)."""
    found: dict[str, dict[str, list[int]]] = {}
    for context, batch in capture.batches(jobs):
        for job in batch:
            of = found.setdefault(job.example.task, {"positions": [], "whole": [], "own": []})
            of["positions"].append(len(job.encoded.answer_ids))
            of["whole"].append(sum(job.lengths))
            of["own"].append(sum(job.lengths) - len(context))
    return found


def _measured(
    experiment: Experiment,
    capture: Capture,
    sample: Sequence[Example],
    jobs: Sequence[Job],
    manifest: Manifest,
    texts: Sequence[str | None],
    out: Path,
) -> dict[str, Any]:
    """Seconds, bytes, memory, and the probability beyond the first K."""
    device = device_of(experiment.recipe)
    shortest = min(jobs, key=lambda job: sum(job.lengths)).example
    capture.shard([shortest])  # what only the first forward pass pays
    started = time.perf_counter()
    with progress("teacher", len(sample), "examples") as bar:
        rows, quarantined = capture.shard(sample, bar.advance)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    capture_s = time.perf_counter() - started
    peak = peak_bytes(device)  # before the full logits below, which stage 1 never holds
    encode_shard(rows[:1], 0, manifest)  # as above
    started = time.perf_counter()
    encoded = encode_shard(rows, 0, manifest)
    encode_s = time.perf_counter() - started
    try:
        writer = CacheWriter.open(out / "cache", manifest, texts)
        writer.commit(0, rows, quarantined, {})
        writer.seal()
    except CacheError as error:
        raise RunError(f"--probe-out {out}: the sample's cache cannot be written: {error}") from None
    return {
        "device": device_name(device),
        "capture_s": capture_s,
        "encode_s": encode_s,
        "peak_bytes": peak,
        "column_bytes": column_bytes(encoded.data),
        "beyond": beyond(capture, jobs, max(experiment.recipe.cache.temperatures), experiment.recipe.cache.top_k),
    }


def device_name(device: torch.device) -> str:
    """For people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)})"


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: of the GPU, else of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def column_bytes(data: memoryview) -> dict[str, int]:
    """Compressed bytes of each column of a data file, and its footer's."""
    import pyarrow as pa

    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    sizes: dict[str, int] = {}
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for column in map(group.column, range(group.num_columns)):
            name = column.path_in_schema.partition(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes | {"footer": len(data) - sum(sizes.values())}


def beyond(capture: Capture, jobs: Sequence[Job], temperature: float, top_k: int) -> dict[str, Any] | None:
    """How much of the teacher's probability lies outside its K largest, by task and place in the answer; None where
    the engine shows no full logits.

    {"temperature", "ranks": the K, "tasks": task -> place -> {"n", "median": one a K, "p90"}}.
    """
    teacher = capture.teacher
    if not isinstance(teacher, FullLogitsTeacher):
        return None
    ranks = sorted({k for k in (*RANKS, top_k) if k <= teacher.vocab_size})
    found: dict[str, dict[str, list[np.ndarray[Any, Any]]]] = {}
    with progress("probability beyond K", len(jobs), "examples") as bar:
        for context, batch in capture.batches(jobs):
            inputs = [job.input for job in batch]
            masses_NR = np.concatenate(
                [masses(part, ranks, temperature) for part in teacher.answer_logits(inputs, context)]
            )
            start = 0
            for job in batch:
                own_NR = masses_NR[start : start + job.input.rows]
                start += job.input.rows
                places = found.setdefault(job.example.task, {"all": []})
                places["all"].append(own_NR)
                for name, first, end in BUCKETS:
                    if len(own_NR) > first:
                        places.setdefault(name, []).append(own_NR[first:end])
            bar.advance(len(batch))
    tasks = {task: {place: _summary(np.concatenate(rows)) for place, rows in of.items()} for task, of in found.items()}
    return {"temperature": temperature, "ranks": ranks, "tasks": tasks}


def masses(logits_NV: Tensor, ranks: Sequence[int], temperature: float) -> np.ndarray[Any, Any]:
    """[N, R] float64: the probability outside the K largest logits, for each K of `ranks`, none above V.

    Summed from the smallest up over the ids outside themselves, never as 1 - sum p, whose rounding is larger than the
    tail of a peaked row. A row that is not finite is NaN.
    """
    scaled_NV = logits_NV.double() / temperature
    most = max(ranks)
    top_NK, ids_NK = scaled_NV.topk(most, dim=1)
    total_N1 = scaled_NV.logsumexp(1, keepdim=True)
    rest_N1 = scaled_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1, keepdim=True)
    p_NK, rest_N1 = (top_NK - total_N1).exp(), (rest_N1 - total_N1).exp()
    outside_NK = torch.cat([p_NK.flip(1).cumsum(1).flip(1)[:, 1:], torch.zeros_like(rest_N1)], dim=1) + rest_N1
    return outside_NK[:, [k - 1 for k in ranks]].cpu().numpy()


def _summary(masses_NR: np.ndarray[Any, Any]) -> dict[str, Any]:
    finite = masses_NR[np.isfinite(masses_NR).all(1)]
    if not len(finite):
        return {"n": 0, "median": [], "p90": []}
    median, p90 = np.quantile(finite, [0.5, 0.9], axis=0)
    return {"n": len(finite), "median": median.tolist(), "p90": p90.tolist()}
