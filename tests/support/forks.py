"""Processes made by the dozen: one imports what all need, and forks a child for each run. Called by the crash tests.

with ForkServer("def run(folder): ...", logs) as server:
    child = server.start(folder)
    child.release()               # until then it waits, so that something can be attached to it
    code = child.wait()           # -9 when it was killed; child.output() is what it printed
"""

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONDONTWRITEBYTECODE": "1",  # else the first run makes other calls than the second
}
HANG_S = 200  # what takes a second or less has hung by then, on whatever machine

_SERVE = """
import ctypes, io, json, os, sys, traceback

def _obey_permissions():  # as others must: without the two capabilities by which root may read and write anything
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110  # of the effective ones, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0

def _child(gate, log, arguments, bound):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 1)
    os.dup2(1, 2)
    sys.stdout = sys.stderr = printed = io.StringIO()  # bars write when the clock says so: no call is to be theirs
    code = 1
    try:
        os.read(gate, 1)
        if bound:
            _obey_permissions()
        code = run(*arguments) or 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            os.write(1, printed.getvalue().encode())
        except OSError:  # where every write is refused, the exit code has to do
            pass
        os._exit(code)

print("ready", flush=True)
for _order in sys.stdin:
    _order = json.loads(_order)
    if "start" in _order:
        _read, _write = os.pipe()
        _pid = os.fork()
        if _pid == 0:
            os.close(_write)
            _child(_read, _order["log"], _order["start"], _order["bound"])
        os.close(_read)
        print(json.dumps([_pid, _write]), flush=True)
    elif "release" in _order:
        os.write(_order["release"], b"x")
        os.close(_order["release"])
        print("released", flush=True)
    else:
        print(os.waitstatus_to_exitcode(os.waitpid(_order["wait"], 0)[1]), flush=True)
"""


class ForkServer:
    """A Python process that runs `setup` once, which defines `run(*strings)`, and forks a child for each run of it."""

    def __init__(self, setup: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._started = 0
        self._errors = (folder / "server.log").open("w+")
        self._server = subprocess.Popen(
            [sys.executable, "-c", setup + _SERVE],
            cwd=ROOT,
            env=ENV,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        assert self.answer(HANG_S) == "ready", (folder / "server.log").read_text()

    def start(self, *arguments: object, bound: bool = False) -> "Child":
        """A child that waits to be released. bound: permissions bind it, though it be root's."""
        self._started += 1
        log = self._folder / f"child-{self._started}.log"
        pid, gate = json.loads(
            self.order({"start": list(map(str, arguments)), "log": str(log), "bound": bound}) or "null"
        )
        return Child(self, pid, gate, log)

    def run(self, *arguments: object, bound: bool = False) -> "Outcome":
        """One run from start to end."""
        child = self.start(*arguments, bound=bound)
        child.release()
        code = child.wait()
        return Outcome(code, child.output(), child.pid)

    def order(self, order: dict[str, object]) -> str | None:
        """Send one line, and read the answer; None when there is none in time."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order).encode() + b"\n")
        self._server.stdin.flush()
        return self.answer(HANG_S)

    def answer(self, timeout_s: float) -> str | None:
        """The next line from the server, byte by byte: `select` does not see what a buffer holds."""
        assert self._server.stdout is not None
        fd, line = self._server.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            if not select.select([fd], [], [], timeout_s)[0]:
                return None
            byte = os.read(fd, 1)
            if not byte:
                raise AssertionError(f"the server died: {(self._folder / 'server.log').read_text()}")
            line += byte
        return line.decode().strip()

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.kill()
        self._server.wait()
        self._server.stdout.close()
        self._errors.close()


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int
    output: str
    pid: int


@dataclass
class Child:
    """One forked run."""

    server: ForkServer
    pid: int
    gate: int
    log: Path

    def state(self) -> str:
        """One letter of the kernel: R runs, S sleeps, T or t is stopped, Z is over though nobody has waited for it."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]

    def wake(self) -> None:
        """Go on, after SIGSTOP."""
        self.signal(signal.SIGCONT)

    def release(self) -> None:
        """Let it go."""
        self.server.order({"release": self.gate})

    def signal(self, number: int) -> None:
        """Send it a signal; it may be over, but is not forgotten until it has been waited for."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, minus the signal's number when one ended it. One that hangs is killed, and fails the test."""
        code = self.server.order({"wait": self.pid})
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.server.answer(10)
            raise AssertionError(f"still running after {HANG_S} s:\n{self.output()}")
        return int(code)

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")
