"""Programs that try to get out, each of which must fail: the corpus of escapes. Then what an honest one may do."""

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import promised
import pytest

from pipeline.errors import RunError
from stage3_eval import sandbox
from stage3_eval.sandbox import Limits, Ran, run


def _why_not() -> str:
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    works = subprocess.run(["bwrap", "--unshare-user", "--ro-bind", "/", "/", "true"], capture_output=True, text=True)
    return works.stderr.strip() and f"bubblewrap does not work here: {works.stderr.strip()}"


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())
LIMITS = Limits(timeout_s=20, memory_mb=256)
BRIEF = Limits(timeout_s=0.5, memory_mb=256)


def attempt(code: str, limits: Limits = LIMITS) -> str | None:
    """What a program left in `result`: "ESCAPED", or the name of the exception; None if it never came so far."""
    ran = run([f"result = 'nothing'\ntry:\n{textwrap.indent(textwrap.dedent(code), '    ')}\n    result = 'ESCAPED'\n"
               "except BaseException as error:\n    result = type(error).__name__\n"], ["result"], limits)  # fmt: skip
    return ran.answers[0].strip('"') if ran.answers else None


# -- files


@pytest.mark.parametrize("where", ["/", "/usr", "/dev", "/dev/shm", "/etc", "/home", "/var/tmp", sys.base_prefix])
def test_it_writes_nowhere_else(where):
    assert attempt(f"open({where!r} + '/planted', 'w').write('x')") in ("OSError", "FileNotFoundError")
    assert not (Path(where) / "planted").exists()


def test_its_own_folder_is_gone_afterwards():
    assert attempt("open('mine', 'w').write('x'); assert open('/tmp/mine').read() == 'x'") == "ESCAPED"  # it may
    assert attempt("open('mine')") == "FileNotFoundError"
    assert not Path("/tmp/mine").exists()


def test_it_sees_no_file_of_ours(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("told")
    for path in (secret, Path(__file__), Path.home() / ".bashrc", Path("/etc/passwd"), Path("/etc/shadow")):
        assert attempt(f"open({str(path)!r})") == "FileNotFoundError"
    for path in (Path("/proc/self/mem"), Path("/proc/1/environ"), Path("/sys/kernel")):
        assert attempt(f"import os; os.stat({str(path)!r})") == "FileNotFoundError"


def test_it_reads_no_environment_and_no_arguments_of_ours(monkeypatch):
    monkeypatch.setenv("A_SECRET", "told")
    ran = run(["import os, sys"], ["sorted(os.environ)", "sys.argv", "os.getcwd()"], LIMITS)
    assert ran.answers == (
        '{"list": ["HOME", "LC_ALL", "PWD", "PYTHONHASHSEED"]}',
        '{"list": ["-c"]}',
        '"/tmp"',
    )


def test_it_holds_no_open_file_of_ours():
    held = "[fd for fd in range(64) if not isinstance(stat(fd), str) and fd not in (0, 1, 2, 3)]"
    code = "import os\ndef stat(fd):\n    try:\n        return os.fstat(fd)\n    except OSError:\n        return ''"
    assert run([code], [held], LIMITS).answers == ('{"list": []}',)
    assert attempt("import os; os.read(3, 1)") == "OSError"  # 3: its answers, to be written only


def test_a_full_disk_is_its_own():
    code = "file = open('big', 'wb')\nfor _ in range(100):\n    file.write(bytes(2**20)); file.flush()"
    assert attempt(code) == "OSError"
    code = "for i in range(100):\n    open(f'big{i}', 'wb').write(bytes(2**20))"
    assert attempt(code) == "OSError"


# -- the network, and other processes


def test_it_reaches_no_server_of_ours():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        assert attempt(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)") == "PermissionError"
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import threading; threading.Thread(target=print).start()",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import socket; socket.socketpair()",
        "import os; os.memfd_create('x')",
        "import os; os.kill(os.getppid(), 0); os.kill(-1, 9); import time; time.sleep(5); raise KeyError",
    ],
)
def test_it_starts_no_process_thread_or_socket(code):
    """The last is a kill of all it can see, itself apart: the rest of the sandbox outlives it, or all of it ends."""
    found = attempt(code)
    assert found != "ESCAPED"
    assert found in (None, "PermissionError", "BlockingIOError", "RuntimeError", "ProcessLookupError", "KeyError")


@pytest.mark.parametrize(
    "call",
    [
        "unshare(0x10000000)",  # a user namespace of its own, where it would be root
        "unshare(0x00020000)",
        "mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "setns(0, 0)",
        "ptrace(16, 1, 0, 0)",
        "shmget(0, 4096, 0o1600)",  # memory that counts towards no process
        "msgget(0, 0o1600)",
        "syscall(425, 8, 0)",  # io_uring_setup: would get round a filter
        "syscall(435, 0, 0)",  # clone3
    ],
)
def test_the_kernel_refuses_it(call):
    found = attempt(f"""
        import ctypes
        if ctypes.CDLL(None, use_errno=True).{call} == -1:
            raise OSError(ctypes.get_errno(), 'refused')
    """)
    assert found == "PermissionError"


