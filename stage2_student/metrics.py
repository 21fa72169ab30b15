"""What a run says about itself: `metrics.jsonl`, a JSON object a step, and the same in `train.trackers`: TensorBoard
unless another is named. Called by `train`.

    {"step": 12, "loss": 0.61, "ce": 0.43, "logit_mse": 0.36, "lr": 0.0002, "grad_norm": 0.8, "positions": 4810, ...}

`step` counts finished optimizer steps. The numbers of step n are of the adapter *before* its update, so step 1 shows
the untouched base model. `positions`: the student's answer tokens in the step; `aligned`, of an arm with uld: those of
them that have a usable row of the teacher.
"""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from cache_schema.atomic import publish
from pipeline.run_dir import ArmDir
from stage2_student.checkpoint import storage_errors
from stage2_student.trackers import Trackers

_NONE: Mapping[str, Any] = MappingProxyType({})


class MetricsLog:
    """The open log of one arm, cut back to the `done` steps that the checkpoint holds. A context manager.

    trackers: as `train.trackers`. config: what the arm is, shown there.
    """

    def __init__(
        self, folder: ArmDir, done: int, trackers: Sequence[str] = ("tensorboard",), config: Mapping[str, Any] = _NONE
    ) -> None:
        self._path, self._board = folder.metrics, None
        with storage_errors(folder.root, "opening the metrics"), ExitStack() as opened:
            last = self._cut_back(done)
            self._file = opened.enter_context(self._path.open("a", encoding="utf-8", buffering=1))
            if "tensorboard" in trackers:
                self._board = opened.enter_context(_Board(folder.tensorboard, purge_step=done + 1))
            self._others = opened.enter_context(Trackers(trackers, folder, config, last))
            self._opened = opened.pop_all()

    def write(self, metrics: dict[str, float]) -> None:
        """Append one step, `metrics["step"]`."""
        with storage_errors(self._path, "writing the metrics"):
            self._file.write(json.dumps(metrics) + "\n")
            step, values = int(metrics["step"]), {name: value for name, value in metrics.items() if name != "step"}
            if self._board is not None:
                self._board.write(step, values)
        self._others.write(step, values)

    def flush(self) -> None:
        """On the disk, so that a checkpoint never outlives the steps that led to it."""
        with storage_errors(self._path, "writing the metrics"):
            self._file.flush()
            os.fsync(self._file.fileno())
            if self._board is not None:
                self._board.flush()

    def _cut_back(self, done: int) -> int:
        """The last step that was written, whether it is kept or taken again."""
        kept, last = [], 0
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    step = json.loads(line)["step"]
                    last = max(last, step)
                except (ValueError, LookupError, TypeError):  # half a line, where the process died; or damage
                    continue
                if step <= done:
                    kept.append(line + "\n")
        publish(self._path, "".join(kept).encode())
        return last

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with storage_errors(self._path, "writing the metrics") if error is None else suppress(OSError):
            self._opened.close()  # tries once more what a full disk refused; the first error is the one to tell


class _Board:
    """TensorBoard's file of events, which hides what earlier files have from `purge_step` on. A context manager.

    Not its SummaryWriter, which writes in a thread: that one dies of a full disk with a traceback.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        made = f"{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"  # TensorBoard reads files by name
        self._file = (folder / f"events.out.tfevents.{made}").open("xb")
        self._records = RecordWriter(self._file)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(file_version="brain.Event:2")
        self._add(step=purge_step, session_log=start)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One value a name."""
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])
        self._add(step=step, summary=summary)

    def flush(self) -> None:
        self._file.flush()

    def _add(self, **content: object) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())

    def __enter__(self) -> "_Board":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
