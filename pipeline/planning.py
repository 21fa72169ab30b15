"""What a probe of some examples and steps means for the whole experiment: pure arithmetic, no model, no torch.

Called by `python -m pipeline plan`. The numbers come from `stage1_teacher.probe` and `stage2_student.probe`, as they
wrote them. Seconds unless a name says otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RANKS = (16, 32, 64, 128, 256, 512, 1024)  # the K that are looked at
BEYOND_AT_MOST = 0.01  # of the probability, at 90 % of the positions of every task
# Bytes of a rank where nothing was measured: benchmarks/cache_bytes.py found 352, 278 and 84 a position of 256 ranks.
BYTES_A_RANK = {"fine": 1.38, "small": 1.09, "rank-only": 0.33}
_BY_EXAMPLE = ("example_id", "task", "prompt", "answer", "answer_start")
_BY_SHARD = ("id_order", "footer")


@dataclass(frozen=True)
class Total:
    """An extrapolated count and its standard error (0 where everything was counted)."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:,.0f}" + (f" +- {self.error:,.0f}" if self.error else "")


def total_of(sample: Sequence[float], population: int) -> Total:
    """The sum over `population` items, from a random sample without replacement of them.

    Cochran, Sampling Techniques, 2.6: N * mean, with the error N * s / sqrt(n) * sqrt(1 - n / N). One item of several
    says nothing of its spread: the error is infinite.
    """
    n = len(sample)
    if n == 0:
        return Total(0.0, math.inf if population else 0.0)
    mean = sum(sample) / n
    if n >= population:
        return Total(mean * population, 0.0)
    if n == 1:
        return Total(mean * population, math.inf)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in sample) / (n - 1))
    return Total(mean * population, population * deviation / math.sqrt(n) * math.sqrt(1 - n / population))


def added(totals: Sequence[Total]) -> Total:
    """The sum of independent totals."""
    return Total(sum(t.value for t in totals), math.sqrt(sum(t.error**2 for t in totals)))


@dataclass(frozen=True)
class Counts:
    """Of one task, or of all: what stage 1 will read and cache. n: usable examples of the sample."""

    examples: int
    n: int
    positions: Total
    whole: Total  # tokens the teacher would read with the worked examples before every prompt
    own: Total  # tokens it does read, those that all prompts share left out


def counts(probe: Mapping[str, Any]) -> dict[str, Counts]:
    """By task. Of a sample some examples may be unusable: the others stand for the same share of the whole."""
    drawn = sum(len(of["positions"]) for of in probe["sample"].values()) + probe["quarantined"]
    usable = (drawn - probe["quarantined"]) / drawn
    found = {}
    for task, examples in probe["tasks"].items():
        of = probe["sample"].get(task, {"positions": [], "whole": [], "own": []})
        size = max(len(of["positions"]), round(examples * usable)) if of["positions"] else 0
        numbers = (total_of(of[key], size) for key in ("positions", "whole", "own"))
        found[task] = Counts(examples, len(of["positions"]), *numbers)
    return found


def summed(tasks: Mapping[str, Counts]) -> Counts:
    """All tasks together."""
    every = list(tasks.values())
    positions, whole, own = (added([getattr(c, key) for c in every]) for key in ("positions", "whole", "own"))
    return Counts(sum(c.examples for c in every), sum(c.n for c in every), positions, whole, own)


def cache_bytes(probe: Mapping[str, Any], every: Counts) -> dict[str, float]:
    """Bytes of the whole cache by column, from those of the sample encoded as one real shard.

    Text grows with examples, numbers with positions, the order of ids and the footer with shards.
    """
    sampled = sum(sum(of["positions"]) for of in probe["sample"].values())
    by_position, by_example = every.positions.value / sampled, every.examples / every.n
    shards = math.ceil(every.examples / probe["shard_examples"])

    def factor(name: str) -> float:
        return by_example if name in _BY_EXAMPLE else shards if name in _BY_SHARD else by_position

    return {name: size * factor(name) for name, size in probe["column_bytes"].items()}