def test_our_process_is_out_of_its_sight():
    assert attempt(f"import os; os.kill({os.getpid()}, 0)") == "ProcessLookupError"


# -- time, memory, output


def test_a_fork_bomb_is_one_process():
    assert attempt("import os\nwhile True:\n    os.fork()") in ("PermissionError", "BlockingIOError")


def test_a_memory_bomb_ends_in_a_memory_error():
    assert attempt("x = bytearray(2**40)") == "MemoryError"
    assert attempt("x = []\nwhile True:\n    x.append(bytearray(2**24))") == "MemoryError"
    assert attempt("import mmap; mmap.mmap(-1, 2**40)") == "OSError"


def test_limits_cannot_be_raised():
    assert attempt("import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))") == "ValueError"
    assert attempt("import os; os.setuid(1)") in ("PermissionError", "OSError")


@pytest.mark.promise(promised.SANDBOX)
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(10**6)",
        "import signal\nfor s in {*range(1, 32)} - {9, 19}:\n    signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "import os, time; os.closerange(0, 64); time.sleep(10**6)",
        "9 ** 9 ** 9",
        "import atexit\ndef again():\n    while True: pass\natexit.register(again)\nraise SystemExit",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
)
def test_time_is_up(code, monkeypatch, tmp_path, tried):
    mark = f"# {tmp_path}"
    inside = sandbox._inside()
    monkeypatch.setattr(sandbox, "_inside", lambda: inside + mark)
    assert run([code], ["1"], BRIEF) == Ran((), timed_out=True)
    assert _running(mark) == []
    tried(1, "programs that do not end")


def test_it_dies_with_us(tmp_path):
    """Even where we are killed and can clean up nothing."""
    mark = f"# {tmp_path}"
    ours = f"""if True:
        import os
        from stage3_eval import sandbox
        inside, read = sandbox._inside() + {mark!r}, os.read
        sandbox._inside = lambda: inside
        def told(*args):
            found = read(*args)
            if found == sandbox._READY:
                print("ready", flush=True)
            return found
        os.read = told
        sandbox.run(["while True: pass"], [], sandbox.Limits(10**6, 256))
    """
    with subprocess.Popen([sys.executable, "-c", ours], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
    assert _running(mark) == []


def _running(mark: str) -> list[str]:
    """Processes with the mark in their command line, if they do not end soon: one that is killed needs a moment."""
    for _ in range(50):
        found = subprocess.run(["pgrep", "-f", mark], capture_output=True, text=True).stdout.split()
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.write(3, b'x' * 65536)",  # the pipe of its answers
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'x' * 2**21)\n    except OSError: pass",
        "x = 'y' * 2**21",
    ],
)
def test_a_flood_of_answers_is_cut(code):
    ran = run([code], ["x"], LIMITS)
    assert (ran.answers, ran.timed_out) == ((), False)


def test_printing_is_not_answering():
    ran = run(["import sys\nprint('true\\n' * 10**6)\nsys.stderr.write('true\\n' * 10**6)"], ["1 + 1"], LIMITS)
    assert ran.answers == ("2",)


# -- the promise, clause by clause

