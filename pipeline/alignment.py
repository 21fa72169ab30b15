"""Which teacher position a student position is compared with, where their tokenizers cut the answer differently.

Pure functions of token offsets, on NumPy. Called by stage 2 (a batch's rows, and the report of `--alignment`).

Position t predicts answer token t, so what it is conditioned on is the answer text that the tokens before it have
consumed: nothing at position 0, up to the end of token t - 1 after that, all of it at end-of-sequence. Offsets are
those of `Encoded.answer_offsets` and of the cache's `answer_offsets`: (start, end) a token, in code points, one
(length, length) at last for end-of-sequence. Shapes: N the teacher's positions, M the student's.

For example, `47 is` as `4 7 ␣is` for the teacher and `47 ␣ is` for the student:

    consumed before            (nothing)   4     47    47␣   47␣is
    teacher predicts           0: 4        1: 7  2: ␣is      3: end
    student predicts           0: 47             1: ␣  2: is 3: end
    boundary pairs             0-0               2-1         3-3
    index pairs                0-0, 1-1, 2-2, 3-3, of which 1-1 and 2-2 compare different questions
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

VERSION = 1
"""Raised whenever the same offsets pair up otherwise; part of the identity of an arm that aligns."""

NONE = -1
"""In place of a teacher position: there is none."""

Positions = NDArray[np.int64]


def align(
    mode: Literal["boundary", "index"],
    teacher_offsets_N2: NDArray[np.integer],
    student_offsets_M2: NDArray[np.integer],
    same_tokens: bool = False,
) -> Positions:
    """[M] for each position of the student the teacher position it is compared with, NONE where there is none.

    boundary: the one that has consumed exactly the same answer text; one inside a character, or inside a token of the
      other side, has no such counterpart. Position 0 always has position 0, end-of-sequence has end-of-sequence.
    index: the one of the same number, as in the published ULD code: the first min(N, M) pair up, whatever they read.

    same_tokens: both sides have the same ids from the same tokenizer. Then every position has consumed the same bytes
    as its namesake, those inside a character too, which offsets cannot tell: all pair up.
    """
    n, m = len(teacher_offsets_N2), len(student_offsets_M2)
    if mode == "index" or same_tokens:
        own_M = np.arange(m)
        return np.where(own_M < n, own_M, NONE)
    at = np.full(int(student_offsets_M2[-1, 1]) + 1, NONE)  # by text consumed: the teacher's position
    teacher_N, student_M = consumed(teacher_offsets_N2), consumed(student_offsets_M2)
    whole_N = teacher_N != NONE
    at[teacher_N[whole_N]] = np.flatnonzero(whole_N)
    found_M = np.where(student_M == NONE, NONE, at[student_M])
    found_M[0], found_M[-1] = 0, n - 1  # even where a side is end-of-sequence alone
    return found_M


def consumed(offsets_N2: NDArray[np.integer]) -> Positions:
    """[N] code points of the answer consumed before each position; NONE where the text consumed ends inside something.

    Tokens that consume one character between them (the bytes of an emoji, T5's lone `▁` and the letter after it) share
    an end, and only the last of them is a boundary. A token that consumes nothing (the space before an answer) leaves
    its successor where position 0 is already.
    """
    end_N = offsets_N2[:, 1].astype(np.int64)
    before_N = np.concatenate([[0], end_N[:-1]])
    inside_N = (before_N == end_N) | (before_N == 0)
    inside_N[[0, -1]] = False
    before_N[-1] = end_N[-1]
    return np.where(inside_N, NONE, before_N)
