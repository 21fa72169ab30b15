"""The losses, as pure functions of one chunk of answer positions. Called by `train`; the formulas are the reference.

Every function returns a *sum* over the chunk's valid positions, a float32 scalar. The caller divides by the global
count of valid positions of that component (over micro-batches and processes), once: so neither the chunking, nor
accumulation, nor the number of processes changes a loss, and each component keeps a denominator of its own.

Row t of the teacher's arrays is the distribution that predicts answer token t, and so is row t of the student's
logits. The mask `usable_N` leaves out positions that the teacher could not use: their numbers may be anything, NaN
included, and their ids any of the vocabulary.

Shapes: N answer positions in the chunk, V the student's vocabulary, K the teacher's cached ranks. All float32.
"""

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over positions of -log q(answer token), in nats; q = softmax(student logits).

    Every answer position counts, also those that the teacher could not use: the text is known all the same.
    """
    return functional.cross_entropy(logits_NV, labels_N, reduction="sum")


def logit_mse(logits_NV: Tensor, teacher_NK: Tensor, ids_NK: Tensor, usable_N: Tensor) -> Tensor:
    """Sum over positions of the mean over K of (teacher logit - student logit at the same vocabulary id)^2.

    Logit regression (Ba and Caruana 2014, arXiv 1312.6184) on the teacher's K most likely ids. Units: squared logits.
    It compares raw logits, so it also fixes the additive constant that a softmax does not see.
    """
    student_NK = logits_NV.gather(1, ids_NK)[usable_N]
    return (teacher_NK[usable_N] - student_NK).square().mean(1).sum()


def kl(
    logits_NV: Tensor,
    teacher_NK: Tensor,
    ids_NK: Tensor,
    logsumexp_N: Tensor,
    log_tail_N: Tensor | None,
    usable_N: Tensor,
    temperature: float,
) -> Tensor:
    """Sum over positions of T^2 * KL(p || q), in nats, over K + 1 buckets: the teacher's top K ids and all the rest.

        p_i    = exp(teacher_i / T - logsumexp)      i in the top K; logsumexp of teacher / T over the full vocabulary
        p_tail = exp(log_tail - logsumexp)           log_tail: the same over the ids outside the top K
        q      = softmax(student / T), q_tail its mass outside the same K ids, by logsumexp over the complement
        KL     = sum_i p_i (log p_i - log q_i) + p_tail (log p_tail - log q_tail)

    Never 1 - sum(p): the cached normalisers are exact, decoded logits are not. The bucket makes both sides
    distributions over the same events, without which top-K distillation is biased (Anshumann et al. 2025,
    arXiv 2503.16870). T^2 keeps the gradient's size across temperatures (Hinton et al. 2015, arXiv 1503.02531).
    log_tail_N is None when K is the teacher's whole vocabulary; there is no tail bucket then.
    """
    scaled_NV = logits_NV if temperature == 1 else logits_NV / temperature
    student_NK = scaled_NV.gather(1, ids_NK)
    if log_tail_N is None:
        log_z_N = scaled_NV.logsumexp(1)
    else:
        log_z_N, outside_N = _normalisers(scaled_NV, student_NK, ids_NK)
    log_p_NK = (teacher_NK / temperature - logsumexp_N[:, None])[usable_N]
    log_q_NK = (student_NK - log_z_N[:, None])[usable_N]
    divergence_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(1)
    if log_tail_N is not None:
        log_p_tail_N = (log_tail_N - logsumexp_N)[usable_N]
        log_q_tail_N = (outside_N - log_z_N)[usable_N]
        divergence_N = divergence_N + log_p_tail_N.exp() * (log_p_tail_N - log_q_tail_N)
    return temperature**2 * divergence_N.sum()


def sampled_kl(
    logits_NV: Tensor,
    teacher_NK: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
    logsumexp_N: Tensor,
    usable_N: Tensor,
    temperature: float,
) -> Tensor:
    """Sum over positions of an unbiased estimate of T^2 * KL(p || q), in nats, over the *whole* vocabulary.

        KL^ = sum_i w_i (log p_i - log q_i)            i over the drawn ids; w stands for all others too
        p   = exp(teacher_i / T - logsumexp), exact    q = softmax(student / T)
        w_i = d_i / K * p_i / p0_i                     E[w_i] = p_i: d_i of the K draws, which were made from p0

    Sparse Logit Sampling (Anshumann et al. 2025, arXiv 2503.16870), with log p_i instead of their log w_i, which the
    gradient does not see: so the value is unbiased too, and zero for a student that is the teacher. One
    estimate may be negative. Its gradient, T (q sum_i w_i - w), has the full KL's as its mean; where student and
    teacher agree it is the draws' noise, not zero. weights_NK is zero in a slot that no draw fell into.
    """
    student_NV = logits_NV if temperature == 1 else logits_NV / temperature
    log_q_NK = (student_NV.gather(1, ids_NK) - student_NV.logsumexp(1, keepdim=True))[usable_N]
    log_p_NK = (teacher_NK / temperature - logsumexp_N[:, None])[usable_N]
    return temperature**2 * (weights_NK[usable_N] * (log_p_NK - log_q_NK)).sum()


def uld(
    logits_NV: Tensor,
    teacher_NK: Tensor,
    logsumexp_N: Tensor,
    log_tail_N: Tensor | None,
    usable_N: Tensor,
    temperature: float,
) -> Tensor:
    """Sum over positions of the L1 distance of rank-ordered probabilities, 0 to 2 each: no id is compared.

        p_(i)  = exp(teacher_(i) / T - logsumexp)    i = 1 .. K, largest first; logsumexp over the full vocabulary
        q_(i)  = the i-th largest of softmax(student / T) over the student's own vocabulary; 0 beyond its end
        p_tail = exp(log_tail - logsumexp)           0 when log_tail_N is None: K is the teacher's whole vocabulary
        q_tail = the student's mass beyond its K largest, 0 when it has no more than K ids
        ULD    = sum_i |p_(i) - q_(i)| + |p_tail - q_tail|

    Universal Logit Distillation (Boizard et al. 2024, arXiv 2402.12030): the first Wasserstein distance in its closed
    form, sorted and zero-padded, T on both sides, no T^2. The paper sums all ranks one by one; here those beyond K
    share a bucket. The first K terms are the same. Of the others, sum_{i>K} |p_(i) - q_(i)| is at least |p_tail -
    q_tail| by the triangle inequality, and at most p_tail + q_tail = |p_tail - q_tail| + 2 min(p_tail, q_tail). So

        0 <= full - ours <= 2 min(p_tail, q_tail)

    and nothing is lost when either vocabulary ends at K. benchmarks/uld_bound.py measures both sides.

    q_tail is summed over the complement, like the teacher's: it is never negative, and no rounding of 1 - sum q decides
    the sign of a tail's difference, which is all that a gradient of |.| depends on.
    """
    scaled_MV = logits_NV[usable_N] / temperature  # the rows that are compared; M of them
    k_cached, k = teacher_NK.shape[1], min(teacher_NK.shape[1], logits_NV.shape[1])
    largest_MK, ids_MK = scaled_MV.topk(k, dim=1)
    p_MK = (teacher_NK[usable_N] / temperature - logsumexp_N[usable_N, None]).exp()
    p_tail_M = p_MK.new_zeros(len(p_MK)) if log_tail_N is None else (log_tail_N - logsumexp_N)[usable_N].exp()
    if k == logits_NV.shape[1]:
        log_z_M = scaled_MV.logsumexp(1)
        q_tail_M = torch.zeros_like(p_tail_M)
    else:
        log_z_M, outside_M = _normalisers(scaled_MV, largest_MK, ids_MK)
        q_tail_M = (outside_M - log_z_M).exp()
    q_MK = functional.pad((largest_MK - log_z_M[:, None]).exp(), (0, k_cached - k))
    return (p_MK - q_MK).abs().sum() + (p_tail_M - q_tail_M).abs().sum()


def _normalisers(scaled_NV: Tensor, inside_NK: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp of a row, and of the row without `ids_NK`, whose logits are `inside_NK`; there must be others.

    The first is the sum of its two parts, so one pass over the vocabulary serves both.
    """
    outside_N = scaled_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1)
    return torch.logaddexp(inside_NK.logsumexp(1), outside_N), outside_N
