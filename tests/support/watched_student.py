"""Stage 2 as it is, watched: run by tests in processes of their own, through torchrun or accelerate.

    WATCH=folder [FAULTS='[["arm", rank, step, "load|backward|save|close|setup"], ...]'] watched_student.py --recipe R

Writes a line a step to `WATCH/<rank>.jsonl` before the step is taken: the arm, the step and the ids of this process's
examples; at the end, its exit code to `WATCH/<rank>.code`. FAULTS: what fails, on which process alone, with an error
that the real thing could raise there; a fifth element "kill" ends the process there instead, as a power cut would.
What another process sent as a pickled object is refused.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.distributed import distributed_c10d

from cache_schema.errors import StorageError
from pipeline.cli import guarded
from pipeline.errors import RunError
from stage2_student import __main__ as stage2
from stage2_student import checkpoint, train
from stage2_student.batches import Collator
from stage2_student.metrics import MetricsLog
from stage2_student.student import Student

RANK = int(os.environ.get("RANK", "0"))
FAULTS = json.loads(os.environ.get("FAULTS", "[]"))
now: dict[str, Any] = {"arm": "", "step": -1}


def fail_if_due(where: str, step: int, error: Exception) -> None:
    for arm, rank, at, place, *how in FAULTS:
        if (arm, rank, at, place) == (now["arm"], RANK, step, where):
            if how == ["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error


def watched() -> None:
    """Put the watchers in."""
    log = (Path(os.environ["WATCH"]) / f"{RANK}.jsonl").open("a", buffering=1)
    real = {"arm": train.train_arm, "step": train.take_step, "save": checkpoint.save}
    real |= {"read": Collator.read, "backward": Student.backward, "reset": Student.reset}
    real |= {"close": MetricsLog.__exit__}

    def train_arm(group: Any, student: Any, arm: Any, *rest: Any) -> None:
        now.update(arm=arm.run.name, step=arm.done - 1, loads=arm.done)
        real["arm"](group, student, arm, *rest)

    def take_step(*given: Any) -> Any:
        *_, step, batches, _ = given
        now["step"] = step
        ids = [i for batch in batches for i in batch.example_ids]
        log.write(json.dumps({"arm": now["arm"], "step": step, "ids": ids}) + "\n")
        return real["step"](*given)

    def read(self: Any, *given: Any) -> Any:
        now["loads"] += 1
        fail_if_due("load", now["loads"] - 1, StorageError("shard 2: Input/output error"))
        return real["read"](self, *given)

    def backward(self: Any, *given: Any) -> Any:
        fail_if_due("backward", now["step"], RuntimeError("can't allocate memory: 99 GB"))
        return real["backward"](self, *given)

    def save(folder: Any, step: int, *given: Any) -> None:
        fail_if_due("save", step, RunError(f"saving the checkpoint of step {step} failed: No space left on device"))
        real["save"](folder, step, *given)

    def close(self: Any, *given: Any) -> None:
        real["close"](self, *given)
        if given[0] is None:
            fail_if_due("close", now["step"], RunError("writing the metrics failed: No space left on device"))

    def reset(self: Any, seed: int) -> None:
        fail_if_due("setup", now["step"] + 1, RunError("the adapter is not what it was"))
        real["reset"](self, seed)

    def unpickled(*_: Any) -> None:
        raise AssertionError("a pickled object came from another process")

    distributed_c10d._unpickler = unpickled  # type: ignore[assignment]
    train.train_arm, train.take_step, checkpoint.save = train_arm, take_step, save  # type: ignore[assignment]
    Collator.read, Student.backward, Student.reset = read, backward, reset  # type: ignore[method-assign]
    MetricsLog.__exit__ = close  # type: ignore[method-assign]


if __name__ == "__main__":
    watched()
    code = guarded(stage2.main)
    (Path(os.environ["WATCH"]) / f"{RANK}.code").write_text(str(code))
    sys.exit(code)
