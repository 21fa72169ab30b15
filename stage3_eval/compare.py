"""Statistics of scores: how sure a number is, and whether two arms differ. Pure; called by `results`.

Two conditions are always compared on the same examples, pair by pair. Right-or-wrong scores get exact tests of
proportions, other scores the bootstrap (seeded, so a report is a function of its predictions).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

Values = Sequence[float] | npt.NDArray[np.float64]

Z_95 = 1.959963984540054  # the 97.5 % point of the normal distribution
_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over n examples, its standard error and its 95 % interval."""

    n: int
    mean: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean of a minus mean of b over the same n examples, its 95 % interval, and the two-sided p-value of none.

    better, worse: examples where a scored above b, and below.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    better: int
    worse: int
    test: str


def is_binary(values: Values) -> bool:
    """Whether every score is right (1) or wrong (0)."""
    return all(value in (0.0, 1.0) for value in values)


def estimate(values: Values) -> Estimate:
    """Mean with Wilson's interval for right-or-wrong scores, else with a bootstrap interval."""
    x = np.asarray(values, dtype=np.float64)
    n, mean = len(x), float(x.mean())
    if is_binary(values):
        low, high = wilson(round(x.sum()), n)
        return Estimate(n, mean, sqrt(mean * (1 - mean) / n), low, high)
    low, high = _percentiles(_resampled_means(x))
    return Estimate(n, mean, float(x.std(ddof=1) / sqrt(n)) if n > 1 else 0.0, low, high)


def difference(a: Values, b: Values) -> Difference:
    """a minus b, pair by pair: exact McNemar and Newcombe's interval, or the paired bootstrap for other scores."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"paired scores of the same examples are needed, found {x.shape} and {y.shape}")
    better, worse = int((x > y).sum()), int((x < y).sum())
    mean = float((x - y).mean())
    if is_binary(a) and is_binary(b):
        both = int(((x == 1) & (y == 1)).sum())
        low, high = newcombe_paired(both, better, worse, len(x) - both - better - worse)
        return Difference(len(x), mean, low, high, mcnemar(better, worse), better, worse, "exact McNemar")
    low, high, p = paired_bootstrap(x, y)
    return Difference(len(x), mean, low, high, p, better, worse, "paired bootstrap")


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), which stays inside [0, 1] and holds at 0 and n."""
    p, z2 = successes / n, Z_95**2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return low, high


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value that discordant pairs fall either way alike (McNemar 1947, binomial form)."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def newcombe_paired(both: int, better: int, worse: int, neither: int) -> tuple[float, float]:
    """95 % interval of p_a - p_b on pairs: Newcombe 1998 (Statistics in Medicine 17, 2635), method 10.

    Squares and adds the distances to the Wilson limits of the two proportions, less what their correlation explains.
    It suits small samples and proportions near 0 and 1, where the normal interval fails.
    """
    n = both + better + worse + neither
    p_a, p_b = (both + better) / n, (both + worse) / n
    low_a, high_a = wilson(both + better, n)
    low_b, high_b = wilson(both + worse, n)
    margins = (both + better) * (worse + neither) * (both + worse) * (better + neither)
    covariance: float = both * neither - better * worse
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)  # his continuity correction
    phi = covariance / sqrt(margins) if margins else 0.0
    down_a, up_a, down_b, up_b = p_a - low_a, high_a - p_a, p_b - low_b, high_b - p_b
    below = sqrt(max(down_a**2 - 2 * phi * down_a * up_b + up_b**2, 0))
    above = sqrt(max(up_a**2 - 2 * phi * up_a * down_b + down_b**2, 0))
    return p_a - p_b - below, p_a - p_b + above


def paired_bootstrap(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """95 % percentile interval of mean(a - b), and the two-sided p-value of no difference.

    Examples are drawn with replacement, pairs kept together. p: twice the share of resampled means on the other side
    of zero, each tail counting one more so that p is never zero (Davison and Hinkley 1997, 4.2).
    """
    delta = a - b
    if not delta.any():
        return 0.0, 0.0, 1.0
    means = _resampled_means(delta)
    low, high = _percentiles(means)
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return low, high, min(1.0, 2 * float(tail + 1) / (len(means) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being looked at together (Holm 1979): the family-wise error stays below the level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def _resampled_means(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Means of bootstrap samples, drawn in blocks so that memory stays below 80 MB."""
    rng = np.random.default_rng(_SEED)
    block = max(1, min(_RESAMPLES, 10_000_000 // len(x)))
    counts = [min(block, _RESAMPLES - start) for start in range(0, _RESAMPLES, block)]
    return np.concatenate([x[rng.integers(0, len(x), (count, len(x)))].mean(1) for count in counts])


def _percentiles(means: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
