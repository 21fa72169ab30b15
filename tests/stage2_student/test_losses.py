"""The losses against full-vocabulary references in float64 NumPy, and their gradients against finite differences."""

from typing import Any

import numpy as np
import pytest
import torch
import toys
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp, softmax
from torch import Tensor

from stage2_student import losses

N, V, K = 5, 12, 4
Array = NDArray[np.float64]


def example(
    k: int = K, temperature: float = 1.0, seed: int = 0, spread: float = 3.0
) -> tuple[Array, Array, dict[str, Tensor]]:
    """Student and teacher logits [N, V], and what a cache would hold of the teacher (float64)."""
    random = np.random.default_rng(seed)
    student, teacher = random.normal(0, spread, (2, N, V))
    kept = toys.top_k(teacher, k, [temperature])
    ids = torch.from_numpy(kept["token_ids"]).long()
    outside = teacher.copy()
    np.put_along_axis(outside, kept["token_ids"].astype(np.int64), -np.inf, 1)
    return (
        student,
        teacher,
        {
            "teacher_NK": torch.from_numpy(teacher).gather(1, ids),
            "ids_NK": ids,
            "logsumexp_N": torch.from_numpy(logsumexp(teacher / temperature, axis=1)),
            "log_tail_N": torch.from_numpy(logsumexp(outside / temperature, axis=1)) if k < V else None,
            "usable_N": torch.ones(N, dtype=torch.bool),
        },
    )


def bucketed_kl(student: Array, teacher: Array, k: int, temperature: float) -> float:
    """T^2 KL over the top k and one bucket, by summing probabilities of the whole vocabulary."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = np.exp(log_softmax(t / temperature)), np.exp(log_softmax(s / temperature))
        top = np.argsort(-t, kind="stable")[:k]
        p = np.append(p[top], np.delete(p, top).sum())[: k + (k < V)]
        q = np.append(q[top], np.delete(q, top).sum())[: k + (k < V)]
        total += float((p * np.log(p / q)).sum())
    return temperature**2 * total


def test_cross_entropy() -> None:
    student, _, _ = example()
    labels = np.array([3, 0, 11, 5, 5])
    expected = -log_softmax(student, axis=1)[np.arange(N), labels].sum()
    assert losses.cross_entropy(torch.from_numpy(student), torch.from_numpy(labels)).item() == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, K, V])
def test_logit_mse(k: int) -> None:
    student, teacher, cached = example(k)
    top = np.argsort(-teacher, axis=1, kind="stable")[:, :k]
    difference = np.take_along_axis(teacher, top, 1) - np.take_along_axis(student, top, 1)
    found = losses.logit_mse(torch.from_numpy(student), cached["teacher_NK"], cached["ids_NK"], cached["usable_N"])
    assert found.item() == pytest.approx((difference**2).mean(axis=1).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, K, V - 1, V])
def test_kl_is_that_of_the_bucketed_distributions(k: int, temperature: float) -> None:
    student, teacher, cached = example(k, temperature)
    found = losses.kl(torch.from_numpy(student), temperature=temperature, **cached)
    assert found.item() == pytest.approx(bucketed_kl(student, teacher, k, temperature), rel=1e-12)


def test_kl_without_truncation_is_torchs_own() -> None:
    student, teacher, cached = example(V)
    expected = torch.nn.functional.kl_div(
        torch.from_numpy(student).log_softmax(1),
        torch.from_numpy(teacher).log_softmax(1),
        reduction="sum",
        log_target=True,
    )
    assert losses.kl(torch.from_numpy(student), temperature=1.0, **cached).item() == pytest.approx(expected.item())


def test_kl_is_least_at_the_teacher() -> None:
    _, teacher, cached = example()
    at_teacher = torch.from_numpy(teacher).requires_grad_()
    loss = losses.kl(at_teacher, temperature=1.0, **cached)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert at_teacher.grad.abs().max().item() < 1e-12


def test_kl_sees_the_tail_as_one_bucket() -> None:
    """Moving mass about outside the top K costs nothing; moving it out of the top K does."""
    _, teacher, cached = example()
    student = teacher.copy()
    for n, ids in enumerate(cached["ids_NK"].numpy()):
        rest = np.setdiff1d(np.arange(V), ids)
        student[n, rest] = student[n, rest[::-1]]
    assert losses.kl(torch.from_numpy(student), temperature=1.0, **cached).item() == pytest.approx(0, abs=1e-12)
    np.put_along_axis(student, cached["ids_NK"].numpy(), teacher.min() - 5, 1)
    assert losses.kl(torch.from_numpy(student), temperature=1.0, **cached).item() > 1.0


def test_kl_is_stable_where_the_tail_is_nothing() -> None:
    """A peaked row in float32: the tail's 1e-26 would be lost in 1 - sum(q), and its log with it."""
    logits = torch.full((1, V), -60.0)
    logits[0, :K] = torch.tensor([30.0, 1.0, 0.0, -1.0])
    student = logits.clone().requires_grad_()
    loss = losses.kl(
        student,
        logits[:, :K],
        torch.arange(K)[None],
        logits.logsumexp(1),
        logits[:, K:].logsumexp(1),
        torch.ones(1, dtype=torch.bool),
        1.0,
    )
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.isfinite().all() and student.grad.abs().max() < 1e-6


