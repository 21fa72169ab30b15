"""Progress as a terminal, a log file and a machine see it, each in a process of its own; and the figures, on a clock
that the test turns."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.progress import Pace, clock_text, progress, rate_text

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import argparse, sys, time
from pipeline import output
from pipeline.progress import progress, waiting

with output.whole():
    output.choose(argparse.Namespace(output=sys.argv[1] or None))
    with waiting("loading [red]it"):
        time.sleep(0.05)
    with progress("stage [1]", 20, "examples", done=8) as bar:
        for i in range(6):
            time.sleep(0.02)
            bar.advance(2, note=f"loss {i}")
            print(f"said {i}")
            with waiting("loading more"), progress("inner", 2, "texts") as inner:
                inner.advance(2)
                time.sleep(0.15 * (i == 2))
    output.result("all is done", made=20)
    output.finish(0)
"""


def printed(mode: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, mode]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=True)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_eta_are_those_of_the_last_minute():
    clock = Clock()
    pace = Pace(1000, 100, clock)
    assert pace.rate is None and pace.eta_s is None
    for _ in range(50):  # what was there at the start does not make it faster
        clock.now += 1
        pace.to(pace.done + 2)
    assert pace.rate == pytest.approx(2) and pace.eta_s == pytest.approx((1000 - 200) / 2)
    for _ in range(70):  # a slow part: a minute later nothing is left of the fast one
        clock.now += 2
        pace.to(pace.done + 1)
    assert pace.rate == pytest.approx(0.5) and pace.eta_s == pytest.approx(730 / 0.5)
    clock.now += 1000
    assert pace.rate < 0.05, "a loop that stands still is no fast one"
    pace.to(1000)
    assert pace.eta_s == 0


def test_a_step_back_is_no_negative_rate():
    clock = Clock()
    pace = Pace(100, 0, clock)
    clock.now = 10
    pace.to(50)
    clock.now = 20
    pace.to(30)
    assert pace.rate is None and pace.eta_s is None
    clock.now = 30
    pace.to(40)
    assert pace.rate == pytest.approx(1)


def test_what_comes_before_the_first_unit_makes_a_loop_no_slower():
    clock = Clock()
    pace = Pace(100, 20, clock)
    clock.now = 500  # a teacher is loaded, and the loop says so
    pace.to(20)
    for _ in range(10):
        clock.now += 1
        pace.to(pace.done + 4)
    assert pace.rate == pytest.approx(4) and pace.eta_s == pytest.approx(10) and pace.elapsed_s == 510


def test_the_figures_in_words():
    assert rate_text(12.345, "steps") == "12.3 steps/s" and rate_text(0.4, "steps") == "2.5 s/step"
    assert rate_text(123456, "tokens") == "123,456 tokens/s" and rate_text(None, "steps") == "? steps/s"
    assert [clock_text(s) for s in (0, 61.6, 3723, None)] == ["00:00", "01:02", "1:02:03", "?"]


def test_progress_in_a_log_is_whole_lines(capsys):
    with progress("work", 10, "things", done=4) as bar:
        bar.advance(6, note="loss 1.5")
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("work: 40% 4/10 things")
    assert re.fullmatch(r"work: 100% 10/10 things \[00:00<00:00, [\d.,]+ things/s, loss 1\.5\]", last)


def test_a_loop_inside_another_leaves_a_log_alone_unless_it_lasts(capsys, monkeypatch):
    def outer_and_inner():
        with progress("outer", 1, "tables") as outer:
            with progress("inner", 2, "texts") as inner:
                inner.advance()
                inner.advance()
            outer.advance()
        return [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]

    assert outer_and_inner() == ["outer", "outer"]
    monkeypatch.setattr("pipeline.progress._Lines.every_s", 0.0)
    assert outer_and_inner() == ["outer", "inner", "inner", "outer"]


def test_an_error_does_not_make_it_whole(capsys):
    with pytest.raises(ValueError), progress("work", 10, "things") as bar:
        bar.advance(3)
        raise ValueError
    assert "work: 30% 3/10" in capsys.readouterr().out.splitlines()[-1]


def test_a_log_file_gets_no_control_character():
    done = printed()
    assert not re.search(r"[\r\x1b]", done.stdout) and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("said")] == [f"said {i}" for i in range(6)]
    assert lines[-1] == "all is done" and "stage [1]: 100% 20/20 examples" in lines[-2]


def test_quiet_is_the_result_alone():
    done = printed("quiet")
    assert (done.stdout, done.stderr) == ("all is done\n", "")


def test_a_machine_reads_objects_on_stdout_and_the_rest_is_on_stderr():
    done = printed("json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert "said 5" in done.stderr and "all is done" in done.stderr
    assert [e["event"] for e in events[:-1]] == ["progress"] * (len(events) - 1)
    assert events[-1] == {"event": "result", "command": "", "exit_code": 0, "made": 20}
    first, last = (e for e in (events[2], events[-2]))
    assert (first["stage"], first["done"], first["total"], first["unit"]) == ("stage [1]", 8, 20, "examples")
    assert first["rate"] is None and first["eta_s"] is None
    assert (last["done"], last["eta_s"], last["note"]) == (20, 0, "loss 5") and 0 < last["rate"] < 1000


def test_a_child_speaks_as_its_parent_was_asked_to():
    assert printed(LOGITBANK_OUTPUT="quiet").stdout == "all is done\n"
    assert printed("json", LOGITBANK_OUTPUT="quiet").stdout.startswith("{")  # its own line goes first


def test_a_terminal_sees_a_bar_with_rate_and_eta():
    """A real one, of 100 columns. What is printed meanwhile is on lines of its own, and the cursor is there again."""
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI")} | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, ""], cwd=ROOT, env=env, stdout=theirs, stderr=theirs
    ) as shown:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
    os.close(ours)
    assert shown.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert "loading [red]it ..." in text, "markup in a name is text"
    assert re.search(r"stage \[1\] +[━╸╺ ]+ +100% 20/20 examples  [\d.,]+ examples/s  ETA 00:00  loss 5", text)
    assert re.search(r"inner +[━╸╺ ]+ +100% 2/2 texts", text) and "loading more ..." in text
    assert re.search(r"^said 3\s*$", text.replace("\r", "\n"), re.MULTILINE)
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h") > 0
