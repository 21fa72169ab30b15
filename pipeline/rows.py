"""Where a split's rows come from, and which of them become examples. Called by `pipeline.data` alone.

A row that cannot become an example is not an error: one bad line must not stop a job of days. It becomes an example
that says why it is `unusable`; stage 1 gives it no row in the cache but an entry in the ledger. A split of which *no*
row can be used is an error that names the first of them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel

from pipeline.errors import DataError
from pipeline.sections import Data
from pipeline.tasks import Example, HubSource, Row, Task

MAX_LINE_BYTES = 2**24  # a longer line is passed over without being held in memory
MAX_TEXT = 2**20  # code points of a prompt or an answer; no model here reads so many, and tokenising them takes minutes

# What reading a row or a gatherer of rows may raise because of what is in the row.
_ROW_ERRORS = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class BadRow:
    """A row that is no example. reason: one word, for the ledger. what: for people. sha256: of the row as it is, so
    that the data's identity covers it too."""

    reason: str
    what: str
    sha256: str


def read_rows(task: Task, split: str, data: Data, options: BaseModel) -> tuple[str, Sequence[Row | BadRow]]:
    """Where a split comes from, in words for errors, and its rows. Raises DataError where there is none to read."""
    source = task.source
    rows: Sequence[Row | BadRow]
    if data.dir is not None:
        path = Path(data.dir) / task.name / f"{split}.jsonl"
        where, rows = str(path), _jsonl(path)
    elif isinstance(source, HubSource):
        where, rows = f"{source.path} on the Hub, split {split}", _hub(task, source, split)
    else:
        return f"task {task.name}, split {split}", list(source(split, options))
    if isinstance(source, HubSource) and source.rows is not None:
        return where, _gathered(task, source.rows, rows)
    return where, rows


def example_of(task: Task, split: str, row: Row | BadRow, index: int, options: BaseModel) -> Example:
    """The example of a row, its id unique over tasks and splits. Of a row that is none, one without texts that says
    why it is `unusable`; its `extra` has the row's `sha256` and, for people, `what` is wrong with it."""
    bad = row if isinstance(row, BadRow) else None
    if bad is None:
        assert not isinstance(row, BadRow)
        try:
            example = task.to_example(row, index, options)
        except _ROW_ERRORS as error:
            fields = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            what = f"task {task.name} cannot read it: {type(error).__name__} {error}; found the fields {fields}"
            bad = BadRow("unreadable_row", what, _digest(row))
        else:
            reason, what = _fault(example)
            if not reason:
                return replace(example, id=f"{split}/{example.id}")
            bad = BadRow(reason, what, _digest(row))
    extra = {"sha256": bad.sha256, "what": bad.what}
    return Example(f"{split}/{task.name}-row-{index:06d}", task.name, "", "", unusable=bad.reason, extra=extra)


def _fault(example: Example) -> tuple[str, str]:
    """(reason, what) of an example whose texts cannot be used, ("", "") of a sound one."""
    texts = (example.prompt, example.answer, *example.references, *example.labels)
    if not all(isinstance(text, str) for text in texts):
        return "not_text", "prompt and answer must be text"
    if max(map(len, texts)) > MAX_TEXT:
        return "text_too_long", f"a text of {max(map(len, texts)):,} characters; expected {MAX_TEXT:,} at most"
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # JSON allows halves of surrogate pairs; UTF-8 and tokenizers do not
        return "lone_surrogate", "prompt and answer must be text, without lone surrogates"
    return "", ""


def _digest(row: Any) -> str:
    """SHA-256 of a row, as far as JSON can say it; of any other value in it, its type."""
    try:
        text = json.dumps(row, default=lambda value: type(value).__name__)
    except _ROW_ERRORS:
        text = type(row).__name__
    return hashlib.sha256(text.encode()).hexdigest()


def _gathered(task: Task, gather: Callable[[Iterable[Row]], Iterable[Row]], rows: Sequence[Row | BadRow]) -> list[Any]:
    """The rows that a task makes of several, behind them those that it cannot read."""
    sound: list[Row] = []
    bad: list[BadRow] = []
    for row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            list(gather([row]))
        except _ROW_ERRORS as error:
            what = f"task {task.name} cannot gather its rows: {type(error).__name__} {error}"
            bad.append(BadRow("unreadable_row", what, _digest(row)))
        else:
            sound.append(row)
    return [*gather(sound), *bad]


def _jsonl(path: Path) -> list[Row | BadRow]:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise DataError(
            f"{path}: expected a file of JSON lines, found {found}; check data.dir (<dir>/<task>/<split>.jsonl)"
        )
    try:
        with path.open("rb") as file:
            return [_parsed(line, number) for number, line in enumerate(_lines(file), 1) if line != b"\n"]
    except OSError as error:
        raise DataError(f"{path}: it cannot be read: {error.strerror}") from None


def _parsed(line: bytes | BadRow, number: int) -> Row | BadRow:
    if isinstance(line, BadRow):
        return replace(line, what=f"line {number}: {line.what}")
    try:
        row: Row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return BadRow("not_json", f"line {number}: not JSON in UTF-8: {error}", hashlib.sha256(line).hexdigest())
    return row


def _lines(file: BinaryIO) -> Iterator[bytes | BadRow]:
    """The lines of a file, blank ones as a mere line end; one beyond MAX_LINE_BYTES is read in pieces and dropped."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line if line.strip() else b"\n"
            continue
        digest, size = hashlib.sha256(line), len(line)
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
            digest.update(line)
            size += len(line)
        what = f"a line of {size:,} bytes; expected {MAX_LINE_BYTES:,} at most"
        yield BadRow("line_too_long", what, digest.hexdigest())


def _hub(task: Task, source: HubSource, split: str) -> Sequence[Row]:
    import datasets

    if split not in source.splits:
        raise DataError(f"task {task.name} has no split '{split}'; it has {', '.join(source.splits)}")
    try:
        rows: Sequence[Row] = datasets.load_dataset(
            source.path, source.config, split=source.splits[split], revision=source.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"task {task.name}: the data set {source.path} could not be loaded from the Hub: {error}. "
            f"Without a network, put its rows into <folder>/{task.name}/{split}.jsonl and add --set data.dir=<folder>"
        ) from None
    return rows
