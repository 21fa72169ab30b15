"""What was generated, kept so that it is never generated twice: one file per model, condition and block of examples.

    <run>/predictions/<student or reference>/<condition>/<block>-<identity[:12]>.jsonl.zst

The first line is the header: the identity (everything that decides the text: weights, adapter, tokenizer and
layout, engine, length limit, ...), and provenance. Then a line an example. The identity's hash is in the file's name,
so what was generated under another one is simply not found. A line also carries a digest of its prompt text with the
worked examples in it and of the labels to weigh, so it is found by its content, whatever examples are asked for.
Called by `answers`.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_schema.atomic import is_temporary, publish
from cache_schema.manifest import fingerprint_of
from pipeline.errors import RunError
from pipeline.run_dir import RunDir
from pipeline.tasks import Example

FORMAT = "logitbank predictions 1"
SUFFIX = ".jsonl.zst"
_TRIES = 3  # at a temporary file that somebody else swept


@dataclass(frozen=True)
class Prediction:
    """One answer.

    id, task: of the example. prompt: digest of the prompt text (`prompt_digest`). prediction: what was written, up to
    end-of-sequence. tokens: how many, end-of-sequence included. finished: whether it ended by end-of-sequence;
    otherwise it was cut at eval.max_new_tokens. label_logprobs: of a classification, the log-likelihood in nats of each
    of the example's labels as the whole answer, in their order. too_long: the prompt and an answer do not fit into the
    model's window, so nothing was asked; it counts as wrong.
    """

    id: str
    task: str
    prompt: str
    prediction: str
    tokens: int
    finished: bool
    label_logprobs: tuple[float, ...] | None = None
    too_long: bool = False

    @classmethod
    def read(cls, line: str) -> "Prediction":
        """From a line of a file. Raises ValueError or TypeError."""
        fields = json.loads(line)
        if fields.get("label_logprobs") is not None:
            fields["label_logprobs"] = tuple(float(value) for value in fields["label_logprobs"])
        return cls(**fields)

    @classmethod
    def unanswered(cls, example: Example, digest: str) -> "Prediction":
        """Of an example whose prompt is too long. Its labels are equally likely, which no metric takes for right."""
        logprobs = (0.0,) * len(example.labels) if example.labels else None
        return cls(example.id, example.task, digest, "", 0, True, logprobs, too_long=True)


@dataclass(frozen=True)
class PredictionFile:
    """The predictions of one identity: id -> prediction, and the header's provenance."""

    path: Path
    identity: Mapping[str, Any]
    predictions: Mapping[str, Prediction]
    provenance: Mapping[str, Any]

    def of(self, example: Example, digest: str) -> Prediction | None:
        """The prediction for an example, if it was made for this very prompt and labels, and those were weighed."""
        found = self.predictions.get(example.id)
        if found is None or found.prompt != digest:
            return None
        weighed = len(found.label_logprobs or ())
        return found if weighed == len(example.labels) else None


def prompt_digest(example: Example, shots: Sequence[Example] = ()) -> str:
    """A short hash of what is asked: the untemplated prompt, its worked examples and, if there are, its labels."""
    content = [example.task, example.prompt, [[shot.prompt, shot.answer] for shot in shots]]
    content += [list(example.labels)] if example.labels else []
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def path_of(run_dir: RunDir, model: str, condition: str, block: str, identity: Mapping[str, Any]) -> Path:
    """Where the predictions of an identity lie."""
    return run_dir.predictions(model, condition) / f"{block}-{fingerprint_of(dict(identity))[:12]}{SUFFIX}"


def load(path: Path, identity: Mapping[str, Any] | None = None) -> PredictionFile:
    """Read a file; an empty one where there is none. identity: what its header must say.

    Raises RunError naming the file and the line where it is damaged.
    """
    import zstandard

    if not path.exists():
        return PredictionFile(path, dict(identity or {}), {}, {})
    again = f"remove it (rm {shlex.quote(str(path))}) and run the same command: it is generated again"
    try:
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            lines = stream.read().decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, zstandard.ZstdError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read: {error}; {again}") from None
    number = 1
    try:
        header = json.loads(lines[0])
        found = header["identity"]
        if header["format"] != FORMAT or (identity is not None and found != dict(identity)):
            raise ValueError(f"expected the header of '{FORMAT}' with this identity, found {lines[0][:200]}")
        predictions = {}
        for number, line in enumerate(lines[1:], 2):  # noqa: B007 (told in the error)
            prediction = Prediction.read(line)
            predictions[prediction.id] = prediction
        if len(predictions) != header["predictions"]:
            raise ValueError(f"expected {header['predictions']} predictions, found {len(predictions)}")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"{path}, line {number}: not what was written: {error}; {again}") from None
    return PredictionFile(path, found, predictions, header["provenance"])


def newest(run_dir: RunDir, model: str, condition: str, block: str) -> PredictionFile | None:
    """The predictions written last, whatever model made them: for scoring where the model is not."""
    found = sorted(run_dir.predictions(model, condition).glob(f"{block}-*{SUFFIX}"), key=lambda p: p.stat().st_mtime)
    return load(found[-1]) if found else None


def kept_conditions(run_dir: RunDir, model: str) -> list[str]:
    """The conditions that have a folder of predictions."""
    root = run_dir.predictions(model, "zero_shot").parent
    return sorted(path.name for path in root.glob("*") if path.is_dir())


def save(file: PredictionFile, new: Iterable[Prediction], provenance: Mapping[str, Any]) -> PredictionFile:
    """Add predictions to a file; it is replaced whole, under its name at once. Raises RunError if the disk refuses."""
    import zstandard

    predictions = {**file.predictions, **{prediction.id: prediction for prediction in new}}
    header = {
        "format": FORMAT,
        "identity": dict(file.identity),
        "predictions": len(predictions),
        "provenance": dict(provenance),
    }
    lines = [header, *(asdict(predictions[key]) for key in sorted(predictions))]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        _write(file.path, zstandard.ZstdCompressor(level=9).compress(text.encode("utf-8")))
    except OSError as error:
        raise RunError(
            f"{file.path}: cannot be written: {error.strerror}; make room or set run_dir=<folder>, and run the same "
            "command: what was saved before is kept"
        ) from None
    return PredictionFile(file.path, file.identity, predictions, provenance)


def _write(path: Path, data: bytes) -> None:
    """Publish a file, and sweep what a killed process left beside it. Another machine, which cannot tell whether we
    live, may sweep ours as well: then it is written again."""
    for last in range(_TRIES, 0, -1):
        path.parent.mkdir(parents=True, exist_ok=True)
        for beside in path.parent.iterdir():
            if is_temporary(beside.name) and not _alive(beside.name.split("-")[1]):
                beside.unlink(missing_ok=True)
        try:
            return publish(path, data)
        except FileNotFoundError:
            if last == 1:
                raise
    return None


def _alive(pid: str) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
