"""Statistics of scores: how sure a number is, and whether two arms differ. Pure; called by `report.results`.

Two conditions are always compared on the same examples, pair by pair. Right-or-wrong scores get exact tests of
proportions, other scores the bootstrap (seeded, so a report is a function of its predictions). A corpus score (BLEU)
is no mean over examples: what the bootstrap draws and sums is each example's statistics.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import hypot, sqrt

import numpy as np
import numpy.typing as npt

Values = Sequence[float] | npt.NDArray[np.float64]

Z_95 = 1.959963984540054  # the 97.5 % point of the normal distribution
_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True, eq=False)
class Corpus:
    """A score of all examples together. statistics: [n, d], a row an example; of_sum: their sum [d] -> [0, 1]."""

    statistics: npt.NDArray[np.float64]
    of_sum: Callable[[npt.NDArray[np.float64]], float]

    @cached_property
    def resampled(self) -> npt.NDArray[np.float64]:
        """Scores of bootstrap samples, each from the sum of the statistics of the examples drawn.

        Always the same draws, since the generator is seeded: what pairs two corpora, and what may be kept.
        """
        n = len(self.statistics)
        sums = (np.bincount(sample, minlength=n) @ self.statistics for drawn in _draws(n) for sample in drawn)
        return np.array([self.of_sum(row) for row in sums])


@dataclass(frozen=True)
class Measured:
    """One metric on n examples.

    values: a score of each example in [0, 1]; 0 where the prediction cannot be read, which `unparsable` counts.
    corpus: set where the reported score is not the mean of `values`. note: what the results should say beside it.
    """

    values: tuple[float, ...]
    unparsable: int = 0
    corpus: Corpus | None = None
    note: str = ""


@dataclass(frozen=True)
class Estimate:
    """A score over n examples (their mean, or the corpus score), its standard error and its 95 % interval."""

    n: int
    mean: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Score of a minus score of b over the same n examples, its error and interval, and the two-sided p-value of none.

    mean: the difference; standard_error: of it, over examples. better, worse: examples where a scored above b, below.
    """

    n: int
    mean: float
    standard_error: float
    low: float
    high: float
    p: float
    better: int
    worse: int
    test: str


@dataclass(frozen=True)
class SeedsEstimate:
    """The mean over repeats of training, with the share of the seeds and of the examples in its error."""

    mean: float
    standard_error: float
    low: float
    high: float
    values: tuple[float, ...]


def is_binary(values: Values) -> bool:
    """Whether every score is right (1) or wrong (0)."""
    return all(value in (0.0, 1.0) for value in values)


def estimate(measured: Measured | Values, graded: bool = False) -> Estimate:
    """Wilson's interval for right-or-wrong scores, else the bootstrap's; of a corpus score its error too.

    graded: the metric knows scores between right and wrong, even if none of these is one.
    """
    values, corpus = _parts(measured)
    x = np.asarray(values, dtype=np.float64)
    n, mean = len(x), float(x.mean())
    if corpus is not None:
        scores = corpus.resampled
        return Estimate(n, _of_all(corpus), float(scores.std(ddof=1)), *_percentiles(scores))
    if is_binary(values) and not graded:
        low, high = wilson(round(x.sum()), n)
        return Estimate(n, mean, sqrt(mean * (1 - mean) / n), low, high)
    return Estimate(n, mean, _error_of_mean(x), *_percentiles(_resampled_means(x)))


def difference(a: Measured | Values, b: Measured | Values, graded: bool = False) -> Difference:
    """a minus b, pair by pair: exact McNemar and Newcombe's interval, or the paired bootstrap for other scores.

    graded: as for `estimate`. Raises ValueError where the two are not scores of the same number of examples, or one
    alone is a corpus score.
    """
    (of_a, corpus_a), (of_b, corpus_b) = _parts(a), _parts(b)
    x, y = np.asarray(of_a, dtype=np.float64), np.asarray(of_b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x) or (corpus_a is None) != (corpus_b is None):
        raise ValueError(f"paired scores of the same examples are needed, found {x.shape} and {y.shape}")
    n, better, worse = len(x), int((x > y).sum()), int((x < y).sum())
    if corpus_a is not None and corpus_b is not None:
        deltas = corpus_a.resampled - corpus_b.resampled
        delta, error = _of_all(corpus_a) - _of_all(corpus_b), float(deltas.std(ddof=1))
        return Difference(n, delta, error, *_interval_and_p(deltas), better, worse, "paired bootstrap of the corpus")
    delta = float((x - y).mean())
    if is_binary(of_a) and is_binary(of_b) and not graded:
        both = int(((x == 1) & (y == 1)).sum())
        low, high = newcombe_paired(both, better, worse, n - both - better - worse)
        error = sqrt((better + worse) / n - delta**2) / sqrt(n)
        return Difference(n, delta, error, low, high, mcnemar(better, worse), better, worse, "exact McNemar")
    return Difference(n, delta, _error_of_mean(x - y), *paired_bootstrap(x, y), better, worse, "paired bootstrap")


