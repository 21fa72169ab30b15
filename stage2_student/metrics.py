"""What a run says about itself: `metrics.jsonl`, a JSON object a step, and the same in TensorBoard. Called by `train`.

    {"step": 12, "loss": 0.61, "ce": 0.43, "logit_mse": 0.36, "lr": 0.0002, "grad_norm": 0.8, "positions": 4810, ...}

`step` counts finished optimizer steps. The numbers of step n are of the adapter *before* its update, so step 1 shows
the untouched base model. `positions`: the student's answer tokens in the step; `aligned`, of an arm with uld: those of
them that have a usable row of the teacher.
"""

import json
import os
from types import TracebackType

from pipeline.run_dir import ArmDir
from stage2_student.checkpoint import storage_errors, write_whole


class MetricsLog:
    """The open log of one arm, cut back to the `done` steps that the checkpoint holds. A context manager."""

    def __init__(self, folder: ArmDir, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder.metrics
        with storage_errors(folder.root, "opening the metrics"):
            self._cut_back(done)
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
            self._board = SummaryWriter(str(folder.tensorboard), purge_step=done + 1)  # hides what came after

    def write(self, metrics: dict[str, float]) -> None:
        """Append one step, `metrics["step"]`."""
        with storage_errors(self._path, "writing the metrics"):
            self._file.write(json.dumps(metrics) + "\n")
            for name, value in metrics.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(metrics["step"]))

    def flush(self) -> None:
        """On the disk, so that a checkpoint never outlives the steps that led to it."""
        with storage_errors(self._path, "writing the metrics"):
            os.fsync(self._file.fileno())
            self._board.flush()

    def _cut_back(self, done: int) -> None:
        kept = []
        if done and self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    step = json.loads(line)["step"]
                except ValueError:  # the line that was being written when the process died
                    continue
                if step <= done:
                    kept.append(line + "\n")
        write_whole(self._path, "".join(kept))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()