CALL = """
import ctypes
if ctypes.CDLL(None, use_errno=True).{} == -1:
    raise OSError(ctypes.get_errno(), 'refused')
"""
WRITES = {
    **{f"a file in {where}": f"open({where + '/planted'!r}, 'w')" for where in ("/", "/usr", "/dev", "/dev/shm", "/etc",
                                                                              "/home", "/root", "/var/tmp", "/run")},
    "a folder": "import os; os.mkdir('/planted')",
    "up from its own": "open('../planted', 'w')",
    "through a link": "import os; os.symlink('/usr/planted', 'link'); open('link', 'w')",
    "by a hard link": "import os; os.link('/usr/bin/env', 'mine')",
    "through /proc/self/root": "open('/proc/self/root/planted', 'w')",
    "through /proc/self/cwd": "open('/proc/self/cwd/../planted', 'w')",
    "its memory": "open('/proc/self/mem', 'wb')",
    "over its Python": "import os, sys; open(os.path.realpath(sys.executable), 'r+b')",
    "over its library": "import os; open(os.__file__, 'a')",
    "a device": "import os; os.mknod('null', 0o20666, os.makedev(1, 3))",
    "the root with write": CALL.format("mount(b'none', b'/', b'', 32, None)"),
    "another root": "import os; os.chroot('/tmp')",
    "a terminal": "open('/dev/tty', 'w')",
}  # fmt: skip
NETWORK = {
    **{f"a socket of family {family}": f"import socket; socket.socket({family}, {kind})"
       for family, kind in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (10, 1), (10, 2), (16, 3), (17, 3), (40, 1))},
    "an abstract name": "import socket; socket.socket(socket.AF_UNIX).bind('\\0name')",
    "a name to resolve": "import socket; socket.getaddrinfo('example.org', 80)",
    "a page": "import urllib.request; urllib.request.urlopen('http://127.0.0.1/', timeout=1)",
    "a pair": "import socket; socket.socketpair()",
    "a ring": CALL.format("syscall(425, 8, 0)"),
}  # fmt: skip
PROCESSES = {
    "a fork": "import os; os.fork()",
    "two forks and a session": "import os\nif not os.fork():\n    os.setsid()\n    os.fork()",
    "a fork bomb": "import os\nwhile True:\n    os.fork()",
    "vfork": CALL.format("vfork()"),
    "clone": CALL.format("syscall(56, 17, 0, 0, 0, 0)"),
    "clone3": CALL.format("syscall(435, 0, 0)"),
    "a daemon": "import multiprocessing as m; m.Process(target=print, daemon=True).start()",
    "a thread": "import threading; threading.Thread(target=print).start()",
    "a command": "import os; assert os.system('true') == 0",
    "a debugger of its parent": CALL.format("ptrace(16, 1, 0, 0)"),
    "memory that stays": CALL.format("shmget(0, 4096, 0o1600)"),
    "a timer that cannot be stopped": "import signal; signal.signal(signal.SIGKILL, signal.SIG_IGN)",
    "more time": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))",
    "more memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
}


@pytest.mark.promise(promised.SANDBOX)
def test_no_way_out(tried):
    corpus = WRITES | NETWORK | PROCESSES
    assert {name for name, code in corpus.items() if attempt(code) == "ESCAPED"} == set()
    assert not Path("/planted").exists() and not Path("/usr/planted").exists()
    tried(len(WRITES), "programs that write elsewhere")
    tried(len(NETWORK), "programs that look for a network")
    tried(len(PROCESSES), "programs that start another, or raise their limits")


def test_what_is_no_way_out_is_open():
    """The control: an attempt that is allowed says ESCAPED."""
    for code in ("open('/tmp/mine', 'w')", "import os; os.getpid()", "import resource; resource.getrlimit(0)"):
        assert attempt(code) == "ESCAPED"


# -- what an honest program may do


def test_the_standard_library_is_there():
    code = "import re, math, heapq, itertools, collections, functools, datetime, decimal, random, json, ctypes, bisect"
    assert run([code], ["math.comb(5, 2)", "re.findall('a', 'banana')"], LIMITS).answers == (
        "10",
        '{"list": ["a", "a", "a"]}',
    )
    assert attempt("import numpy") == "ModuleNotFoundError"


def test_runs_are_alike():
    """The hash seed is fixed, so that a set has one order."""
    found = {run([], ["list({'a', 'b', 'c', 'd', 'e'})"], LIMITS).answers for _ in range(3)}
    assert len(found) == 1


def test_a_program_that_raises_answers_no_more():
    assert run(["def f(x): return 1 / x"], ["f(1)", "f(0)", "f(2)"], LIMITS).answers == ("1.0",)
    assert run(["raise ValueError"], ["1"], LIMITS).answers == ()
    assert run(["this is no Python"], ["1"], LIMITS).answers == ()
    assert run(["x = input()"], ["1"], LIMITS).answers == ()


def test_the_smallest_memory_of_a_recipe_suffices_to_start():
    assert run(["x = 3"], ["x"], Limits(20, 64)).answers == ("3",)


def test_python_is_found_where_its_folder_is_a_link(monkeypatch, tmp_path):
    """As uv and pyenv lay it out: the interpreter is known by its real path, its prefix by the link."""
    link = tmp_path / "python"
    link.symlink_to(sys.base_prefix)
    monkeypatch.setattr(sys, "base_prefix", str(link))
    assert str(link) in sandbox._command(3)
    assert run(["import json"], ["json.dumps(3)"], LIMITS).answers == ('"3"',)


# -- no sandbox, no run


def test_without_bubblewrap_nothing_is_run(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.check.cache_clear()
    with pytest.raises(RunError, match="bubblewrap is not installed: apt-get install bubblewrap"):
        sandbox.check()


def test_a_bubblewrap_that_fails_is_an_error_not_a_wrong_answer(monkeypatch, tmp_path):
    refuses = tmp_path / "bwrap"
    refuses.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    refuses.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RunError, match=r"cannot be started: bwrap: setting up uid map: Permission denied\. bubblewrap"):
        run([], [], LIMITS)


def test_an_unknown_machine_is_refused(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(RunError, match="x86_64 and aarch64 only, found riscv64"):
        run([], [], LIMITS)
