"""Ctrl-C and SIGTERM: stop at the next safe point, and say how to go on. Called by `cli.guarded` and by long loops.

The first SIGINT or SIGTERM asks. A loop that is `deferred` looks at `requested()` between two units of its work, saves
what it has and leaves; code that has nothing to save is left at once, by `Stopped`. The second ends the process at
once, as a crash would: whatever is on the disk is whole. Exit codes: 130 after SIGINT, 143 after SIGTERM.

A terminal sends its signal to parent and children alike, a scheduler sometimes to the parent alone. So a parent passes
on what cannot be counted twice: ASK asks, however often; END ends.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

ASK, END = signal.SIGUSR1, signal.SIGUSR2
ANSWERED = "LOGITBANK_STARTED_BY"  # set for a process whose parent says how to go on
_COUNTED = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The process was asked to stop, and has. code: its exit code."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.code = 128 + signum


class _State:
    """Of this process: who asked, what is not to be torn, and whom to tell."""

    asked: int | None = None
    counted = 0
    safe_points: list[str]
    told: list[Callable[[int], None]]

    def __init__(self) -> None:
        self.safe_points, self.told = [], []


_state = _State()


def requested() -> int | None:
    """The signal that asked this process to stop, None where none did. Loops look here between two units of work."""
    return _state.asked


def ask(signum: int = ASK) -> None:
    """Ask this process as a signal would: the processes that it works with were asked."""
    if _state.asked is None:
        _state.asked = signum


@contextmanager
def deferred(safe_point: str, tell: Callable[[int], None] | None = None, leave: bool = True) -> Iterator[None]:
    """Inside, the first signal only sets `requested()`; entering and leaving raise Stopped where it is set.

    safe_point: what is waited for, in words: "the shard in work is written"; "" where a child says it. tell: called
    with ASK or END, to pass on.
    leave: without, the caller raises Stopped itself, once the processes that it works with know of it.
    """
    if leave and _state.asked is not None:
        raise Stopped(_state.asked)
    _state.safe_points.append(safe_point)
    if tell is not None:
        _state.told.append(tell)
    try:
        yield
    finally:
        _state.safe_points.pop()
        if tell is not None:
            _state.told.remove(tell)
    if leave and _state.asked is not None:
        raise Stopped(_state.asked)


@contextmanager
def listening() -> Iterator[None]:
    """Handle the signals inside. Those that are ignored (a job in the background of a script) stay so."""
    handlers = {signum: signal.getsignal(signum) for signum in (*_COUNTED, ASK, END)}
    mine = [signum for signum, handler in handlers.items() if handler is not signal.SIG_IGN]
    for signum in mine:
        signal.signal(signum, _handle)
    try:
        yield
    finally:  # once asked, the next signal also ends what Python still waits for at its exit, without a traceback
        for signum in mine:
            signal.signal(signum, signal.SIG_DFL if _state.asked is not None else handlers[signum])


def run_child(command: Sequence[str], stdout: int | None = None) -> int:
    """Run a command that listens as we do, and pass on what we are told; its exit code, 128 + n after signal n.

    Raises Stopped, once it has ended, where we were asked to stop; OSError where it cannot be started.
    """
    child: subprocess.Popen[bytes] | None = None

    def tell(signum: int) -> None:
        if child is not None:
            child.send_signal(signum)

    with deferred("", tell):  # the child says what it waits for
        child = subprocess.Popen(command, stdout=stdout, env=os.environ | {ANSWERED: str(os.getpid())})
        if _state.asked is not None:  # before there was anybody to tell
            tell(ASK)
        code = child.wait()
    return code if code >= 0 else 128 - code


def tell_sessions(signum: int) -> None:
    """Pass a signal on to those of our child processes that lead a session of their own, as torchrun's workers do."""
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            for pid in map(int, children.read_text().split()):
                with suppress(ProcessLookupError):
                    if os.getsid(pid) == pid:
                        os.kill(pid, signum)


def how_to_go_on() -> str:
    """What a stopped process says at last; nothing where its parent does, or the first of torchrun's processes."""
    if ANSWERED in os.environ or int(os.environ.get("RANK", "0")) > 0:
        return ""
    kept, world = "stopped; what was finished is kept.", os.environ.get("WORLD_SIZE", "1")
    if world != os.environ.get("LOCAL_WORLD_SIZE", world):
        return f"{kept} To go on, run the same command again, on every machine"
    start = ["python"] if world == "1" else ["torchrun", "--standalone", f"--nproc_per_node={world}"]
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return f"{kept} To go on:\n  {shlex.join([*start, *program, *sys.argv[1:]])}"


def _handle(signum: int, frame: FrameType | None) -> None:
    _state.counted += signum in _COUNTED
    if signum == END or _state.counted > 1:
        for tell in tuple(_state.told):  # which threads change meanwhile
            tell(END)
        shown_again = b"\x1b[?25h" if os.isatty(2) else b""  # the cursor, which a progress bar hides
        os.write(2, shown_again + b"\nstopped at once; what was finished before is kept\n")
        os._exit(128 + (_state.asked if _state.asked in _COUNTED else signum))
    first = _state.asked is None
    if first or (_state.asked == ASK and signum in _COUNTED):  # the exit code tells of the signal that a person sent
        _state.asked = signum
    if first and _state.safe_points:
        if _state.safe_points[-1] and int(os.environ.get("RANK", "0")) == 0:
            os.write(2, f"\nstopping when {_state.safe_points[-1]}; once more stops at once\n".encode())
        for tell in tuple(_state.told):
            tell(ASK)
    elif first:
        raise Stopped(signum)
