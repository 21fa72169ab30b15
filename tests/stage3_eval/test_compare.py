"""Statistics against published numbers and against each other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage3_eval.compare import (
    Z_95,
    Corpus,
    Estimate,
    Measured,
    difference,
    estimate,
    holm,
    is_binary,
    mcnemar,
    newcombe_paired,
    over_seeds,
    paired_bootstrap,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_newcombes_table(successes, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17, 857: table I, method 3."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_agrees_with_scipy():
    from scipy.stats import binomtest

    for successes in (0, 1, 7, 50, 99, 100):
        expected = binomtest(successes, 100).proportion_ci(method="wilson")
        assert wilson(successes, 100) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_mcnemar_textbook():
    """Fagerland, Lydersen and Laake 2013 (BMC Med Res Meth 13:91), airway hyper-responsiveness: 1 and 7 discordant."""
    assert mcnemar(1, 7) == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar(7, 1) == mcnemar(1, 7)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 10) == pytest.approx(2 / 2**10)
    assert mcnemar(5, 5) == 1.0


def test_newcombe_paired_textbook():
    """The same table, 1 both, 1 and 7 discordant, 12 neither: -0.507 to -0.026 (Fagerland et al. 2014)."""
    assert newcombe_paired(1, 1, 7, 12) == pytest.approx((-0.507, -0.026), abs=5e-4)


@given(st.tuples(*[st.integers(0, 60)] * 4).filter(any))
def test_newcombe_holds_the_difference_and_is_antisymmetric(cells):
    both, better, worse, neither = cells
    low, high = newcombe_paired(both, better, worse, neither)
    observed = (better - worse) / sum(cells)
    assert -1 - 1e-9 <= low <= observed + 1e-9
    assert observed - 1e-9 <= high <= 1 + 1e-9
    assert newcombe_paired(both, worse, better, neither) == pytest.approx((-high, -low))


def test_difference_counts_pairs():
    a = [1.0] * 60 + [0.0] * 20 + [1.0] * 15 + [0.0] * 5
    b = [1.0] * 60 + [0.0] * 20 + [0.0] * 15 + [1.0] * 5
    found = difference(a, b)
    assert (found.n, found.better, found.worse, found.test) == (100, 15, 5, "exact McNemar")
    assert found.mean == pytest.approx(0.10)
    assert found.standard_error == pytest.approx(np.std(np.array(a) - b) / 10)
    assert found.p == pytest.approx(0.0414, abs=5e-5)  # 2 * P(X <= 5), X ~ B(20, 1/2)
    assert found.low < 0.10 < found.high


def test_an_estimate_of_right_and_wrong():
    found = estimate([1.0] * 81 + [0.0] * 182)
    assert (found.n, found.mean) == (263, pytest.approx(81 / 263))
    assert found.standard_error == pytest.approx(0.02847, abs=5e-6)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_other_scores_get_the_bootstrap():
    values = np.random.default_rng(1).random(400).tolist()
    found = estimate(values)
    half = 1.96 * float(np.std(values, ddof=1)) / 20
    assert found.standard_error == pytest.approx(half / 1.96)
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.003)


def test_the_paired_bootstrap_sees_what_pairs_share():
    rng = np.random.default_rng(2)
    hard = rng.random(300) * 0.8
    better = hard + 0.03 + 0.02 * rng.standard_normal(300)
    found = difference(better.tolist(), hard.tolist())
    assert found.test == "paired bootstrap"
    assert 0.02 < found.low < 0.03 < found.high < 0.04  # unpaired, the interval would be +-0.04 wide
    assert found.p == pytest.approx(2 / 10_001)
    assert found.standard_error == pytest.approx(0.02 / np.sqrt(300), rel=0.15)
    assert difference(better.tolist(), hard.tolist()) == found  # seeded
    unrelated = difference(rng.permutation(hard).tolist(), hard.tolist())
    assert unrelated.p > 0.5


def test_the_bootstrap_of_no_difference_is_no_difference():
    same = np.array([0.2, 0.4, 0.9])
    assert paired_bootstrap(same, same.copy()) == (0.0, 0.0, 1.0)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="paired scores"):
        difference([1.0, 0.0], [1.0])


def test_right_or_wrong_is_seen():
    assert is_binary([0.0, 1.0, 1.0])
    assert not is_binary([0.0, 0.5])


def test_holm_textbook():
    """Holm 1979: the smallest times m, the next times m - 1, ..., never below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7]) == [0.7]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_helps(p_values):
    adjusted = holm(p_values)
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert all(p <= a <= 1.0 for p, a in pairs)
    assert [a for _, a in pairs] == sorted(adjusted)  # the order of the evidence stays
    assert pairs[0][1] == min(1.0, len(pairs) * pairs[0][0])


def test_measured_values_are_values():
    values = (0.0, 1.0, 1.0)
    assert estimate(Measured(values, unparsable=1)) == estimate(values)
    assert difference(Measured(values), (1.0, 1.0, 0.0)) == difference(values, (1.0, 1.0, 0.0))