def over_seeds(repeats: Sequence[Estimate | Difference]) -> SeedsEstimate:
    """The mean of S repeats of training, or of S differences paired by seed, with a 95 % interval of two sources.

    Which seed, and which examples were drawn; on either side their shares are added in quadrature:

        sqrt((t_{S-1} s / sqrt(S))^2 + d^2)      s: deviation over seeds, d: mean distance to the limit on that side

    All repeats are scored on the same examples, so d does not shrink with S: equal repeats have the interval of one,
    as lopsided as Wilson's is near 0 and 100 %. Raises ValueError for fewer than two repeats: one seed says nothing
    about seeds.
    """
    from scipy.stats import t

    if len(repeats) < 2:
        raise ValueError(f"two seeds or more are needed, found {len(repeats)}")
    values = [repeat.mean for repeat in repeats]
    mean, of_seeds = statistics.fmean(values), _of_seeds(values)
    of_examples = statistics.fmean(repeat.standard_error for repeat in repeats)
    half = float(t.ppf(0.975, len(values) - 1)) * of_seeds
    below = statistics.fmean(repeat.mean - repeat.low for repeat in repeats)
    above = statistics.fmean(repeat.high - repeat.mean for repeat in repeats)
    return SeedsEstimate(
        mean, hypot(of_seeds, of_examples), mean - hypot(half, below), mean + hypot(half, above), tuple(values)
    )


def p_over_seeds(repeats: Sequence[Difference]) -> float:
    """Two-sided p-value of no difference: the level at which the interval of `over_seeds` would end at zero.

    That is the p at which |mean|^2 = (t_{S-1}(p) s / sqrt(S))^2 + (z(p) e)^2, with the quantiles t and z that leave
    p / 2 above them; e: the distance d on the side of zero, which holds 1.96 of it.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm, t

    values = [repeat.mean for repeat in repeats]
    mean, of_seeds = statistics.fmean(values), _of_seeds(values)
    distances = (repeat.mean - repeat.low if mean > 0 else repeat.high - repeat.mean for repeat in repeats)
    of_examples, size = statistics.fmean(distances) / Z_95, abs(mean)
    if size == 0 or of_seeds == of_examples == 0:
        return float(size == 0)

    def excess(z: float) -> float:
        """Of the interval's half-width over the mean, at the level whose normal quantile is z."""
        return hypot(float(t.isf(norm.sf(z), len(values) - 1)) * of_seeds, z * of_examples) - size

    farthest = 37.0  # beyond it the normal tail is no number any more
    return 2 * float(norm.sf(brentq(excess, 0.0, farthest) if excess(farthest) > 0 else farthest))


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
    return _interval_and_p(_resampled_means(delta))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being looked at together (Holm 1979): the family-wise error stays below the level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def _parts(measured: Measured | Values) -> tuple[Values, Corpus | None]:
    return (measured.values, measured.corpus) if isinstance(measured, Measured) else (measured, None)


def _of_all(corpus: Corpus) -> float:
    return corpus.of_sum(corpus.statistics.sum(0))


def _of_seeds(values: Sequence[float]) -> float:
    """Standard error of the mean over seeds."""
    return statistics.stdev(values) / sqrt(len(values))


def _error_of_mean(x: npt.NDArray[np.float64]) -> float:
    return float(x.std(ddof=1) / sqrt(len(x))) if len(x) > 1 else 0.0


def _draws(n: int) -> Iterator[npt.NDArray[np.int64]]:
    """Bootstrap samples of n examples, [draws, n] at a time so that memory stays below 80 MB."""
    rng = np.random.default_rng(_SEED)
    block = max(1, min(_RESAMPLES, 10_000_000 // n))
    for start in range(0, _RESAMPLES, block):
        yield rng.integers(0, n, (min(block, _RESAMPLES - start), n))


def _resampled_means(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.concatenate([x[drawn].mean(1) for drawn in _draws(len(x))])


def _percentiles(scores: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def _interval_and_p(deltas: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Interval of resampled differences, and the two-sided p-value (see `paired_bootstrap`)."""
    tail = min((deltas <= 0).sum(), (deltas >= 0).sum())
    return *_percentiles(deltas), min(1.0, 2 * float(tail + 1) / (len(deltas) + 1))
