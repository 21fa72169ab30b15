"""What a probe of some examples and steps means for the whole experiment: pure arithmetic, no model, no torch.

Called by `python -m pipeline plan`. The numbers come from `stage1_teacher.probe` and `stage2_student.probe`, as they
wrote them. Seconds unless a name says otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.recipe import Recipe
from pipeline.sections import Cache

RANKS = (16, 32, 64, 128, 256, 512, 1024)  # the K that are looked at
BEYOND_AT_MOST = 0.01  # of the probability, at 90 % of the positions of every task
# Bytes of a rank where nothing was measured: benchmarks/cache_bytes.py found 352, 278 and 84 a position of 256 ranks
# at perplexity 16, of which 12 were other columns.
BYTES_A_RANK = {"fine": 1.33, "small": 1.04, "rank-only": 0.28}
BYTES_A_TOKEN = 4  # of the answer: its id, offsets and status
_BY_EXAMPLE = ("example_id", "task", "prompt", "answer", "answer_start")
_BY_SHARD = ("id_order", "footer")


@dataclass(frozen=True)
class Total:
    """An extrapolated count and its standard error (0 where everything was counted)."""

    value: float
    error: float

    def __str__(self) -> str:
        error = f"{self.error:,.0f}" if math.isfinite(self.error) else "?"
        return f"{self.value:,.0f}" + (f" +- {error}" if self.error else "")


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

    Text grows with examples (of those drawn, the unusable ones have no row), numbers with positions, the order of ids
    and the footer with shards.
    """
    sampled = sum(sum(of["positions"]) for of in probe["sample"].values())
    by_position, by_example = every.positions.value / sampled, every.examples / (every.n + probe["quarantined"])
    shards = math.ceil(every.examples / probe["shard_examples"])

    def factor(name: str) -> float:
        return by_example if name in _BY_EXAMPLE else shards if name in _BY_SHARD else by_position

    return {name: size * factor(name) for name, size in probe["column_bytes"].items()}


def estimated_bytes(probe: Mapping[str, Any], every: Counts, cache: Cache) -> float:
    """Bytes of the whole cache where nothing was run: BYTES_A_RANK, the top logit and two normalisers a temperature in
    float32, BYTES_A_TOKEN, and half of the text for what zstd leaves of it."""
    a_rank = BYTES_A_RANK[cache.codec if cache.store_ids else "rank-only"]
    a_position = cache.top_k * a_rank + 4 + 8 * len(cache.temperatures) + BYTES_A_TOKEN
    text: float = 0.5 * probe["text_bytes"] * every.examples / (every.n + probe["quarantined"])
    return every.positions.value * a_position + text


def stage1_seconds(probe: Mapping[str, Any], every: Counts) -> float:
    """Loading, and the sample's time in proportion to the tokens read. Encoding runs beside the teacher, so that the
    slower of the two counts. Worked examples that prompts share take nothing for one task, whose stage reads them once;
    of several tasks they are read again in every shard, and counted here as often as in the sample."""
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


@dataclass(frozen=True)
class Prices:
    """In one currency, whichever. months: how long the cache is kept."""

    gpu_hour: float
    gb_month: float
    months: float


@dataclass(frozen=True)
class Plan:
    """All that is known beforehand. What only a run can tell is None in a dry plan.

    column_bytes: of the whole cache by column. hours, money: when the cache has cost less than a teacher online; None
    where no arm needs a teacher. beyond: of stage 1's probe; None where the engine shows no full logits.
    """

    dry: bool
    tasks: dict[str, Counts]
    every: Counts
    quarantined: int  # of the examples drawn
    bytes: float
    bytes_error: float
    column_bytes: dict[str, float] | None
    device: str | None
    stage1_hours: float | None
    stage2_hours: float | None
    stage1_peak_bytes: int | None
    stage2_peak_bytes: int | None
    step_s: dict[str, dict[str, float]]  # student -> arm -> seconds of a step
    dropped: dict[str, int]  # student -> examples of the sample that it cannot read
    teacher_s_per_example: float | None
    runs: int  # trainings in all
    teacher_runs: int  # those that need a teacher
    kept: float | None  # what keeping the cache costs
    prices: Prices
    hours: BreakEven | None
    money: BreakEven | None
    beyond: dict[str, Any] | None
    k: int | None  # recommended


def plan_of(
    recipe: Recipe, teacher: Mapping[str, Any], students: Mapping[str, Mapping[str, Any]], prices: Prices
) -> Plan:
    """teacher: of stage 1's probe. students: by name, of stage 2's; none where nothing was run."""
    tasks = counts(teacher)
    every = summed(tasks)
    cache, dry = recipe.cache, bool(teacher["dry"])
    columns = None if dry else cache_bytes(teacher, every)
    size = estimated_bytes(teacher, every, cache)
    size = size if columns is None else sum(columns.values())
    kept = size / 1e9 * prices.gb_month * prices.months
    runs = trainings(recipe, students)
    taught = [run for run in runs if run.needs_teacher]
    stage1_s = per_example = None
    hours = money = None
    if not dry:
        stage1_s = stage1_seconds(teacher, every)
        per_example = teacher["capture_s"] / every.n
        if taught:
            hours = in_hours(stage1_s, taught, per_example)
            money = in_money(hours, prices.gpu_hour, kept)
    beyond = teacher.get("beyond")
    return Plan(
        dry=dry,
        tasks=tasks,
        every=every,
        quarantined=teacher["quarantined"],
        bytes=size,
        bytes_error=size * every.positions.error / every.positions.value,
        column_bytes=columns,
        device=teacher.get("device"),
        stage1_hours=None if stage1_s is None else stage1_s / 3600,
        stage2_hours=None if dry else stage2_seconds(runs, students) / 3600,
        stage1_peak_bytes=teacher.get("peak_bytes"),
        stage2_peak_bytes=max((found["peak_bytes"] for found in students.values()), default=None),
        step_s={name: dict(found["step_s"]) for name, found in students.items()},
        dropped={name: found["dropped"] for name, found in students.items()},
        teacher_s_per_example=per_example,
        runs=len(recipe.students) * len(recipe.arm_runs),
        teacher_runs=len(recipe.students) * sum(recipe.arms[run.arm].needs_teacher for run in recipe.arm_runs),
        kept=kept,
        prices=prices,
        hours=hours,
        money=money,
        beyond=beyond,
        k=None if beyond is None else recommended_k(beyond),
    )


def trainings(recipe: Recipe, students: Mapping[str, Mapping[str, Any]]) -> list[Run]:
    """Every training of every student that was measured."""
    train = recipe.train
    return [
        Run(
            f"{name}/{run.name}",
            found["step_s"][run.arm],
            train.steps,
            train.batch_size,
            recipe.arms[run.arm].needs_teacher,
        )
        for name, found in students.items()
        for run in recipe.arm_runs
    ]


def stage2_seconds(runs: Sequence[Run], students: Mapping[str, Mapping[str, Any]]) -> float:
    """All trainings one after another, and loading each student once."""
    loading: float = sum(found["load_s"] for found in students.values())
    return sum(run.seconds for run in runs) + loading
