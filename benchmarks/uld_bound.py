"""What K ranks and a tail bucket leave out of the ULD loss: the true error and its bound, for K of a cache.

    python benchmarks/uld_bound.py

Synthetic logits of the shape of language models' (a Zipf prior and Gaussian noise), since no trained weights of these
sizes come with the repository: a teacher of T5's vocabulary, a student of GPT-2's, T = 1.2. Positions that are peaked,
broad or flat (the last untypical: most of the mass lies beyond any K). The full loss sorts both vocabularies whole;
ours is `stage2_student.losses.uld`. It is checked that 0 <= full - ours <= bound = 2 min(p_tail, q_tail) at every
position. What the codec adds, logits being stored to step 1/64, stands in a column of its own.
"""

import numpy as np
import torch
from scipy.special import logsumexp, softmax

from cache_schema.codec import Codec
from stage2_student.losses import uld

TEACHER_VOCABULARY, STUDENT_VOCABULARY = 32_128, 50_257
POSITIONS, TEMPERATURE, STEP = 256, 1.2, 1 / 64
RANKS = (16, 32, 64, 128, 256, 512, 1024)
SHAPES = {"peaked": (2.6, 2.0), "broad": (1.8, 2.0), "flat": (1.0, 1.0)}  # Zipf exponent, deviation of the noise
PAIRS = (("peaked", "peaked"), ("broad", "broad"), ("flat", "flat"), ("peaked", "flat"))  # teacher, student


def logits(random: np.random.Generator, shape: str, vocabulary: int) -> np.ndarray:
    """float64 [POSITIONS, vocabulary], sorted, largest first: no loss here sees an id."""
    exponent, noise = SHAPES[shape]
    prior = -exponent * np.log(np.arange(1, vocabulary + 1))
    return -np.sort(-(prior + random.normal(0, noise, (POSITIONS, vocabulary))), axis=1)


def compared(teacher: np.ndarray, student: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(full loss, ours at K, ours from the codec's logits, bound) of every position."""
    p, q = softmax(teacher / TEMPERATURE, axis=1), softmax(student / TEMPERATURE, axis=1)
    full = np.abs(np.pad(p, ((0, 0), (0, q.shape[1] - p.shape[1]))) - q).sum(1)
    top = teacher[:, 0].astype(np.float32)
    codec = Codec("fine", STEP)
    stored = codec.decode(top, codec.encode(top, teacher[:, :k].astype(np.float32)))
    normalisers = [torch.from_numpy(logsumexp(part / TEMPERATURE, axis=1)) for part in (teacher, teacher[:, k:])]
    rows, usable = torch.from_numpy(student), torch.ones(1, dtype=torch.bool)

    def ours(ranks: np.ndarray) -> np.ndarray:
        cached = [torch.from_numpy(ranks.astype(np.float64)), *normalisers]
        places = [slice(n, n + 1) for n in range(POSITIONS)]
        return np.array([uld(rows[at], *(c[at] for c in cached), usable, TEMPERATURE).item() for at in places])

    return full, ours(teacher[:, :k]), ours(stored), 2 * np.minimum(p[:, k:].sum(1), q[:, k:].sum(1))


def main() -> None:
    """Print a Markdown table a pair of shapes."""
    for pair in PAIRS:
        random = np.random.default_rng(0)
        sizes = (TEACHER_VOCABULARY, STUDENT_VOCABULARY)
        teacher, student = (logits(random, shape, size) for shape, size in zip(pair, sizes, strict=True))
        tops = [100 * softmax(side / TEMPERATURE, axis=1)[:, 0].mean() for side in (teacher, student)]
        print(f"\nteacher {pair[0]} (mean top probability {tops[0]:.0f} %), student {pair[1]} ({tops[1]:.0f} %)\n")
        print("| K | full loss, mean | error, mean | error, max | bound, mean | bound, max | error, % | codec, mean |")
        print("|" + " ---: |" * 8)
        for k in RANKS:
            full, ours, stored, bound = compared(teacher, student, k)
            error = full - ours
            if (error < -1e-9).any() or (error > bound + 1e-9).any():
                raise SystemExit(f"K = {k}: an error is below zero or above its bound")
            error = error.clip(0)  # of float64's rounding
            numbers = [full.mean(), error.mean(), error.max(), bound.mean(), bound.max()]
            cells = [*(f"{x:.5f}" for x in numbers), f"{100 * error.mean() / full.mean():.2f}"]
            print(f"| {k} | {' | '.join(cells)} | {np.abs(stored - ours).mean():.5f} |")


if __name__ == "__main__":
    main()
