"""strace, which kills, refuses or stops a process at a system call of our choice. Called by the crash tests.

    points = trace(server, [folder], folder)             # every call of a run that changes something in `folder`
    outcome = inject(server, [folder], folder, points[7], "signal=SIGKILL")

SIGKILL injected at the entry of a call ends the process before the call has taken effect, so killing at all points in
turn leaves every state that a crash between two calls can leave: after one call is before the next.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from forks import HANG_S, Child, ForkServer, Outcome

# Everything by which a process can change a folder, or rely on its being on the disk.
_TRACE = (
    "?openat,?creat,?write,?pwrite64,?writev,?pwritev,?ftruncate,?truncate,?fallocate,?fsync,?fdatasync,?rename,"
    "?renameat,?renameat2,?link,?linkat,?symlink,?symlinkat,?unlink,?unlinkat,?mkdir,?mkdirat,?rmdir,"
    "?sync_file_range,?copy_file_range,?sendfile"
)
TRIES = 10


@dataclass(frozen=True)
class Point:
    """One system call of a run: the `nth` call of this name, in the thread that is traced, and what it does where."""

    call: str
    nth: int
    line: str  # with the folder and all that differs from run to run taken out
    of_its_kind: int  # so many points before it have its call and line

    def __str__(self) -> str:
        return f"{self.call} {self.nth}: {self.line}"


class NotHit(AssertionError):
    """The run never came to the call that was meant, or it was another one there."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


def needs_strace() -> None:
    """Skip the test where strace is not installed or may not look at our processes."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("strace may not trace processes here")


def trace(server: ForkServer, arguments: Sequence[object], folder: Path) -> list[Point]:
    """Run once undisturbed; every call of its main thread that changes something in `folder`, in order."""
    child, lines = _traced(server, arguments, [])
    assert child.code == 0, child.output
    return _points(lines, folder)


def inject(
    server: ForkServer, arguments: Sequence[object], folder: Path, point: Point, what: str, lasting: bool = False
) -> Outcome:
    """Run with something injected at a point, such as `signal=SIGKILL` or `error=ENOSPC`; what came of it.

    lasting: at every later call of the same name as well. Where threads make the number of calls that open a file to
    read vary from run to run, the point is looked up anew; NotHit is raised if it is missed again and again.
    """
    nth = point.nth
    for _ in range(TRIES):
        try:
            return inject_once(server, arguments, folder, replace(point, nth=nth), what, lasting)
        except NotHit as error:
            missed = error
        shutil.rmtree(folder, ignore_errors=True)
        again = [p for p in trace(server, arguments, folder) if (p.call, p.line) == (point.call, point.line)]
        shutil.rmtree(folder)
        nth = again[point.of_its_kind].nth
    raise missed


def inject_once(
    server: ForkServer, arguments: Sequence[object], folder: Path, point: Point, what: str, lasting: bool = False
) -> Outcome:
    """As `inject`, into a folder as it is. Raises NotHit when that call of the run is another one, or never comes."""
    tamper = ["-e", f"inject={point.call}:{what}:when={point.nth}{'+' * lasting}"]
    outcome, lines = _traced(server, arguments, tamper)
    meant = [p for p in _points(lines, folder) if (p.call, p.nth) == (point.call, point.nth)]
    if [p.line for p in meant] != [point.line]:
        raise NotHit(f"meant {point}, hit {meant}\n{outcome.output}", outcome)
    return outcome


def inject_in_threads(
    server: ForkServer, arguments: Sequence[object], what: str, where: Path
) -> tuple[Outcome, list[bool]]:
    """Inject into the calls of every thread on one path, such as `fsync:error=ENOSPC`; what came of it, and of each
    hit, whether it was in another thread than the main one."""
    outcome, lines = _traced(server, arguments, ["-f", "-P", str(where), "-e", f"inject={what}"])
    hit = [line.split()[0] for line in lines if line.endswith("(INJECTED)")]
    return outcome, [int(thread) != outcome.pid for thread in hit]


def _traced(server: ForkServer, arguments: Sequence[object], tamper: Sequence[str]) -> tuple[Outcome, list[str]]:
    child = server.start(*arguments)
    log = child.log.with_suffix(".strace")
    with _strace(child, log, tamper) as strace:
        child.release()
        code = child.wait()
        strace.wait(30)
    return Outcome(code, child.output(), child.pid), log.read_text(errors="replace").splitlines()


@contextmanager
def _strace(child: Child, log: Path, tamper: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Attached to a child that waits to be released."""
    command = ["strace", "-y", "-s", "0", "-o", str(log), "-e", f"trace={_TRACE}", *tamper, "-p", str(child.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = ""
        while "attached" not in said:
            said, before = strace.stderr.readline(), said
            if not said:
                child.signal(signal.SIGKILL)
                child.wait()
                pytest.skip(f"strace cannot attach to a process here: {before.strip()}")
        yield strace


@contextmanager
def stalled(server: ForkServer, arguments: Sequence[object], point: Point, before: bool) -> Iterator[Child]:
    """A run that is stopped right before or right after a call, until `Child.wake`."""
    child = server.start(*arguments)
    log = child.log.with_suffix(".strace")
    how = "delay_enter=1000s" if before else "signal=SIGSTOP"
    with _strace(child, log, ["-e", f"inject={point.call}:{how}:when={point.nth}"]) as strace:
        child.release()
        deadline, stopped = time.monotonic() + HANG_S, 0
        while stopped < 10 and time.monotonic() < deadline:
            stopped = stopped + 1 if child.state() in ("t", "T") else 0  # for a moment it is so at every call
            assert child.state() != "Z", f"it never came to {point}:\n{child.output()}"
            time.sleep(0.002)
        if before:
            child.wake = strace.terminate  # which lets go of it
        try:
            yield child
        except BaseException:
            with suppress(ProcessLookupError):
                child.signal(signal.SIGKILL)
            raise


_CALL = re.compile(r"(\w+)\((.*)")
_VARYING = [  # names with the process, the time or random digits
    (re.compile(r"\.tmp[^/\s]*"), ".tmp"),
    (re.compile(r"\.tfevents\.[^/\s]*"), ".tfevents"),
]


def _points(lines: Sequence[str], folder: Path) -> list[Point]:
    counts: dict[str, int] = {}
    found = []
    for line in lines:
        match = _CALL.match(line)
        if match is None:  # +++ killed by SIGKILL +++
            continue
        call, rest = match[1], match[2].split(" = ")[0]  # not the path of the descriptor it returns
        counts[call] = counts.get(call, 0) + 1
        if str(folder) not in rest or (call == "openat" and "O_CREAT" not in rest):
            continue
        where = [path[len(str(folder)) :] or "." for path in re.findall(rf"{re.escape(str(folder))}[^\">]*", rest)]
        said = " ".join(where)
        for pattern, plain in _VARYING:
            said = pattern.sub(plain, said)
        found.append(Point(call, counts[call], said, sum((p.call, p.line) == (call, said) for p in found)))
    return found
