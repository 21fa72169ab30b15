"""Drawn ids: what they are drawn from, what reaches the draws and what does not, and where they lie in their slots."""

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import chi2

from cache_schema.check import problem_of
from cache_schema.manifest import Manifest
from pipeline.data import Shots
from pipeline.prompts import PromptBuilder
from pipeline.tasks import Example
from stage1_teacher.capture import Capture
from stage1_teacher.sampling import sample, uniforms
from stage1_teacher.teacher import FullLogitsTeacher

DRAWS = 8
GOLDEN = [[690034401721, 1049614375727, 199695123852], [946416000881, 873323911591, 169062224883]]


class CountingTeacher(FullLogitsTeacher):
    """A teacher whose logits say what they were read from, and are flat enough to draw many ids."""

    vocab_size, window, provenance = 320, None, {}

    def __init__(self, fits=1000):
        self.fits = fits

    def answer_logits(self, batch, context_ids):
        if len(batch) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        for item in batch:
            read = torch.tensor(item.input_ids[item.first_row : -1])
            yield -((torch.arange(320)[None, :] - read[:, None] - 1) % 320).float() / 8


def examples(count):
    return [Example(f"train/{i}", "toy", r["question"], r["answer"]) for i, r in enumerate(toys.rows(count))]


@pytest.fixture(scope="module")
def drawn_by(tmp_path_factory):
    """What a capture draws of these examples: id -> (token_ids, draws)."""
    prompts = PromptBuilder(toys.tiny_tokenizer(tmp_path_factory.mktemp("tok")))

    def run(items, batch_tokens=4096, seed=0, fits=1000):
        capture = Capture(
            CountingTeacher(fits),
            prompts,
            Shots(0, "shared", 0, {}),
            DRAWS,
            [1.0],
            2**-6,
            batch_tokens,
            sample_seed=seed,
        )
        return {row.example_id: (row.token_ids.tolist(), row.draws.tolist()) for row in capture.shard(items)[0]}

    return run


def test_nothing_but_seed_example_and_position_reaches_the_draws(drawn_by):
    items = examples(8)
    whole = drawn_by(items)
    assert drawn_by(items, batch_tokens=1) == whole
    assert drawn_by(items[::-1]) == whole
    assert drawn_by(items, fits=3) == whole  # memory runs out, batches are halved
    assert drawn_by(items[:3]) | drawn_by(items[3:]) == whole  # as other shards, or other processes, would have it
    other = drawn_by(items, seed=1)
    assert all(other[name] != whole[name] for name in whole)


def test_the_same_text_twice_is_drawn_twice(drawn_by):
    (example,) = examples(1)
    twins = [example, Example("train/again", "toy", example.prompt, example.answer)]
    one, other = drawn_by(twins).values()
    assert one != other
    ids, draws = (np.array(part) for part in one)
    assert len({(tuple(i), tuple(d)) for i, d in zip(ids.tolist(), draws.tolist(), strict=True)}) > len(ids) // 2


def test_golden_uniforms():
    """Any change of these draws every cache anew: another meaning of the seed, hence a new schema version."""
    found = uniforms(7, "gsm8k", "train/gsm8k-3", 2, 3)
    assert (found * 2**40).astype(int).tolist() == GOLDEN
    assert np.array_equal(uniforms(7, "gsm8k", "train/gsm8k-3", 5, 3)[:2], found)  # a cut answer's are the same
    for other in ((8, "gsm8k", "train/gsm8k-3"), (7, "squad", "train/gsm8k-3"), (7, "gsm8k", "train/gsm8k-4")):
        assert not np.array_equal(uniforms(*other, 2, 3), found)


def test_uniforms_are_uniform():
    values = np.concatenate([uniforms(0, "t", str(i), 10, 10).ravel() for i in range(200)])
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < chi2.ppf(0.999, 49)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 5),
    vocab=st.integers(1, 60),
    count=st.integers(1, 60),
    spread=st.sampled_from([0.1, 2.0, 30.0]),
    coarse=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_agrees_with_a_plain_search_in_float64(seed, rows, vocab, count, spread, coarse, temperature):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (rows, vocab)).astype(np.float32)
    if coarse:
        logits = np.round(logits)
    u = rng.integers(0, 2**40, (rows, count)) * 2.0**-40
    kept = sample(torch.from_numpy(logits), u, [temperature, 1.5])
    expected = toys.drawn(logits, u, [temperature, 1.5])
    for name, tensor in (("token_ids", kept.token_ids_NK), ("draws", kept.draws_NK), ("logits", kept.logits_NK)):
        assert np.array_equal(tensor.numpy(), expected[name]), name
    assert np.allclose(kept.logsumexp_NT.numpy(), expected["logsumexp"], rtol=1e-6, atol=1e-5)
    assert kept.log_tail_NT is None and kept.finite_N.all()


