"""Starts stage 2 in several processes for tests: torchrun on one machine, accelerate's launcher on several."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.run_dir import ArmDir

WATCHED = Path(__file__).parent / "watched_student.py"
ROOT = Path(__file__).parent.parent.parent


def environment(watch: Path, faults: list[list[Any]] | None = None) -> dict[str, str]:
    """One thread a process, and where what they did is written."""
    watch.mkdir(parents=True, exist_ok=True)
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WATCH": str(watch),
        "FAULTS": json.dumps(faults or []),
        "PYTHONPATH": str(ROOT),
    }


def torchrun(processes: int, *arguments: str) -> list[str]:
    """The command line of several processes on this machine."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(start if processes > 1 else []), str(WATCHED), *arguments]


def node(rank: int, port: int, *arguments: str, module: bool = False) -> list[str]:
    """The command line of one of two machines, a process each, as in stage2_student/NODES.md."""
    start = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    what = ["--module", "stage2_student"] if module else [str(WATCHED)]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *start, *where, *plain, *what, *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ran(command: list[str], env: dict[str, str], timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run to the end, whatever it is; a hang fails the test."""
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout_s)


def metrics(folder: ArmDir) -> list[dict[str, float]]:
    return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]


def batches(watch: Path, arm: str) -> dict[int, list[str]]:
    """Step -> the example ids of its whole global batch, the processes' parts in their order; of a step that was taken
    twice the last time."""
    parts: dict[int, dict[int, list[str]]] = {}
    for path in sorted(watch.glob("*.jsonl"), key=lambda p: int(p.stem)):
        for line in path.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            if found["arm"] == arm:
                parts.setdefault(found["step"], {})[int(path.stem)] = found["ids"]
    return {step: [i for rank in sorted(ids) for i in ids[rank]] for step, ids in sorted(parts.items())}
