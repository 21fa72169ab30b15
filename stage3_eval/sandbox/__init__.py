"""Python that nobody has read, run where it can do no harm: bubblewrap, a seccomp filter, and limits. Linux only.

A program sees the system's libraries and Python's own, read-only; one folder of its own, in memory, is writable. It
has no network, no home, no environment, no /proc, and no sight of other processes; it is one process with one thread,
limited in time, memory, files and output, and dies with us. It is never run without all that: where bubblewrap does
not work, that is an error. Called by `metrics.programs`; what runs inside is `inside`.
"""

import json
import math
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from pipeline.errors import RunError
from stage3_eval.sandbox import syscalls

_MB = 2**20
_FOLDER_BYTES = 16 * _MB  # of the writable folder, and of one file in it
_MAX_OUTPUT_BYTES = _MB
_START_S = 60.0
_READY = b'"ready"\n'
_FOLDER = "/tmp"  # noqa: S108 (in the sandbox, where nobody else is)
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "HOME": _FOLDER}
_SYSTEM = ("/lib", "/lib32", "/lib64", "/bin", "/sbin")  # links into /usr on most systems, folders on some


@dataclass(frozen=True)
class Limits:
    """Of one run: seconds on the clock, and megabytes of address space."""

    timeout_s: float
    memory_mb: int


@dataclass(frozen=True)
class Ran:
    """What came back. answers: the lines, as they were written by whoever was in there; timed_out: it was stopped."""

    answers: tuple[str, ...]
    timed_out: bool


def run(code: Sequence[str], expressions: Sequence[str], limits: Limits, given: Mapping[str, str] | None = None) -> Ran:
    """Run source texts and evaluate expressions after them, in a sandbox of their own; see `inside` for the answers.

    given: names for the expressions -> answers of an earlier run. A program that writes more than a megabyte of answers
    is stopped, and has none. Raises RunError where the sandbox itself cannot be started.
    """
    request = {"limits": _resources(limits), "code": code, "given": given or {}, "expressions": expressions}
    with TemporaryFile() as stdin, TemporaryFile() as stderr, TemporaryFile() as refused:
        for file, content in ((stdin, json.dumps(request).encode()), (refused, syscalls.program())):
            file.write(content)
            file.seek(0)
        with subprocess.Popen(
            [*_command(refused.fileno()), _inside()],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            pass_fds=(refused.fileno(),),
        ) as process:
            output, timed_out = _read(process, limits.timeout_s)
        stderr.seek(0)
        said = stderr.read(2000).decode(errors="replace").strip()
    if not output.startswith(_READY):
        why = f"not ready after {_START_S:g} s" if timed_out else said or f"exit code {process.returncode}"
        raise RunError(
            f"the sandbox for programs cannot be started: {why}. bubblewrap must work for this user: try "
            "bwrap --unshare-user --ro-bind / / true (an old kernel or AppArmor may forbid user namespaces)"
        )
    lines = output.removeprefix(_READY).decode(errors="replace").split("\n")[:-1]
    return Ran(tuple(lines) if len(output) <= _MAX_OUTPUT_BYTES else (), timed_out)


@lru_cache(maxsize=1)
def check() -> None:
    """Raise RunError where no sandbox can be had. Starts one, once."""
    run([], [], Limits(timeout_s=10, memory_mb=512))


def describe(limits: Limits) -> dict[str, Any]:
    """What programs are run by and within."""
    asked = subprocess.run([_bwrap(), "--version"], capture_output=True, text=True, check=True)
    return {
        "sandbox": asked.stdout.strip(),
        "python": sys.version.split()[0],
        "timeout_s": limits.timeout_s,
        "memory_mb": limits.memory_mb,
    }


def _bwrap() -> str:
    found = shutil.which("bwrap")
    if found is None:
        raise RunError(
            "programs are run in a sandbox only, and bubblewrap is not installed: apt-get install bubblewrap "
            "(or leave the task out of the recipe)"
        )
    return found


def _command(filter_fd: int) -> list[str]:
    """bwrap with all its arguments, up to Python's `-c`."""
    python = os.path.realpath(sys.executable)  # a virtual environment's is a link to the one with the libraries
    seen = ["--ro-bind", "/usr", "/usr"]
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            seen += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            seen += ["--ro-bind", str(path), str(path)]
    for prefix in dict.fromkeys((sys.base_prefix, os.path.realpath(sys.base_prefix))):  # it may be a link, as above
        if not Path(prefix).is_relative_to("/usr"):
            seen += ["--ro-bind", prefix, prefix]
    return [
        *[_bwrap(), "--unshare-user", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"],
        *["--clearenv", *(part for pair in _ENVIRONMENT.items() for part in ("--setenv", *pair)), *seen],
        *["--dev", "/dev", "--remount-ro", "/dev", "--size", str(_FOLDER_BYTES), "--tmpfs", _FOLDER],
        *["--remount-ro", "/", "--chdir", _FOLDER, "--seccomp", str(filter_fd)],
        *["--", python, "-s", "-S", "-P", "-B", "-c"],
    ]


def _resources(limits: Limits) -> dict[str, int]:
    """What the process takes upon itself before it runs any code that is not ours."""
    return {
        "RLIMIT_AS": limits.memory_mb * _MB,
        "RLIMIT_CPU": math.ceil(limits.timeout_s) + 1,
        "RLIMIT_NPROC": 0,
        "RLIMIT_FSIZE": _FOLDER_BYTES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }


@lru_cache(maxsize=1)
def _inside() -> str:
    return Path(__file__).with_name("inside.py").read_text(encoding="utf-8")


def _read(process: "subprocess.Popen[bytes]", timeout_s: float) -> tuple[bytes, bool]:
    """Output until it ends, is too long, or the time is up; then everything in the sandbox is killed.

    The program's time starts when it is ready: how long a busy machine takes to start it is not its fault.
    """
    assert process.stdout is not None
    output, running = bytearray(), False
    deadline = time.monotonic() + _START_S
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    try:
        while len(output) <= _MAX_OUTPUT_BYTES:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return bytes(output), True
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                break  # bwrap holds this pipe too, so all of it has ended
            output += chunk
            if not running and output.startswith(_READY):
                running, deadline = True, time.monotonic() + timeout_s
    finally:
        process.kill()  # bwrap alone: all else dies with it
    return bytes(output), False
