"""A child that opens a cache of a stranger and reads all of it, with limits on its memory and time.

    with Jail() as jail:
        for outcome in jail.read(folder): ...

One process imports everything once and forks a child for each cache. What a child is made to do is in `_visit`; each
step ends well, in a CacheError, or in something that must not be: another exception, a signal, more memory or time.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MEMORY_MB = 700  # more than what a process that has done nothing yet takes
TIME_S = 60


@dataclass(frozen=True)
class Outcome:
    """How a step of a visit ended. error: the class of a CacheError, or ""; message: its text; bad: what must not."""

    step: str
    error: str = ""
    message: str = ""
    bad: str = ""


@dataclass(frozen=True)
class Visit:
    """The outcomes of all steps, and the most memory that the child held beyond what it began with."""

    outcomes: tuple[Outcome, ...]
    peak_mb: float

    @property
    def bad(self) -> list[str]:
        """Everything that must not be."""
        return [f"{o.step}: {o.bad}" for o in self.outcomes if o.bad]

    def __getitem__(self, step: str) -> Outcome:
        return next(outcome for outcome in self.outcomes if outcome.step == step)


class Jail:
    """Forks a child for each cache to be read."""

    def __init__(self, memory_mb: int = MEMORY_MB, time_s: int = TIME_S) -> None:
        command = [sys.executable, __file__, str(memory_mb), str(time_s)]
        root = Path(__file__).parent.parent.parent
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=root
        )

    def read(self, cache: Path) -> Visit:
        """Open, read and verify a cache in a child of its own."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(str(cache)) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        return Visit(tuple(Outcome(*outcome) for outcome in told["outcomes"]), told["peak_mb"])

    def __enter__(self) -> "Jail":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _visit(cache: Path, say: "_Say") -> None:
    """Everything that anyone does with a cache."""
    import contextlib
    import io

    from cache_schema.__main__ import main
    from cache_schema.errors import CacheError
    from cache_schema.reader import CacheReader
    from cache_schema.schema import Columns
    from cache_schema.verify import verify

    def step(name: str, work: Callable[[], object]) -> object:
        try:
            done = work()
        except CacheError as error:
            say(name, type(error).__name__, str(error))
        except BaseException as error:
            say(name, bad=f"{type(error).__name__}: {str(error)[:300]} at {_place(error)}")
        else:
            say(name)
            return done
        return None

    reader = step("open", lambda: CacheReader.open(cache, require_sealed=False))
    step("open sealed", lambda: CacheReader.open(cache))
    if isinstance(reader, CacheReader):
        step("totals", reader.totals)
        step("vocabulary", reader.vocabulary)
        for columns in Columns:

            def read(columns: Columns = columns) -> None:
                for _ in reader.rows(columns):
                    pass

            step(columns.value, read)
    step("verify", lambda: verify(cache))
    for command in ("verify", "show"):

        def cli(command: str = command) -> None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                code = main([command, str(cache)])
            assert code in (0, 1, 2, 3), code

        step(f"command {command}", cli)


def _place(error: BaseException) -> str:
    """Where an exception came from, innermost first."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))


class _Say:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, step: str, error: str = "", message: str = "", bad: str = "") -> None:
        os.write(self._fd, json.dumps([step, error, message[:2000], bad]).encode() + b"\n")


def _child(cache: str, write: int, memory_mb: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _visit(Path(cache), _Say(write))


def _serve(memory_mb: int, time_s: int) -> None:
    import pyarrow.parquet  # noqa: F401 (so that no child has to)

    import cache_schema.__main__
    import cache_schema.show
    import cache_schema.verify  # noqa: F401

    for line in sys.stdin:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            try:
                _child(json.loads(line), write, memory_mb)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(write)
        outcomes, peak, status = _watch(pid, read, time_s)
        if status:
            outcomes.append(["the process", "", "", f"ended by {status}"])
        base = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        print(json.dumps({"outcomes": outcomes, "peak_mb": max(0.0, peak - base)}), flush=True)


def _watch(pid: int, read: int, time_s: int) -> tuple[list[list[str]], float, str]:
    """What a child says until it ends; killed when its time is up."""
    import select

    said, deadline, late = b"", time.monotonic() + time_s, False
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([read], [], [], left)[0]:
            os.kill(pid, signal.SIGKILL)
            late = True
            break
        chunk = os.read(read, 1 << 16)
        if not chunk:
            break
        said += chunk
    os.close(read)
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}" if code else ""
    ended = f"the clock, after {time_s} s" if late else ended
    lines = [json.loads(line) for line in said.split(b"\n")[:-1]]
    return lines, usage.ru_maxrss / 1024, ended


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
