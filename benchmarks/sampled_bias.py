"""Bias and noise of what a cache says of its teacher, against the full distribution, for the bytes it takes.

    python benchmarks/sampled_bias.py [--data FOLDER] [--models FOLDER] [--positions N] [--repeats R] [--out FILE]

Teacher and student are two training levels of benchmarks/trained_lm.py (151,936 ids), read on GSM8K's test answers,
which neither has seen. For every way to cache a position, the same loss function that trains a student gives a KL and
its gradient with respect to the student's logits; both are compared with those of the two full distributions:

    top K, no tail         KL to the K largest, scaled to sum to 1
    top K + tail           `kl` on a cache of selector topk
    n draws                `kl` on a cache of selector sampled
    n independent draws    the same with draws as the paper makes them (arXiv 2503.16870), not one a slice

Bias is the distance of the mean over seeds from the full one, squared distances less what R seeds leave of the noise;
the upper end of its range is a bias that they could not have told from none. Noise is the root mean square distance of
one seed from the mean, at a single position: a training step averages it over its positions, the bias it does not.
Bytes are those of a real cache written through cache_schema, without
its text columns; the last number of draws is the one that takes as many bytes as the top 256.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from harness import Row, data_folder, finish
from torch import Tensor

from cache_schema.manifest import Manifest, vocabulary_sha256
from cache_schema.schema import TEXT_COLUMNS, CacheRow
from cache_schema.writer import CacheWriter
from pipeline.data import Shots
from pipeline.models import ModelSource, load_causal_lm, load_tokenizer
from pipeline.prompts import PromptBuilder
from pipeline.tasks import Example
from stage1_teacher.capture import Capture
from stage1_teacher.sampling import sample, uniforms
from stage1_teacher.teacher import CausalTeacher, FullLogitsTeacher, TeacherInput
from stage1_teacher.topk import select_top_k
from stage2_student.batches import weights
from stage2_student.losses import kl, sampled_kl

STEP = 2.0**-6
OF_A_STEP = 32 * 122  # positions that a training step averages: GSM8K's answers at the published batch size


class Remembered(FullLogitsTeacher):
    """A teacher whose rows are computed once and handed out as often as asked for."""

    def __init__(self, folder: Path) -> None:
        self.model = load_causal_lm(ModelSource(str(folder), None), "float32", "none", torch.device("cpu"))
        self.teacher = CausalTeacher(self.model)
        self.vocab_size, self.window = self.teacher.vocab_size, self.teacher.window
        self._known: dict[tuple[int, ...], Tensor] = {}

    def answer_logits(self, batch: Sequence[TeacherInput], context_ids: Sequence[int]) -> Iterator[Tensor]:
        """See FullLogitsTeacher; copies, for they are overwritten."""
        for item in batch:
            key = tuple(item.input_ids)
            if key not in self._known:
                self._known[key] = torch.cat(list(self.teacher.answer_logits([item], context_ids)))
            yield self._known[key].clone()


@dataclass(frozen=True)
class Positions:
    """Some positions at which everything is compared: full logits of both, and what keys the draws."""

    teacher_NV: Tensor
    student_NV: Tensor
    keys: list[tuple[str, str, int]]  # task, example, position

    def uniforms(self, seed: int, draws: int) -> np.ndarray[Any, Any]:
        """As stage 1 has them."""
        return np.stack([uniforms(seed, task, name, t + 1, draws)[t] for task, name, t in self.keys])


@dataclass(frozen=True)
class Way:
    """A way to cache a position. loss: of the student's logits, for a seed; the sum over positions."""

    name: str
    loss: Callable[[Tensor, int], Tensor]
    seeds: int  # 1 where nothing is drawn
    temperature: float = 1.0  # of the loss
    cache: tuple[str, int] | None = None  # selector and K of its real cache


