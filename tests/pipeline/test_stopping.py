"""What signals do to a process that listens, in all orders in which they may come; and to its child."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import stopping

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import os, signal, sys
from pipeline.cli import guarded
from pipeline.stopping import deferred, requested

def main(argv):
    with {region}:
        for name in {signals}:
            os.kill(os.getpid(), getattr(signal, name))
        print("safe point", requested(), flush=True)
    print("gone on", flush=True)
    return 0

sys.exit(guarded(main))
"""
DEFERRED, BARE = 'deferred("all is done")', "open(os.devnull)"


def ended(signals: list[str], region: str = DEFERRED) -> tuple[int, bool, str]:
    """(exit code, whether the safe point was reached, stderr) of a process that gets these signals."""
    code = PROGRAM.format(region=region, signals=signals)
    # env: a test that runs in the background of a script has SIGINT ignored, and hands that down
    command = ["env", "--default-signal=INT", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, "safe point" in done.stdout, done.stderr + done.stdout


@pytest.mark.parametrize(
    ("signals", "code", "safe"),
    [
        (["SIGINT"], 130, True),
        (["SIGTERM"], 143, True),
        (["SIGUSR1", "SIGUSR1"], 138, True),  # a parent asks as often as it likes
        (["SIGINT", "SIGUSR1"], 130, True),  # the terminal first, then the parent that the terminal told too
        (["SIGUSR1", "SIGINT"], 130, True),  # and the other way round: one press of the key is no second one
        (["SIGINT", "SIGINT"], 130, False),
        (["SIGINT", "SIGTERM"], 130, False),
        (["SIGUSR1", "SIGINT", "SIGINT"], 130, False),
        (["SIGINT", "SIGUSR2"], 130, False),
        ([], 0, True),  # the control
    ],
)
def test_the_first_signal_asks_and_the_second_ends(signals, code, safe):
    found, reached, said = ended(signals)
    assert (found, reached) == (code, safe), said
    assert ("gone on" in said) == (not signals)
    assert ("stopped at once" in said) == (not safe)
    if safe and "SIGINT" in signals:
        assert "To go on:" in said


def test_where_nothing_is_to_be_saved_the_first_one_ends():
    code, reached, said = ended(["SIGTERM"], BARE)
    assert (code, reached) == (143, False) and "what was finished is kept" in said


def test_an_ignored_signal_stays_ignored():
    """`nohup`, and a job in the background of a script."""
    code = PROGRAM.format(region=DEFERRED, signals=["SIGINT"])
    command = ["env", "--ignore-signal=INT", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "gone on" in done.stdout


def test_every_child_is_told_though_one_ends_meanwhile(monkeypatch):
    """As in a sweep of several jobs: the thread of a child that has ended takes it off while the others are told."""
    state, told = stopping._State(), []
    monkeypatch.setattr(stopping, "_state", state)

    def ended(signum):
        told.append(signum)
        state.told.remove(ended)

    state.safe_points.append("")
    state.told += [ended, told.append, told.append]
    stopping._handle(stopping.ASK, None)
    assert told == [stopping.ASK] * 3 and state.asked == stopping.ASK


PARENT = """
import sys
from pipeline.cli import guarded
from pipeline.stopping import run_child
sys.exit(guarded(lambda argv: run_child([sys.executable, "-c", sys.argv[1]])))
"""
CHILD = """
import signal, sys, time
from pipeline.cli import guarded
from pipeline.stopping import deferred, requested

def main(argv):
    with deferred("the child's step is done"):
        print("ready", flush=True)
        while not requested():
            time.sleep(0.01)
        {then}
    return 0

sys.exit(guarded(main))
"""


@pytest.mark.parametrize("group", [True, False], ids=["the terminal tells both", "a scheduler tells the parent alone"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_child_is_asked_once(group, signum, code):
    child = CHILD.format(then='time.sleep(0.5); print("saved", flush=True)')
    with subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, "-c", PARENT, child],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        if group:
            os.killpg(parent.pid, signum)
        else:
            parent.send_signal(signum)
        said = parent.stdout.read()
    assert parent.returncode == code, said
    assert "saved" in said and "stopped at once" not in said and "Traceback" not in said


def test_the_second_signal_reaches_the_child_too():
    """Which hangs here, at its way to the safe point: were it not ended, its end of the pipe would stay open."""
    with subprocess.Popen(
        [
            "env",
            "--default-signal=INT",
            sys.executable,
            "-c",
            PARENT,
            CHILD.format(then="print('hangs', flush=True); time.sleep(600)"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        parent.send_signal(signal.SIGINT)
        while "hangs" not in parent.stdout.readline():
            pass
        parent.send_signal(signal.SIGINT)
        said = parent.stdout.read()
    assert parent.returncode == 130 and "stopped at once" in said and "Traceback" not in said
