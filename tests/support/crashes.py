"""What the crash tests share: processes made by the dozen, and strace, which kills them at a system call of our choice.

    with ForkServer("def run(folder): ...", log) as server:  # imports once, then forks a child for each run
        child = server.start(folder)
        child.release()                                      # until then it waits
        code = child.wait()                                  # -9 when it was killed
    points = trace(server, [folder], folder)                 # every call of a run that changes something in `folder`
    outcome = inject(server, [folder], folder, points[7], "signal=SIGKILL")

SIGKILL injected at the entry of a call ends the process before the call has taken effect, so killing at all points in
turn leaves every state that a crash between two calls can leave: after one call is before the next.
"""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TOY_OF_THE_CACHE = ROOT / "tests" / "cache_schema" / "conftest.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
HANG_S = 200  # what takes a second or less has hung by then, on whatever machine
ENV["PYTHONDONTWRITEBYTECODE"] = "1"  # else the first run makes other calls than the second

LOAD_TOY = f"""
import importlib.util, os, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("toys_of_the_cache", {str(TOY_OF_THE_CACHE)!r})
module = sys.modules["toys_of_the_cache"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
Toy = module.Toy
"""

WRITER = (
    LOAD_TOY
    + """
from dataclasses import replace
from cache_schema.errors import CacheError
from cache_schema.writer import CacheWriter
__import__("pyarrow").array([""])  # imports pandas if it is there: once, here, and not in every child

def careless_link(source, name):
    with open(name, "xb") as file:  # in place: it has its name before it has its content
        file.write(Path(source).read_bytes())

def run(folder, how=""):
    if how == "careless":
        os.link = careless_link
    toy = Toy(examples=6, shard_examples=2, quarantined={3: "empty answer"})
    patience = {"stale_after_s": 0.001} if how == "impatient" else {}
    try:
        writer = CacheWriter.open(Path(folder), toy.manifest, toy.vocabulary, **patience)
        for shard in writer.missing()[: 1 if how == "one shard" else None]:
            if writer.claim(shard):
                rows, bad = toy.shard(shard)
                if how == "impatient":  # other bytes than anyone else's
                    rows = [replace(row, prompt="impatient") for row in rows]
                writer.commit(shard, rows, bad, {"device": how or "cpu"})
        if not writer.missing() and how != "one shard":
            writer.seal()
    except CacheError as error:
        print(f"error: {error}")
        return error.exit_code
"""
)

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


# --- what must be equal ----------------------------------------------------------------------------------------------


def cache_content(cache: Path) -> dict[str, object]:
    """Every file of a cache; documents as what they say, but for who made it when and where."""
    found: dict[str, object] = {}
    for path in sorted(p for p in cache.rglob("*") if p.is_file()):
        name = str(path.relative_to(cache))
        found[name] = _without_provenance(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()
    return found


def _without_provenance(tree: object) -> object:
    if isinstance(tree, list):
        return [_without_provenance(branch) for branch in tree]
    if isinstance(tree, dict):  # the checksum is of all fields, and so of the provenance too
        return {k: _without_provenance(v) for k, v in tree.items() if k not in ("provenance", "checksum")}
    return tree


def run_content(run: Path) -> dict[str, object]:
    """Every file of the trained students in a run folder, but for how fast they were and TensorBoard's copy of that."""
    found: dict[str, object] = {}
    for path in sorted(p for p in (run / "students").rglob("*") if p.is_file()):
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[str(path.relative_to(run))] = [{**line, "tokens_per_s": None} for line in lines]
        elif "tensorboard" not in path.parts:
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


def cache_sound(cache: Path) -> int:
    """How many shards are committed; fails unless everything is either whole or not there."""
    from cache_schema.errors import NotACache
    from cache_schema.reader import CacheReader
    from cache_schema.verify import verify

    if not (cache / "manifest.json").exists():
        with pytest.raises(NotACache):
            CacheReader.open(cache, require_sealed=False)
        return 0
    report = verify(cache)
    assert report.good, report.problems
    reader = CacheReader.open(cache, require_sealed=False)
    assert len(list(reader.rows())) == sum(record.rows for record in report.records)
    return len(report.records)


# --- small disks -----------------------------------------------------------------------------------------------------


class SmallDisk:
    """A small file system in memory, mounted in a namespace of its own: it ends with this object, whatever happens.

    path: where everybody sees it, through the process that holds the namespace.
    """

    def __init__(self, folder: Path, options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        hold = f"mount -t tmpfs -o {options} tmpfs {folder} && echo ready && exec sleep 1000000"
        command = ["unshare", "--mount", "sh", "-c", hold]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != "ready\n":
            said = self._holder.stderr.read().strip()
            self.__exit__()
            pytest.skip(f"a small file system cannot be mounted here: {said}")
        self.path = Path(f"/proc/{self._holder.pid}/root{folder}")

    def remount(self, options: str) -> None:
        """With another size, or read-only."""
        command = ["nsenter", "--mount", "--target", str(self._holder.pid)]
        subprocess.run([*command, "mount", "-o", f"remount,{options}", str(self._folder)], check=True)

    def __enter__(self) -> "SmallDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.kill()
        self._holder.communicate()


# --- strace ----------------------------------------------------------------------------------------------------------

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


def trace(server: ForkServer, arguments: Sequence[object], folder: Path, ignore: str = "(?!)") -> list[Point]:
    """Run once undisturbed; every call of its main thread that changes something in `folder`, in order.

    ignore: a pattern of lines that are nobody's concern.
    """
    child, lines = _traced(server, arguments, [])
    assert child.code == 0, child.output
    return [point for point in _points(lines, folder) if not re.search(ignore, point.line)]


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
def _strace(child: "Child", log: Path, tamper: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
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
def stalled(server: ForkServer, arguments: Sequence[object], point: Point, before: bool) -> Iterator["Child"]:
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
_TEMPORARY = re.compile(r"\.tmp[^/\s]*")  # its name has the process and random digits


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
        said = _TEMPORARY.sub(".tmp", " ".join(where))
        found.append(Point(call, counts[call], said, sum((p.call, p.line) == (call, said) for p in found)))
    return found