def top(at: Positions, k: int, tail: bool, temperature: float = 1.0) -> Way:
    """The K largest."""
    kept = select_top_k(at.teacher_NV.clone(), k, [temperature])
    usable_N = torch.ones(len(at.keys), dtype=torch.bool)
    assert kept.token_ids_NK is not None and kept.log_tail_NT is not None
    ids_NK, sums_N, tail_N = kept.token_ids_NK, kept.logsumexp_NT[:, 0], kept.log_tail_NT[:, 0]
    inside_N = (kept.logits_NK / temperature).logsumexp(1)

    def loss(student_NV: Tensor, seed: int) -> Tensor:
        if tail:
            return kl(student_NV, kept.logits_NK, ids_NK, sums_N, tail_N, usable_N, temperature)
        log_p_NK = kept.logits_NK / temperature - inside_N[:, None]
        log_q_NK = (student_NV / temperature).log_softmax(1).gather(1, ids_NK)
        return temperature**2 * (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum()

    name = f"top {k}" + (" + tail" if tail else ", no tail") + (f", T = {temperature:g}" if temperature != 1 else "")
    return Way(name, loss, 1, temperature, ("topk", k) if tail and temperature == 1 else None)


def drawn(
    at: Positions, count: int, seeds: int, temperature: float = 1.0, of: float = 1.0, independent: bool = False
) -> Way:
    """Ids drawn at temperature `of`, for a loss at `temperature`."""
    temperatures = list(dict.fromkeys([of, temperature]))
    usable_N = torch.ones(len(at.keys), dtype=torch.bool)

    def loss(student_NV: Tensor, seed: int) -> Tensor:
        u_NK = at.uniforms(seed, count)
        if independent:  # sorted, so that they lie as slices do
            u_NK = np.sort(u_NK, axis=1) * count - np.arange(count)
        kept = sample(at.teacher_NV, u_NK, temperatures)
        assert kept.token_ids_NK is not None and kept.draws_NK is not None
        slots = int((kept.draws_NK > 0).sum(1).max())
        arrays = (part.numpy() for part in (kept.draws_NK, kept.logits_NK, kept.logsumexp_NT))
        weights_NK = torch.from_numpy(weights(*arrays, temperatures, len(temperatures) - 1))[:, :slots]
        ids_NK, logits_NK = kept.token_ids_NK[:, :slots], kept.logits_NK[:, :slots]
        return sampled_kl(student_NV, logits_NK, ids_NK, weights_NK, kept.logsumexp_NT[:, -1], usable_N, temperature)

    plain = temperature == of == 1
    name = f"{count} {'independent ' if independent else ''}draws" + (
        "" if plain else f" at T = {of:g}, used at {temperature:g}"
    )
    return Way(name, loss, seeds, temperature, ("sampled", count) if plain and not independent else None)


@dataclass(frozen=True)
class Errors:
    """In shares of the full KL and of the full gradient's norm; `noise` of one seed at a single position."""

    kl_bias: float
    kl_noise: float
    gradient_bias: float
    gradient_bias_high: float
    gradient_noise: float


def errors(at: Positions, way: Way) -> Errors:
    """Of `way`, against the full distributions."""
    temperature = way.temperature
    p_NV, q_NV = ((side / temperature).log_softmax(1) for side in (at.teacher_NV, at.student_NV))
    exact = temperature**2 * (p_NV.double().exp() * (p_NV - q_NV)).sum().item()
    exact_NV = temperature * (q_NV.exp() - p_NV.exp())
    norm = exact_NV.norm().item()
    values, mean_NV, squares = [], torch.zeros_like(exact_NV), 0.0
    for seed in range(way.seeds):
        leaf_NV = at.student_NV.clone().requires_grad_()
        value = way.loss(leaf_NV, seed)
        (found_NV,) = torch.autograd.grad(value, leaf_NV)
        values.append(value.item())
        mean_NV.add_(found_NV, alpha=1 / way.seeds)
        squares += float(torch.linalg.vector_norm(found_NV, dtype=torch.float64)) ** 2 / way.seeds
    distance = (mean_NV - exact_NV).double().square().sum().item()
    noise = max(0.0, squares - mean_NV.double().square().sum().item()) * way.seeds / max(1, way.seeds - 1)
    left = noise / way.seeds
    bias = max(0.0, distance - left)
    spread = float(np.std(values, ddof=1)) * math.sqrt(len(at.keys)) if way.seeds > 1 else 0.0
    return Errors(
        (float(np.mean(values)) - exact) / exact,
        spread / exact,
        math.sqrt(bias) / norm,
        math.sqrt(bias + left) / norm,
        math.sqrt(noise) / norm,
    )


def written(teacher: Remembered, prompts: PromptBuilder, examples: list[Example], way: tuple[str, int]) -> list[float]:
    """[bytes, ids] a position of a real cache of one shard, its text columns left out."""
    selector, k = way
    seed = 0 if selector == "sampled" else None
    capture = Capture(teacher, prompts, Shots(0, "shared", 0, {}), k, [1.0], STEP, 4096, sample_seed=seed)
    rows, quarantined = capture.shard(examples)
    words: list[str | None] = [str(i) for i in range(teacher.vocab_size)]
    manifest = Manifest.create(
        identity={"benchmark": "sampled_bias"},
        provenance={},
        selector=selector,
        top_k=k,
        vocab_size=teacher.vocab_size,
        temperatures=[1.0],
        step=STEP,
        store_ids=True,
        examples=len(examples),
        shard_examples=len(examples),
        vocabulary_sha256=vocabulary_sha256(words),
    )
    with tempfile.TemporaryDirectory() as folder:
        writer = CacheWriter.open(Path(folder) / "cache", manifest, words)
        record = writer.commit(0, rows, quarantined, {})
        metadata = pq.read_metadata(Path(folder) / "cache" / "shards" / record.file)
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    text = sum(c.total_compressed_size for c in columns if c.path_in_schema in TEXT_COLUMNS)
    return [(record.bytes - text) / record.positions, sum(map(ids_of, rows)) / record.positions]


def ids_of(row: CacheRow) -> int:
    """Ids kept, over all positions."""
    return row.logits.size if row.draws is None else int((row.draws > 0).sum())


def main() -> None:
    """Measure every way, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder with gsm8k/test.jsonl")
    parser.add_argument("--models", type=Path, default=Path("runs/trained-lm"), help="what trained_lm.py has made")
    parser.add_argument("--positions", type=int, default=96, help="at which bias and noise are measured")
    parser.add_argument("--repeats", type=int, default=20, help="seeds of the draws")
    parser.add_argument("--examples", type=int, default=24, help="in the caches whose bytes are counted")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data = data_folder(args.data)
    levels = sorted(args.models.glob("tokens-*/level.json"), key=lambda path: json.loads(path.read_text())["tokens"])
    if len(levels) < 2:
        print(
            f"skipped: it needs two levels of a trained model in {args.models}, found {len(levels)}; they are made by "
            f"python benchmarks/trained_lm.py --data {data} --work {args.models}"
        )
        sys.exit(0)
    folders = {"student": levels[0].parent, "teacher": levels[-1].parent}
    tokenizer = load_tokenizer(ModelSource(str(folders["teacher"]), None))
    tokenizer.chat_template = None  # the models were trained on plain text
    prompts = PromptBuilder(tokenizer)
    lines = (data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[: args.examples]
    texts = [json.loads(line) for line in lines]
    examples = [Example(f"test/{i}", "gsm8k", row["question"], row["answer"]) for i, row in enumerate(texts)]
    teacher, student = Remembered(folders["teacher"]), Remembered(folders["student"])
    at = chosen(teacher, student, prompts, examples, args.positions)
    print(f"{len(at.keys)} positions, {args.repeats} seeds", flush=True)
    rows = measure(at, args.repeats, lambda way: written(teacher, prompts, examples, way))
    conditions = {
        "teacher": json.loads(levels[-1].read_text()),
        "student": json.loads(levels[0].read_text()),
        "positions": f"{len(at.keys)} of {args.examples} answers of GSM8K's test split",
        "seeds": args.repeats,
        "full KL, nats a position": round(full_kl(at), 4),
    }
    finish("sampled_bias", rows, conditions, args.out)


def chosen(
    teacher: Remembered, student: Remembered, prompts: PromptBuilder, examples: list[Example], count: int
) -> Positions:
    """Positions spread evenly over the answers."""
    keys, pairs = [], []
    for example in examples:
        encoded = prompts.encode(example.prompt, example.answer)
        read = TeacherInput(encoded.input_ids, encoded.answer_start - 1)
        both = [torch.cat(list(side.answer_logits([read], []))) for side in (teacher, student)]
        at = np.linspace(0, read.rows - 1, -(-count // len(examples)), dtype=int)
        pairs.append([side[at] for side in both])
        keys += [(example.task, example.id, int(t)) for t in at]
    teacher_NV, student_NV = (torch.cat(side) for side in zip(*pairs, strict=True))
    return Positions(teacher_NV, student_NV, keys)


def full_kl(at: Positions) -> float:
    """Of the two full distributions, nats a position."""
    log_p_NV, log_q_NV = at.teacher_NV.double().log_softmax(1), at.student_NV.double().log_softmax(1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum().item() / len(at.keys)


def measure(at: Positions, seeds: int, write: Callable[[tuple[str, int]], list[float]]) -> list[Row]:
    """One row a way."""
    as_many, bytes_found = same_bytes(write)
    ways = [top(at, k, tail) for tail in (False, True) for k in (256, 50, 12)]
    ways += [drawn(at, n, seeds, independent=True) for n in (12, 50, 256)]
    ways += [drawn(at, n, seeds) for n in (12, 50, 256, as_many)]
    ways += [top(at, 256, True, 2.0), *(drawn(at, 256, seeds, *t) for t in ((2.0, 2.0), (1.0, 2.0), (2.0, 1.0)))]
    rows = []
    for way in ways:
        cached = None if way.cache is None else bytes_found.get(way.cache) or write(way.cache)
        rows.append(row_of(way, errors(at, way), cached, len(at.keys)))
        print(f"{way.name}: done", flush=True)
    return rows


def same_bytes(write: Callable[[tuple[str, int]], list[float]]) -> tuple[int, dict[tuple[str, int], list[float]]]:
    """The number of draws, to a tenth, that takes as many bytes as the top 256; and what was written for it."""
    found = {way: write(way) for way in (("topk", 256), ("sampled", 256), ("sampled", 2048))}
    wanted, low, high = (math.log(size) for size, _ in found.values())
    draws = 256 * (2048 / 256) ** ((wanted - low) / (high - low))
    return int(round(draws, 1 - int(math.log10(draws)))), found


def row_of(way: Way, found: Errors, cached: list[float] | None, positions: int) -> Row:
    """The gradient's bias is the figure; the rest stands beside it."""
    noise = f"{found.gradient_noise:.0%} noise, {found.gradient_noise / math.sqrt(OF_A_STEP):.1%} of a step's mean"
    error = 2 * found.kl_noise / math.sqrt(positions * way.seeds)
    divergence = f"KL off by {found.kl_bias:+.1%}" + (f" +- {error:.1%}" if way.seeds > 1 else "")
    taken = "" if cached is None else f"{cached[0]:.0f} bytes, {cached[1]:.1f} ids a position"
    note = "; ".join(filter(None, [noise if way.seeds > 1 else "", divergence, taken]))
    bias, high = 100 * found.gradient_bias, 100 * found.gradient_bias_high
    return Row(f"gradient bias, {way.name}", "the full distribution", bias, bias, high, "", "%", note)


if __name__ == "__main__":
    main()
