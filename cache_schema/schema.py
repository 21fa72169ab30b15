"""What a row of the cache is: columns, status codes and the row types. Called by everything; standard library only.

**Row t of the cache is the distribution that predicts answer token t**: it was read from the teacher's output one
place before that token. Shape suffixes: N answer positions of one example, K ranks, T temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCHEMA_VERSION: Final = 2


class Status(IntEnum):
    """Why a position can or cannot be used. Stored as its number, counted in the ledgers under its name."""

    USABLE = 0
    NOT_FINITE = 1  # a number is NaN or infinite, or a logit is too far below the top one to be encoded
    UNKNOWN_TOKEN = 2  # its token, or an earlier answer token, is unknown to the teacher's tokenizer
    CUT = 3  # beyond what the teacher could read

    @property
    def reason(self) -> str:
        """The name used in ledgers: `not_finite`, `unknown_token`, `cut`."""
        return self.name.lower()


TEXT_COLUMNS = ("example_id", "task", "prompt", "answer")
NUMBER_COLUMNS = (
    "answer_ids",
    "answer_start",
    "answer_offsets",
    "status",
    "top_logit",
    "id_order",
    "slots",
    "id_excess",
    "height_low",
    "height_excess",
    "draws",
    "rank_steps",
    "rank_excess",
    "logsumexp",
    "log_tail",
)
ID_COLUMNS = ("id_order", "id_excess", "draws")
ALIGNMENT_COLUMNS = (*TEXT_COLUMNS, "answer_ids", "answer_offsets", "status")


class Columns(Enum):
    """Which columns to read, cheapest first: text is a small part of the bytes, token ids are most of them."""

    TEXT = "text"  # a TextRow: all that plain fine-tuning needs
    ALIGNMENT = "alignment"  # an AlignmentRow: where the teacher's tokens lie in the answer, and which are usable
    RANKED = "ranked"  # a CacheRow without token ids and draws: what a rank-ordered loss needs
    ALL = "all"  # a CacheRow

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the file."""
        if self is Columns.TEXT:
            return TEXT_COLUMNS
        if self is Columns.ALIGNMENT:
            return ALIGNMENT_COLUMNS
        every = (*TEXT_COLUMNS, *NUMBER_COLUMNS)
        return tuple(name for name in every if self is Columns.ALL or name not in ID_COLUMNS)


TEXT: Final = Columns.TEXT
ALIGNMENT: Final = Columns.ALIGNMENT
RANKED: Final = Columns.RANKED
ALL: Final = Columns.ALL


@dataclass(frozen=True, eq=False)
class TextRow:
    """One example as text, untemplated: each side applies its own template."""

    example_id: str
    task: str
    prompt: str
    answer: str


@dataclass(frozen=True, eq=False)
class AlignmentRow(TextRow):
    """One example with the teacher's tokens of its answer; position t is the one that predicts answer token t."""

    answer_ids: NDArray[np.int32]  # [N] teacher token ids of the answer, end-of-sequence included
    answer_offsets: NDArray[np.int32]  # [N, 2] start and end in `answer`, Unicode code points, end exclusive
    status: NDArray[np.uint8]  # [N] a `Status`; the numbers of a position that is not 0 mean nothing


@dataclass(frozen=True, eq=False)
class CacheRow(AlignmentRow):
    """One example with the teacher's distributions; row t predicts answer token t.

    When writing, the numbers of a position whose status is not 0 may be anything: zeros are stored. When reading,
    `logits` are decoded: exact at rank 0, within the codec's bound (and a float32 rounding) elsewhere. Ids whose logits
    the codec made equal come by lower id.
    """

    answer_start: int  # index of the first answer token in the unpadded teacher input (the decoder's for seq2seq)
    top_logit: NDArray[np.float32]  # [N] the largest of `logits`
    logits: NDArray[np.float32]  # [N, K] raw logits of the kept ids, largest first
    token_ids: NDArray[np.int32] | None  # [N, K] ids by rank; None where not stored (store_ids false) or not read
    logsumexp: NDArray[np.float32]  # [N, T] of logit / temperature, over the full vocabulary
    log_tail: NDArray[np.float32] | None  # [N, T] the same over the ids outside the top K; None when K = V, or drawn
    draws: NDArray[np.int32] | None = None  # [N, K] how often each id was drawn, 0 in a slot left over; None for `topk`


@dataclass(frozen=True)
class QuarantinedExample:
    """An example that has no row, and why. `positions`: its answer tokens, 0 when they could not be counted."""

    example_id: str
    task: str
    reason: str
    positions: int = 0
