"""One example of a cache, for people: the prompt, then each answer token with the teacher's top candidates.

Called by `python -m cache_schema show`. Texts come from `vocabulary.json`, probabilities are
exp(logit / T - logsumexp).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cache_schema.errors import UnknownExample, shown
from cache_schema.reader import CacheReader
from cache_schema.schema import TEXT, CacheRow, Status

COLUMN_CHARACTERS = 18
MOST_NAME = 120  # characters of an id, a task or a reason
MOST_TEXT = 100_000  # characters of a text: a stranger's has up to 32 MB, each of which takes four to be escaped


def find_example(reader: CacheReader, which: str) -> int:
    """The row number of an example given by number or by id. Raises UnknownExample."""
    if which.isascii() and which.isdigit() and int(which) < len(reader):
        return int(which)
    for index, row in enumerate(reader.rows(TEXT)):
        if row.example_id == which:
            return index
    for record in reader.records:
        for example in record.quarantined:
            if example.example_id == which:
                reason = _name(example.reason)
                raise UnknownExample(
                    f"example {shown(which)} of task {shown(example.task)} has no row: it is quarantined, {reason}"
                )
    raise UnknownExample(
        f"the cache at {reader.location} has no example {shown(which)}\n"
        f"  next: --example takes a number from 0 to {len(reader) - 1}, or an example's id"
    )


def describe_example(reader: CacheReader, index: int, top: int) -> str:
    """The text that `show` prints: one line an answer token, the teacher's `top` candidates and the tail's mass; of a
    sampled cache the share of the draws beside each probability, and how many ids were drawn.

    Row t is the distribution that predicts answer token t; the candidate that is the answer token is marked `*`.
    """
    (row,) = reader.read([index])
    vocabulary, manifest = reader.vocabulary(), reader.manifest
    temperature, top = manifest.temperatures[0], min(top, manifest.top_k)
    lines = [
        f"example {index} of {len(reader)}: {_name(row.example_id)} (task {_name(row.task)})",
        "",
        "prompt",
        *_lines(row.prompt),
        "answer",
        *_lines(row.answer),
        "",
        f"the teacher's {top} most likely next tokens before each answer token, at temperature {temperature:g}"
        + (f": probability, and share of {manifest.top_k} draws; only drawn ids are kept" if manifest.sampled else "")
        + ("" if manifest.store_ids else " (this cache keeps no token ids)"),
        "",
    ]
    extra = 13 if manifest.sampled else 7
    header = f"{'t':>4}  {_cell('answer token')}" + "".join(_cell(f"rank {rank}", extra) for rank in range(top))
    lines.append(header + ("ids drawn" if manifest.sampled else f"outside top {manifest.top_k}"))
    lines += [_position_line(row, t, vocabulary, temperature, top) for t in range(len(row.answer_ids))]
    return "\n".join(lines)


def _lines(text: str) -> list[str]:
    """A text, indented; its beginning where it is too long."""
    more = [f"  ... ({len(text)} characters in all)"] if len(text) > MOST_TEXT else []
    return [f"  {printable(line)}" for line in text[:MOST_TEXT].splitlines()] + more


def _name(text: str) -> str:
    return printable(text if len(text) <= MOST_NAME else text[: MOST_NAME - 3] + "...")


def _position_line(row: CacheRow, t: int, vocabulary: Sequence[str | None], temperature: float, top: int) -> str:
    answer_id = int(row.answer_ids[t])
    line = f"{t:>4}  {_cell(_token(answer_id, vocabulary))}"
    if row.status[t] != Status.USABLE:
        return f"{line}not usable: {Status(row.status[t]).reason}"
    probability_K = np.exp(row.logits[t, :top].astype(np.float64) / temperature - row.logsumexp[t, 0])
    for rank, probability in enumerate(probability_K):
        text = mark = share = ""
        if row.draws is not None:
            if row.draws[t, rank] == 0:
                line += _cell("", 13)
                continue
            share = f"{row.draws[t, rank] / row.draws.shape[1]:6.3f}"
        if row.token_ids is not None:
            candidate = int(row.token_ids[t, rank])
            text, mark = _token(candidate, vocabulary), "*" if candidate == answer_id else ""
        line += f"{probability:6.3f}{share}{mark:1}" + _cell(text)
    if row.draws is not None:
        return f"{line}{np.count_nonzero(row.draws[t])}"
    tail = 0.0 if row.log_tail is None else float(np.exp(np.float64(row.log_tail[t, 0]) - row.logsumexp[t, 0]))
    return f"{line}{tail:.2g}"


def _token(token: int, vocabulary: Sequence[str | None]) -> str:
    text = vocabulary[token]  # the reader has checked the range
    return f"<{token}>" if text is None else repr(text[:64])[1:-1].replace(" ", "␣")


def _cell(text: str, extra: int = 0) -> str:
    width = COLUMN_CHARACTERS + extra
    return (text if len(text) < width else text[: width - 2] + "…").ljust(width)


def printable(text: str) -> str:
    """Text for a terminal: control characters, with which a cache could drive it, are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
