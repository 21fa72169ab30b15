"""A plan in words and tables, for a terminal. Called by `python -m pipeline plan`; pure."""

import math
from typing import Any

from pipeline.markdown import markdown
from pipeline.planning import BEYOND_AT_MOST, BYTES_A_RANK, BreakEven, Counts, Plan, k_reason
from pipeline.recipe import Recipe

_LOSSES = ("logit_mse", "kl", "uld")


def told(recipe: Recipe, plan: Plan) -> str:
    """The whole plan."""
    parts = [_work(recipe, plan), _cache(recipe, plan)]
    if plan.dry:
        parts.append(
            "No model was run: no hours, memory or break-even, and nothing on the probability beyond K. "
            "Leave out --dry to measure them."
        )
    else:
        parts += [_time(recipe, plan), _break_even(plan), _beyond(recipe, plan)]
    return "\n\n".join(parts)


def _work(recipe: Recipe, plan: Plan) -> str:
    def line(name: str, c: Counts) -> tuple[str, ...]:
        return name, f"{c.examples:,}", str(c.n), str(c.positions), str(c.whole), str(c.own)

    head = ("task", "examples", "sampled", "positions", "tokens, context read each time", "tokens, context read once")
    rows = [line(name, c) for name, c in plan.tasks.items()]
    if len(plan.tasks) > 1:
        rows.append(line("all", plan.every))
    whole, own = plan.every.whole.value, plan.every.own.value
    shared = (
        f"With the worked examples that all prompts share read once, the teacher reads {whole / own:.1f} times fewer."
        if whole > own
        else "The prompts share no worked examples, so nothing is read once for all."
    )
    lost = (
        f"\n{plan.quarantined} of the examples drawn cannot be used (stage 1 names them)." if plan.quarantined else ""
    )
    return (
        f"{recipe.name}: what the teacher reads\n\n{markdown(head, rows)}\n\n+- is one standard error. {shared}{lost}"
    )


def _cache(recipe: Recipe, plan: Plan) -> str:
    cache = recipe.cache
    spread = f" +- {size(plan.bytes_error)}" if 0 < plan.bytes_error < math.inf else ""
    a_position = plan.bytes / plan.every.positions.value
    first = f"Cache: {size(plan.bytes)}{spread}, {a_position:,.1f} bytes a position of {cache.top_k} ranks"
    if plan.column_bytes is None:
        rank = BYTES_A_RANK[cache.codec if cache.store_ids else "rank-only"]
        return (
            f"{first}\n  an estimate: {rank} bytes a rank, as benchmarks/cache_bytes.py found with 256 of 151,936 ids, "
            "normalisers and half of the text"
        )
    rows = [
        (name, size(value), f"{100 * value / plan.bytes:.1f}")
        for name, value in sorted(plan.column_bytes.items(), key=lambda item: -item[1])
        if value / plan.bytes >= 0.001
    ]
    return f"{first}\n\n{markdown(('column', 'bytes', '%'), rows)}"


def _time(recipe: Recipe, plan: Plan) -> str:
    assert plan.stage1_hours is not None and plan.stage2_hours is not None
    lines = [
        f"Time and peak memory on this device, {plan.device}, one process; memory is that of the sample, and fuller "
        "batches or longer examples take more",
        f"  stage 1: {duration(plan.stage1_hours)}, {size(plan.stage1_peak_bytes or 0)}",
        f"  stage 2: {duration(plan.stage2_hours)}, {size(plan.stage2_peak_bytes or 0)}; "
        f"{plan.runs} runs of {recipe.train.steps:,} steps, without their checkpoints",
    ]
    for student, arms in plan.step_s.items():
        steps = ", ".join(f"{arm} {seconds:.3g} s" for arm, seconds in arms.items())
        lost = f"; {plan.dropped[student]} of the sample do not fit it" if plan.dropped[student] else ""
        lines.append(f"    a step of {student}: {steps}{lost}")
    return "\n".join(lines)


def _break_even(plan: Plan) -> str:
    if plan.hours is None or plan.money is None:
        return "Break-even: never. No arm of this recipe needs a teacher."
    assert plan.teacher_s_per_example is not None and plan.kept is not None
    prices = plan.prices

    def said(even: BreakEven, amount: Any) -> str:
        runs = (
            "never: an online run costs no more"
            if even.runs is None
            else f"from the first run on ({plan.teacher_runs} planned)"
            if even.runs <= 1
            else f"from run {even.runs:,} on ({plan.teacher_runs} planned)"
        )
        each = f"{amount(even.cached_run)} a run from it, {amount(even.online_run)} a run with the teacher online"
        return f"{runs}; the cache {amount(even.cache)}, {each}"

    return "\n".join(
        [
            "Break-even: the cache has cost less than a teacher online",
            f"  in time    {said(plan.hours, duration)}",
            f"  in money   {said(plan.money, money)}",
            f"  at {prices.gpu_hour:g} an hour of the device and {prices.gb_month:g} a GB-month, kept "
            f"{prices.months:g} month{'' if prices.months == 1 else 's'} ({money(plan.kept)})",
            f"  online is taken at its best: every step's examples read with the shared context kept and the head on "
            f"answer rows alone, {plan.teacher_s_per_example:.3g} s an example as measured here, no memory lost to it",
        ]
    )


def _beyond(recipe: Recipe, plan: Plan) -> str:
    if plan.beyond is None:
        return (
            "Probability beyond K: not known. vLLM shows no full logits; --set teacher.engine=hf measures it with "
            "transformers."
        )
    found, k = plan.beyond, recipe.cache.top_k
    head = ("task", "answer tokens", "n", *(f"K={rank}" for rank in found["ranks"]))
    rows = [
        (
            task,
            place,
            f"{of['n']:,}",
            *(f"{_percent(m)} / {_percent(p)}" for m, p in zip(of["median"], of["p90"], strict=True)),
        )
        for task, places in found["tasks"].items()
        for place, of in places.items()
        if of["n"]
    ]
    losses = [name for name in _LOSSES if any(getattr(arm, name) > 0 for arm in recipe.arms.values())]
    percent = f"{100 * BEYOND_AT_MOST:g} %"
    if plan.k is None:
        advice = f"No K of these leaves less than {percent} beyond it at 90 % of the positions of every task."
    else:
        same = "as the recipe has it" if plan.k == k else f"the recipe has {k}; --set cache.top_k={plan.k}"
        advice = (
            f"Recommended: K = {plan.k} ({same}), the smallest here beyond which 90 % of the positions of every task"
        )
        advice += f" have less than {percent}."
    if recipe.cache.selector == "sampled":
        advice = "The recipe draws its ids (selector sampled): what lies beyond the largest K is not lost to it."
    table = markdown(head, rows, texts=2)
    return (
        f"Teacher's probability beyond the K largest logits, %, median / 90th percentile, at temperature "
        f"{found['temperature']:g}\n\n{table}\n\n{advice} {k_reason(losses)}".rstrip()
    )


def _percent(share: float) -> str:
    """Of a probability; what is smaller than anyone cares about is 0."""
    return "0" if share < 1e-7 else f"{100 * share:.2g}"


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def money(amount: float) -> str:
    """Whatever the currency."""
    return f"{amount:,.2f}" if amount >= 10 else f"{amount:.3g}"


def duration(hours: float) -> str:
    """For people: seconds, minutes or hours."""
    if math.isinf(hours):
        return "for ever"
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    return f"{hours * 60:.2g} min" if hours < 1 else f"{hours:,.1f} h"