def drawn(count: int, temperatures: tuple[float, ...], seeds: range, spread: float = 2.0) -> tuple[Array, Array, Any]:
    """Student and teacher logits [1, V], and the arguments of the sampled loss, a row for each seed of the draws."""
    student, teacher = np.random.default_rng(5).normal(0, spread, (2, 1, V))
    u = np.stack([np.random.default_rng(seed).random(count) for seed in seeds])
    kept = toys.drawn(teacher.astype(np.float32).repeat(len(u), 0), u, temperatures)
    column = len(temperatures) - 1
    scaled = [kept["logits"] / np.float64(t) - kept["logsumexp"][:, i, None] for i, t in enumerate(temperatures)]
    return (
        student,
        teacher,
        {
            "teacher_NK": torch.from_numpy(kept["logits"]).double(),
            "ids_NK": torch.from_numpy(kept["token_ids"]).long(),
            "weights_NK": torch.from_numpy(kept["draws"] / count * np.exp(scaled[column] - scaled[0])),
            "logsumexp_N": torch.from_numpy(kept["logsumexp"][:, column]).double(),
            "usable_N": torch.ones(len(u), dtype=torch.bool),
        },
    )


@pytest.mark.parametrize("temperatures", [(1.0,), (2.0,), (1.0, 2.0), (2.0, 1.0)])
def test_sampled_kl_and_its_gradient_have_the_full_ones_as_their_mean(temperatures: tuple[float, ...]) -> None:
    """Over 4,000 draws of 6 ids: drawn at the loss's temperature and at another, within 4.5 standard errors at each of
    13 numbers. The largest 6 with no others are further off, and some weights are of ids outside them."""
    temperature = temperatures[-1]
    student, teacher, cached = drawn(6, temperatures, range(4000))
    logits = torch.from_numpy(student).repeat(4000, 1).requires_grad_()
    values = []
    for n in range(4000):  # one position at a time: the loss is a sum
        one = {name: value[n : n + 1] for name, value in cached.items()}
        values.append(losses.sampled_kl(logits[n : n + 1], temperature=temperature, **one))
    torch.stack(values).sum().backward()
    found = np.column_stack([torch.stack(values).detach().numpy(), logits.grad.numpy()])
    p, q = (softmax(side[0] / temperature) for side in (teacher, student))
    exact = np.append(temperature**2 * (p * np.log(p / q)).sum(), temperature * (q - p))
    error = found.std(axis=0) / np.sqrt(4000)
    assert (np.abs(found.mean(axis=0) - exact) < 4.5 * error + 1e-6).all()
    top = np.argsort(-teacher[0])[:6]
    cut = temperature**2 * (p[top] / p[top].sum() * np.log(p[top] / p[top].sum() / q[top])).sum()
    assert abs(cut - exact[0]) > 8 * error[0] and error[0] < 0.05
    assert (cached["weights_NK"][~np.isin(cached["ids_NK"], top)] > 0).any()


def test_sampled_kl_is_zero_at_the_teacher_whatever_was_drawn() -> None:
    _, teacher, cached = drawn(6, (1.0, 2.0), range(50))
    at_teacher = torch.from_numpy(teacher.astype(np.float32)).double().repeat(50, 1)
    assert losses.sampled_kl(at_teacher, temperature=2.0, **cached).item() == pytest.approx(0, abs=1e-5)
    assert losses.sampled_kl(at_teacher.roll(1, 1), temperature=2.0, **cached).item() > 50


