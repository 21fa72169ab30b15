"""The processes that train together, on one machine or on several: how they agree. Called by `__main__` and `train`.

Processes that wait for one another must all take the same way. So whatever may fail on one of them alone (its disk, its
memory, its part of a batch) is done between two sums or inside `agree`, after which all know of it and all raise. What
lies on disk (checkpoints, metrics, arm.json) is read and written by the main process alone: the others need not see
its run folder, and get what they need from it over the network.
"""

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast
from torch import Tensor

from cache_schema.errors import CacheError
from cache_schema.manifest import differences
from cache_schema.reader import CacheReader
from pipeline.errors import RunError, UserError
from stage2_student.arms import ArmPlan
from stage2_student.checkpoint import MOMENTS
from stage2_student.student import Student

WAIT = timedelta(minutes=30)  # for one another; the main process reads a whole cache alone for its alignment.json
# What stops an arm but not the run; anything else is a bug of ours and ends in a traceback.
CONTAINED = (UserError, CacheError, OSError, RuntimeError, MemoryError)


class GroupBroken(RunError):
    """A process of the group is gone, so nothing can be trained on."""


class Group:
    """This process among `ranks`; rank 0 is the main one. A group of one agrees with itself at no cost."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.ranks, self.main = (
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.is_main_process,
        )

    @classmethod
    def join(cls, cpu: bool) -> "Group":
        """The group that torchrun or accelerate started this process in; waits for all of it. cpu: use no GPU."""
        patience = InitProcessGroupKwargs(timeout=WAIT)
        return cls(Accelerator(cpu=cpu, kwargs_handlers=[patience]))

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all processes. Raises GroupBroken."""
        with _connection():
            total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
            return total

    def any(self, mine: bool) -> bool:
        """Whether it is so on any process. Raises GroupBroken."""
        if self.ranks == 1:
            return mine
        return bool(self.sum(torch.tensor([int(mine)], device=self.accelerator.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank: plain JSON (a tuple comes back as a list), sent as such, since what another
        machine sends is not to be unpickled. Raises GroupBroken."""
        if self.ranks == 1:
            return [value]
        device, mine = self.accelerator.device, bytearray(json.dumps(value).encode())
        with _connection():
            sizes = self.accelerator.gather(torch.tensor([len(mine)], device=device)).tolist()
            mine += bytes(max(sizes) - len(mine))
            padded = torch.frombuffer(mine, dtype=torch.uint8).to(device)
            everything = bytes(self.accelerator.gather(padded).cpu().numpy())
        each = range(0, len(everything), len(mine))
        return [json.loads(everything[start : start + size]) for start, size in zip(each, sizes, strict=True)]

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Do what may fail here alone, with no collective inside; where it fails on any process, all raise."""
        problem: Exception | None = None
        try:
            yield
        except GroupBroken:
            raise
        except CONTAINED as error:
            problem = error
        if self.ranks == 1:
            if problem is not None:
                raise problem
        elif any(said := self._said(problem)):
            raise self._failure(problem, said)

    def failure(self, problem: Exception | None) -> Exception:
        """What to raise on this process, once all know that one of them has a problem. All must call it."""
        return self._failure(problem, self._said(problem))

    def _said(self, problem: Exception | None) -> list[str]:
        return self.gather("" if problem is None else f"{problem}" or type(problem).__name__)

    def _failure(self, problem: Exception | None, said: Sequence[str]) -> Exception:
        if problem is not None:
            return problem
        rank = next(rank for rank, words in enumerate(said) if words)
        return RunError(f"process {rank} of {self.ranks}: {said[rank]}")

    def same_plan(self, arms: Sequence[ArmPlan], reader: CacheReader) -> list[ArmPlan]:
        """The arms with the main process's finished steps, once every process has the same ones and the same cache.

        Raises RunError naming process, machine and fields where they differ.
        """
        with self.agree():
            mine = {"cache": reader.manifest.fingerprint, "examples": len(reader)}
            mine |= {arm.label: arm.identity for arm in arms}
        found = self.gather((socket.gethostname(), mine, [arm.done for arm in arms]))
        lines = []
        for rank, (host, theirs, _) in enumerate(found):
            for field in differences(found[0][1], theirs):
                lines.append(f"  {field.field}: process 0 has {field.cached}, process {rank} on {host} {field.asked}")
        if lines:
            raise RunError(
                "\n".join(["the processes of this run were not asked for the same training:", *lines])
                + "\n  next: give every machine the same command, recipe, models and cache (python -m pipeline status)"
            )
        return [replace(arm, done=done) for arm, done in zip(arms, found[0][2], strict=True)]

    def share(self, student: Student, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Give every process the main one's adapter and optimizer state after `step` steps, to the bit."""
        if self.ranks == 1:
            return
        tensors = [parameter.data for parameter in student.parameters.values()]
        for parameter in student.parameters.values() if step else ():
            state = optimizer.state[parameter]
            if not self.main:
                state["step"] = torch.tensor(float(step))
                state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            tensors += [state[moment] for moment in MOMENTS]
        with _connection():
            flat = broadcast(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


@contextmanager
def _connection() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GroupBroken(
            f"the processes lost each other: {first}\n"
            "  next: look for the error of the one that is gone, and run the same command on every machine again: it "
            "goes on from the last checkpoint"
        ) from error