def test_draws_follow_the_distribution():
    """Pearson's chi-square of 4,000 positions of one distribution. Draws from slices are more even than independent
    ones, so its quantile is a bound; against the distribution at another temperature the sum is far beyond."""
    logits = np.random.default_rng(0).normal(0, 2, 40).astype(np.float32)
    u = np.concatenate([uniforms(0, "toy", str(i), 40, 6) for i in range(100)])
    kept = sample(torch.from_numpy(logits).expand(4000, -1), u, [1.0])
    counts = np.bincount(kept.token_ids_NK.numpy().ravel(), kept.draws_NK.numpy().ravel(), minlength=40)
    assert counts.sum() == 24_000

    def statistic(temperature):
        expected = 24_000 * softmax(logits.astype(np.float64) / temperature)
        return ((counts - expected) ** 2 / expected).sum()

    assert statistic(1.0) < chi2.ppf(0.999, 39)
    assert statistic(1.1) > 2 * chi2.ppf(0.999, 39)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_of_a_function_is_that_of_the_whole_vocabulary(temperature):
    """FORMAT.md's estimate of the entropy, at the temperature of the draws and at another, within 4 standard errors of
    its mean; that of the 8 largest, with no tail, is many times as far away."""
    logits = np.random.default_rng(1).normal(0, 2, (1, 30)).astype(np.float32)
    u = np.concatenate([uniforms(3, "toy", str(i), 50, DRAWS) for i in range(100)])
    kept = sample(torch.from_numpy(logits).expand(5000, -1), u, [1.0, temperature])
    log_p0, log_p = (
        kept.logits_NK.double() / t - kept.logsumexp_NT[:, i, None] for i, t in enumerate((1.0, temperature))
    )
    estimates = -(kept.draws_NK / DRAWS * (log_p - log_p0).exp() * log_p).sum(dim=1).numpy()
    p = softmax(logits[0].astype(np.float64) / temperature)
    exact, largest = -(p * np.log(p)).sum(), np.sort(p)[-DRAWS:]
    error = estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean() - exact) < 4 * error
    assert abs(-(largest * np.log(largest)).sum() / largest.sum() - exact) > 20 * error


def test_slices_vary_less_than_independent_draws():
    logits = torch.from_numpy(np.random.default_rng(2).normal(0, 2, (1, 50)).astype(np.float32)).expand(2000, -1)
    p = softmax(logits[0].double().numpy())
    kept = sample(logits, np.concatenate([uniforms(0, "t", str(i), 20, DRAWS) for i in range(100)]), [1.0])
    counts = torch.zeros(2000, 50, dtype=torch.long).scatter_add_(1, kept.token_ids_NK, kept.draws_NK).numpy()
    found, independent = (counts / DRAWS).var(axis=0), p * (1 - p) / DRAWS
    assert found.sum() < 0.8 * independent.sum()
    assert found[p > 1 / DRAWS].sum() < 0.5 * independent[p > 1 / DRAWS].sum() and (p > 1 / DRAWS).any()


def test_every_id_of_a_large_vocabulary_has_its_own_interval():
    """151,936 ids of which most have 8e-8, less than float32 can tell in a sum near 1; each is drawn in its turn."""
    logits = torch.zeros(1, 151_936)
    logits[0, 0] = 16.3  # 0.99 of the probability
    p = softmax(logits[0].double().numpy())
    wanted = np.arange(100, 151_936, 997)
    middle = p.cumsum() - p / 2
    assert p[1] < np.finfo(np.float32).eps
    kept = sample(logits.expand(len(wanted), -1), middle[wanted, None], [1.0])
    assert kept.token_ids_NK[:, 0].tolist() == wanted.tolist()


def test_an_impossible_id_is_never_drawn():
    logits = torch.zeros(2, 12)
    logits[:, [0, 3, 11]] = -torch.inf
    edges = np.array([[0.0] * 5, [1 - 2.0**-40] * 5])  # the ends of every slice
    kept = sample(logits, edges, [1.0])
    drawn = kept.token_ids_NK[kept.draws_NK > 0]
    assert kept.finite_N.all() and not set(drawn.tolist()) & {0, 3, 11}
    assert kept.draws_NK.sum(dim=1).tolist() == [5, 5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_is_marked_and_the_others_are_untouched(bad):
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    u = uniforms(0, "t", "e", 4, 5)
    clean = sample(logits, u, [1.0, 2.0])
    logits[2, 17] = bad
    kept = sample(logits, u, [1.0, 2.0])
    assert kept.finite_N.tolist() == [True, True, False, True]
    assert kept.logits_NK.isfinite().all() and kept.logsumexp_NT.isfinite().all()
    for name in ("logits_NK", "token_ids_NK", "draws_NK", "logsumexp_NT"):
        assert torch.equal(getattr(kept, name)[[0, 1, 3]], getattr(clean, name)[[0, 1, 3]])


def test_rows_pass_the_invariants_of_the_cache(drawn_by, tmp_path):
    """Before the codec, so what is checked is what was drawn; with a normaliser of another row they do not pass."""
    prompts = PromptBuilder(toys.tiny_tokenizer(tmp_path))
    capture = Capture(
        CountingTeacher(), prompts, Shots(0, "shared", 0, {}), DRAWS, [1.0, 3.0], 2**-6, 4096, sample_seed=5
    )
    manifest = Manifest.create(
        identity={},
        provenance={},
        selector="sampled",
        top_k=DRAWS,
        vocab_size=320,
        temperatures=[1.0, 3.0],
        step=2**-6,
        store_ids=True,
        examples=5,
        shard_examples=5,
        vocabulary_sha256="0" * 64,
    )
    for row in capture.shard(examples(5))[0]:
        assert problem_of(row, manifest, decoded=False) is None
        row.logsumexp[2, 1] -= 2
        assert "position 2: at temperature 3.0, the drawn ids have a probability above 1" in problem_of(
            row, manifest, decoded=False
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_ids():
    logits = torch.randn(64, 151_936, generator=torch.Generator().manual_seed(0)) * 3
    u = uniforms(0, "t", "e", 64, 256)
    cpu, gpu = sample(logits, u, [1.0]), sample(logits.cuda(), u, [1.0])
    assert torch.equal(cpu.token_ids_NK, gpu.token_ids_NK.cpu()) and torch.equal(cpu.draws_NK, gpu.draws_NK.cpu())