def test_slots_without_draws_are_not_read() -> None:
    student, _, cached = drawn(6, (1.0,), range(8))
    logits = torch.from_numpy(student).repeat(8, 1)
    used = cached["weights_NK"] > 0
    assert not used.all()
    other = cached | {
        "ids_NK": cached["ids_NK"].where(used, 7),
        "teacher_NK": cached["teacher_NK"].where(used, torch.tensor(3.0)),
    }
    found, expected = (losses.sampled_kl(logits, temperature=1.0, **c).item() for c in (other, cached))
    assert found == pytest.approx(expected, rel=1e-12)


def ranked(cached: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the rank-ordered loss takes of a cache: everything but the ids."""
    return {name: value for name, value in cached.items() if name != "ids_NK"}


def full_uld(student: Array, teacher: Array, temperature: float) -> Array:
    """Per position: both vocabularies whole, sorted, zero-padded to the longer, L1 (arXiv 2402.12030)."""
    p, q = (np.sort(softmax(side / temperature, axis=1), axis=1)[:, ::-1] for side in (teacher, student))
    width = max(p.shape[1], q.shape[1])
    p, q = (np.pad(side, ((0, 0), (0, width - side.shape[1]))) for side in (p, q))
    return np.abs(p - q).sum(axis=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("student_vocab", [3, V - 1, V, V + 1, 40])
def test_uld_without_truncation_is_the_papers(student_vocab: int, temperature: float) -> None:
    """K = V: the student's vocabulary smaller than, as large as and larger than the teacher's."""
    _, teacher, cached = example(V, temperature)
    student = np.random.default_rng(1).normal(0, 3, (N, student_vocab))
    found = losses.uld(torch.from_numpy(student), temperature=temperature, **ranked(cached))
    assert found.item() == pytest.approx(full_uld(student, teacher, temperature).sum(), rel=1e-12)


@pytest.mark.parametrize("student_vocab", [3, K, K + 1, 40])
def test_uld_is_off_by_no_more_than_its_bound(student_vocab: int) -> None:
    """0 <= full - ours <= 2 min(p_tail, q_tail) at every position, and both sides are reached by something."""
    errors, bounds = [], []
    for seed in range(40):
        _, teacher, cached = example(K, 1.2, seed, spread=0.5 + seed / 10)
        student = np.random.default_rng(100 + seed).normal(0, 0.5 + (seed % 7) / 2, (N, student_vocab))
        expected = full_uld(student, teacher, 1.2)
        q = np.sort(softmax(student / 1.2, axis=1), axis=1)[:, ::-1]
        p_tail = (cached["log_tail_N"] - cached["logsumexp_N"]).exp().numpy()
        for n in range(N):
            one = {name: value[n : n + 1] for name, value in ranked(cached).items()}
            ours = losses.uld(torch.from_numpy(student[n : n + 1]), temperature=1.2, **one).item()
            errors.append(expected[n] - ours)
            bounds.append(2 * min(p_tail[n], q[n, K:].sum()))
    assert (np.array(errors) >= -1e-12).all() and (np.array(errors) <= np.array(bounds) + 1e-12).all()
    if student_vocab <= K:
        assert max(np.abs(errors)) < 1e-12  # nothing beyond K on one side: exact
    else:
        assert max(errors) > 0.01 and max(bounds) > 0.1


def test_uld_divides_both_sides_by_the_temperature() -> None:
    """The cached normalisers are those of T; with those of another T the sum is another."""
    _, teacher, cached = example(V, 2.0)
    assert losses.uld(torch.from_numpy(teacher), temperature=2.0, **ranked(cached)).item() == pytest.approx(0, abs=1e-9)
    assert losses.uld(torch.from_numpy(teacher / 2), temperature=2.0, **ranked(cached)).item() > 0.5
    _, _, other = example(V, 1.0)
    assert losses.uld(torch.from_numpy(teacher), temperature=2.0, **ranked(other)).item() > 0.5


def test_uld_does_not_see_which_token_is_which() -> None:
    student, _, cached = example()
    order = torch.from_numpy(np.random.default_rng(3).permutation(V))
    logits = torch.from_numpy(student).requires_grad_()
    shuffled = torch.from_numpy(student)[:, order].requires_grad_()
    for values in (logits, shuffled):
        losses.uld(values, temperature=1.0, **ranked(cached)).backward()
    found, expected = (losses.uld(v, temperature=1.0, **ranked(cached)).item() for v in (shuffled, logits))
    assert found == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(shuffled.grad, logits.grad[:, order])


def test_uld_is_bounded_by_two_and_its_gradient_finite_at_the_extremes() -> None:
    """float32, a certain student against a flat teacher: 2 (1 - 1/V), and no NaN from a tail of nothing."""
    student = torch.full((1, V), -200.0)
    student[0, 7] = 200.0
    student.requires_grad_()
    flat = torch.zeros(1, K), torch.full((1,), float(np.log(V))), torch.full((1,), float(np.log(V - K)))
    loss = losses.uld(student, *flat, torch.ones(1, dtype=torch.bool), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2 * (1 - 1 / V), abs=1e-6)
    assert student.grad.isfinite().all()


def call(component: str, logits: Tensor, cached: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """A loss by its name."""
    if component == "ce":
        return losses.cross_entropy(logits, torch.tensor([3, 0, 11, 5, 5]))
    if component == "kl":
        return losses.kl(logits, temperature=temperature, **cached)
    if component == "uld":
        return losses.uld(logits, temperature=temperature, **ranked(cached))
    if component == "sampled_kl":
        inputs = {name: value for name, value in cached.items() if name != "log_tail_N"}
        weights = torch.linspace(1, 0, cached["ids_NK"].shape[1], dtype=torch.float64).expand(cached["ids_NK"].shape)
        return losses.sampled_kl(logits, temperature=temperature, weights_NK=weights, **inputs)
    return losses.logit_mse(logits, cached["teacher_NK"], cached["ids_NK"], cached["usable_N"])


@pytest.mark.parametrize("k", [K, V])
@pytest.mark.parametrize("component", ["ce", "logit_mse", "kl", "sampled_kl", "uld"])
def test_gradients(component: str, k: int) -> None:
    student, _, cached = example(k, temperature=1.7, spread=1.0)
    logits = torch.from_numpy(student).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: call(component, values, cached, 1.7), logits)


@pytest.mark.parametrize("component", ["logit_mse", "kl", "sampled_kl", "uld"])
def test_unusable_positions_are_not_read(component: str) -> None:
    """NaN in the numbers of a quarantined position reaches neither the sum nor a gradient."""
    student, _, cached = example()
    usable = torch.tensor([True, False, True, False, True])

    def run(rows: Tensor, mask: Tensor, poison: bool) -> tuple[float, Tensor]:
        logits = torch.from_numpy(student)[rows].requires_grad_()
        inputs = {name: value[rows].clone() for name, value in cached.items() if value is not None}
        if poison:
            for name in ("teacher_NK", "logsumexp_N", "log_tail_N"):
                inputs[name][~mask] = torch.nan
            inputs["ids_NK"][~mask] = 0
        loss = call(component, logits, inputs | {"usable_N": mask})
        loss.backward()
        return loss.item(), logits.grad

    rows = usable.nonzero().squeeze(1)
    expected, expected_gradient = run(rows, torch.ones(3, dtype=torch.bool), poison=False)
    found, gradient = run(torch.arange(N), usable, poison=True)
    assert found == pytest.approx(expected)
    torch.testing.assert_close(gradient[usable], expected_gradient)
    assert (gradient[~usable] == 0).all()
    nothing, gradient = run(torch.arange(N), torch.zeros(N, dtype=torch.bool), poison=True)
    assert nothing == 0 and (gradient == 0).all()


@pytest.mark.parametrize("component", ["logit_mse", "kl", "sampled_kl", "uld"])
def test_sums_over_chunks_add_up(component: str) -> None:
    student, _, cached = example()
    whole = call(component, torch.from_numpy(student), cached)
    parts = [
        call(component, torch.from_numpy(student[n : n + 2]), {k: v[n : n + 2] for k, v in cached.items()})
        for n in range(0, N, 2)
    ]
    assert sum(parts).item() == pytest.approx(whole.item())


@pytest.mark.parametrize("component", ["logit_mse", "kl", "sampled_kl", "uld"])
def test_rows_shifted_by_one_do_not_vanish(component: str) -> None:
    """The control of the alignment: the teacher's own logits are a perfect student, one place on they are not."""
    _, teacher, cached = example()
    assert call(component, torch.from_numpy(teacher), cached).item() == pytest.approx(0, abs=1e-12)
    assert call(component, torch.from_numpy(np.roll(teacher, 1, axis=0)), cached).item() > 1.0