def estimated_bytes(probe: Mapping[str, Any], every: Counts, top_k: int, codec: str, store_ids: bool) -> float:
    """Bytes of the whole cache where nothing was run: BYTES_A_RANK, and half of the text for what zstd leaves of it."""
    a_rank = BYTES_A_RANK[codec if store_ids else "rank-only"]
    text: float = 0.5 * probe["text_bytes"] * every.examples / every.n
    return every.positions.value * top_k * a_rank + text


def stage1_seconds(probe: Mapping[str, Any], every: Counts) -> float:
    """Loading, and the sample's time in proportion to the tokens read. Encoding runs beside the teacher, so that the
    slower of the two counts. Reading the worked examples is in the sample's time."""
    sampled = sum(sum(of["own"]) for of in probe["sample"].values())
    working: float = max(probe["capture_s"], probe["encode_s"]) * every.own.value / sampled
    return float(probe["load_s"]) + working


@dataclass(frozen=True)
class Run:
    """One training of one arm of one student: what it takes from a cache, and what it needs of a teacher."""

    label: str
    step_s: float
    steps: int
    batch_size: int
    needs_teacher: bool

    @property
    def seconds(self) -> float:
        return self.step_s * self.steps

    def online_seconds(self, teacher_s_per_example: float) -> float:
        """With the teacher beside it, which reads every step's examples again."""
        return self.steps * (self.step_s + self.batch_size * teacher_s_per_example)


@dataclass(frozen=True)
class BreakEven:
    """How many runs it takes until the cache has cost less. runs: None is never."""

    runs: int | None
    cache: float  # what the cache costs, in hours or in money
    cached_run: float  # what a run costs that reads it
    online_run: float  # what it costs with the teacher online


def break_even(cache: float, cached_run: float, online_run: float) -> BreakEven:
    """The smallest number of runs R with cache + R * cached_run < R * online_run."""
    saved = online_run - cached_run
    runs = math.floor(cache / saved) + 1 if saved > 0 else None
    return BreakEven(runs, cache, cached_run, online_run)


def in_hours(stage1_s: float, runs: Sequence[Run], teacher_s_per_example: float) -> BreakEven:
    """Of the average run that needs a teacher. Raises ZeroDivisionError where none does."""
    cached = sum(run.seconds for run in runs) / len(runs)
    online = sum(run.online_seconds(teacher_s_per_example) for run in runs) / len(runs)
    return break_even(stage1_s / 3600, cached / 3600, online / 3600)


def in_money(hours: BreakEven, gpu_hour: float, kept: float) -> BreakEven:
    """The same at a price: kept is what keeping the cache costs in all."""
    return break_even(hours.cache * gpu_hour + kept, hours.cached_run * gpu_hour, hours.online_run * gpu_hour)


def recommended_k(beyond: Mapping[str, Any]) -> int | None:
    """The smallest K of RANKS beyond which 90 % of the positions of every task have less than BEYOND_AT_MOST of the
    teacher's probability; None where none that was looked at is enough."""
    wholes = [places["all"] for places in beyond["tasks"].values() if places["all"]["n"]]
    for index, k in enumerate(beyond["ranks"]):
        if k in RANKS and wholes and all(whole["p90"][index] < BEYOND_AT_MOST for whole in wholes):
            return int(k)
    return None


def k_reason(losses: Sequence[str]) -> str:
    """What K means to the losses in use, a sentence each."""
    said = {
        "logit_mse": "logit_mse sees nothing beyond K: what lies there does not train at all.",
        "kl": "kl puts what lies beyond K into one bucket: its sum is taught exactly, its shape is not.",
        "uld": "uld puts the ranks beyond K into one bucket: their sum is compared, their order is not.",
    }
    return " ".join(said[loss] for loss in losses if loss in said)