def counts(n, share, seed):
    """A corpus score that is a ratio of sums: right words of all words, answers of 1 to 30 words."""
    rng = np.random.default_rng(seed)
    words = np.random.default_rng(99).integers(1, 31, n)  # the same texts for every system
    right = rng.binomial(words, share)
    corpus = Corpus(np.stack([right, words], 1).astype(float), lambda total: float(total[0] / total[1]))
    return Measured(tuple(right / words), corpus=corpus)


def test_a_corpus_score_is_of_the_sums_and_its_error_the_deltas():
    """Against the delta method for a ratio of sums: sqrt(sum (right - score * words)^2) / sum words."""
    measured = counts(400, 0.6, 1)
    assert measured.corpus is not None
    right, words = measured.corpus.statistics.T
    found = estimate(measured)
    assert found.mean == right.sum() / words.sum()
    assert found.mean != pytest.approx(np.mean(measured.values), abs=1e-4)
    by_delta = np.sqrt(((right - found.mean * words) ** 2).sum()) / words.sum()
    assert found.standard_error == pytest.approx(by_delta, rel=0.03)
    assert (found.low, found.high) == pytest.approx(
        (found.mean - 1.96 * by_delta, found.mean + 1.96 * by_delta), abs=0.002
    )


def test_corpus_scores_are_compared_on_the_same_draws():
    a, b = counts(400, 0.6, 1), counts(400, 0.55, 2)
    assert a.corpus is not None
    assert b.corpus is not None
    found = difference(a, b)
    assert (found.n, found.test) == (400, "paired bootstrap of the corpus")
    assert found.mean == estimate(a).mean - estimate(b).mean
    assert found.better == sum(x > y for x, y in zip(a.values, b.values, strict=True))
    words = a.corpus.statistics[:, 1]
    residual = (a.corpus.statistics[:, 0] - b.corpus.statistics[:, 0]) - found.mean * words
    assert found.standard_error == pytest.approx(np.sqrt((residual**2).sum()) / words.sum(), rel=0.03)
    assert found.low < found.mean < found.high
    assert difference(a, b) == found
    same = difference(a, a)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_a_corpus_score_is_not_compared_with_a_mean():
    with pytest.raises(ValueError, match="paired scores"):
        difference(counts(4, 0.5, 1), (0.0, 1.0, 1.0, 0.0))


def around(mean, error, lopsided=1.0):
    """A right-or-wrong score of this error; its interval reaches further up than down by a factor."""
    return Estimate(100, mean, error, mean - Z_95 * error, mean + lopsided * Z_95 * error)


def test_over_seeds_by_hand():
    """t of 2 degrees of freedom is 4.3027 at 97.5 %."""
    found = over_seeds([around(0.80, 0.01, 3), around(0.84, 0.02, 3), around(0.88, 0.03, 3)])
    of_seeds = 0.04 / np.sqrt(3)
    below = np.hypot(4.302653 * of_seeds, 1.959964 * 0.02)
    above = np.hypot(4.302653 * of_seeds, 3 * 1.959964 * 0.02)
    assert (found.mean, found.values) == (pytest.approx(0.84), (0.80, 0.84, 0.88))
    assert found.standard_error == pytest.approx(np.hypot(of_seeds, 0.02))
    assert (found.low, found.high) == pytest.approx((0.84 - below, 0.84 + above))


@pytest.mark.parametrize("right", [0, 1, 250, 499, 500])
def test_equal_seeds_have_the_interval_of_one(right):
    """At the ends too: none of 500 right is [0, 0.76 %], and no more certain for having happened three times."""
    one = estimate([1.0] * right + [0.0] * (500 - right))
    found = over_seeds([one] * 3)
    assert (found.mean, found.standard_error, found.low, found.high) == pytest.approx(
        (one.mean, one.standard_error, one.low, one.high), abs=1e-12
    )
    gained = difference([1.0] * right + [0.0] * (500 - right), [0.0] * 500)
    found = over_seeds([gained] * 3)
    assert (found.low, found.high) == pytest.approx((gained.low, gained.high), abs=1e-12)


def test_over_seeds_covers_the_truth_as_often_as_it_says():
    """Three seeds of a training whose luck and whose examples both vary, 2,000 times: 95 % of intervals hold it."""
    rng = np.random.default_rng(4)
    hit = 0
    for _ in range(2000):
        drawn = 0.02 * rng.standard_normal()  # the same examples for all seeds
        found = over_seeds([around(0.7 + drawn + 0.03 * luck, 0.02) for luck in rng.standard_normal(3)])
        hit += found.low < 0.7 < found.high
    assert 0.94 < hit / 2000 < 0.99


@pytest.mark.parametrize("repeats", [[], [around(0.5, 0.1)]])
def test_one_seed_says_nothing_about_seeds(repeats):
    with pytest.raises(ValueError, match="two seeds or more"):
        over_seeds(repeats)


def test_scores_of_a_graded_metric_are_no_proportions_even_if_all_are_right_or_wrong():
    right = [1.0] * 60 + [0.0] * 40
    found = estimate(right, graded=True)
    assert (found.low, found.high) == pytest.approx((0.5, 0.69), abs=0.011)  # multiples of a hundredth: the bootstrap's
    assert (found.low, found.high) != (estimate(right).low, estimate(right).high)
    assert difference(right, right[::-1], graded=True).test == "paired bootstrap"
