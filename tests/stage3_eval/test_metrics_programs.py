"""Programs: what is taken for one, how a test is taken apart, and that no program can pass without being right."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import promised
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RunError
from pipeline.sections import Metrics
from pipeline.tasks import Example, NoOptions, get_task
from stage3_eval.metrics import check_available, describe, metric_module
from stage3_eval.metrics.asserts import Assertion, defined_names, imports_of, split
from stage3_eval.metrics.programs import parses, program_of
from stage3_eval.predictions import Prediction
from stage3_eval.sandbox.inside import plain, value_of

DATA = os.environ.get("LOGITBANK_DATA")
SETTINGS = Metrics(code_timeout_s=20)
_BWRAP = ["bwrap", "--unshare-user", "--ro-bind", "/", "/", "true"]
sandboxed = pytest.mark.skipif(
    shutil.which("bwrap") is None or subprocess.run(_BWRAP, capture_output=True).returncode != 0,
    reason="bubblewrap is not installed, or does not work here",
)


def example(answer, *tests, setup=""):
    return Example("e", "toy", "?", answer, extra={"tests": list(tests), "setup": setup})


def measure(name, of, *programs, settings=SETTINGS):
    answers = [Prediction("e", "toy", "", program, 3, True) for program in programs]
    return metric_module(name).measure(name, [of] * len(answers), answers, settings)


# -- what is taken for a program


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("x = 1\n", "x = 1\n"),
        ("Here it is:\n```python\nx = 1\n```\nIt sets x.\n```\ny\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("``` py\nx = 1", "x = 1"),  # cut off before the fence closed
        ("s = '```'\n", "s = '```'\n"),  # no fence: it begins no line
        ("", ""),
    ],
)
def test_the_program_of_an_answer(answer, program):
    assert program_of(answer) == program


@pytest.mark.parametrize(
    ("program", "does"),
    [
        ("def f(x):\n    return x", True),
        ("x = '\\w'", True),  # an odd escape is a warning, not an error
        ("def f(x) return x", False),
        ("Sure! Here is a function.", False),
        ("", False),
        ("# only a comment", False),
        ("x = 1\0", False),
        ("-" * 100_000 + "1", False),
        ("(" * 1000, False),
        ("print 'two'", False),
        ("x = '\ud800'", False),
    ],
)
def test_what_parses(program, does):
    assert parses(program) is does
    assert measure("parses", example("f = 1"), program).values == (float(does),)


# -- taking tests apart


@pytest.mark.parametrize(
    ("line", "evaluated", "test"),
    [
        ("assert f([1, 2]) == [2, 1]", ["f([1, 2])"], "_0_0 == [2, 1]"),
        ("assert f(1) == 2, 'message'", ["f(1)"], "_0_0 == 2"),
        ("assert 2 == f(1)", ["f(1)"], "2 == _0_0"),
        ("assert set(f(1)) == set([2, 3])", ["set(f(1))"], "_0_0 == set([2, 3])"),
        ("assert list(sorted(f(1))) == [2]", ["list(sorted(f(1)))"], "_0_0 == [2]"),
        ("assert sorted(f(1), reverse=True) == [2]", ["f(1)"], "sorted(_0_0, reverse=True) == [2]"),
        ("assert math.isclose(f(1), 2.5, rel_tol=0.01)", ["f(1)"], "math.isclose(_0_0, 2.5, rel_tol=0.01)"),
        ("assert abs(f(1) - 3) < 1e-6", ["f(1)"], "abs(_0_0 - 3) < 1e-06"),
        ("assert not f(1)", ["f(1)"], "not _0_0"),
        ("assert f(1) is None", ["f(1)"], "_0_0 is None"),
        ("assert f(1) == g(2) == 3", ["f(1)", "g(2)"], "_0_0 == _0_1 == 3"),
        ("assert f(g(2)) == 3", ["f(g(2))"], "_0_0 == 3"),
        ("assert f(2).startswith('xy')", ["f(2)"], "_0_0.startswith('xy')"),
        ("assert f(2)['xy'] == 1", ["f(2)"], "_0_0['xy'] == 1"),
        ("assert bool(f(2).count('xy'))", ["f(2)"], "bool(_0_0.count('xy'))"),
        ("assert f(2)(3) == 5", ["f(2)(3)"], "_0_0 == 5"),  # a function that it returns is the program's
        ("assert root.left.value[0] == 1", ["root.left.value[0]"], "_0_0 == 1"),
        ("assert Stack.size(3) == 1", ["Stack.size(3)"], "_0_0 == 1"),
        ("assert sum(10, 15) == 6", ["sum(10, 15)"], "_0_0 == 6"),  # a program may define it
        ("assert f(root) == sys.getsizeof(1)", ["f(root)"], "_0_0 == sys.getsizeof(1)"),
    ],
)
def test_a_test_is_taken_apart(line, evaluated, test):
    found = split(line, {"f", "g", "Stack", "root", "sum"})
    assert found == Assertion({f"_0_{i}": text for i, text in enumerate(evaluated)}, test)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("assert 1 == 1", "uses nothing that the reference solution defines"),
        ("assert h(1) == 1", "uses nothing that the reference solution defines"),
        ("x = f(1)", "not one assert"),
        ("assert f(1) == 1; assert f(2) == 2", "not one assert"),
        ("assert all(f(i) == i for i in range(3))", "within a comprehension"),
        ("assert f(1) ==", "no Python"),
        ("assert f(1).push(2) == 2", "reads .push of what the program returns"),
    ],
)
def test_a_test_that_cannot_be_is_refused(line, reason):
    with pytest.raises(ValueError, match=reason):
        split(line, {"f"})
    with pytest.raises(RunError, match=r"e: the verdict on 'assert|e: the verdict on 'x = "):
        measure("passes", example("def f(x):\n    return x", line), "f = 1")


def test_what_a_reference_defines_and_imports():
    code = "import re, sys\nfrom math import pi as p\nN = M = 3\nroot.left = 1\nclass A: pass\ndef f():\n    y = 1\n"
    assert defined_names(code) == {"N", "M", "A", "f"}
    assert imports_of(code) == "import re, sys\nfrom math import pi as p"


# -- values on their way from one process to the other

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
_SCALARS |= st.complex_numbers(allow_nan=False) | st.fractions() | st.decimals(allow_nan=False)
_KEYS = st.recursive(_SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
_VALUES = st.recursive(
    _KEYS | st.sets(_KEYS, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=6,
)


def arrived(value):
    return value_of(json.loads(json.dumps(plain(value))))


@given(_VALUES, _VALUES)
def test_what_arrives_equals_what_was_sent_and_nothing_else(a, b):
    assert arrived(a) == a
    assert (arrived(a) == b) is (a == b)


def test_types_that_python_tells_apart_stay_apart():
    for a, b in (([1], (1,)), ((1,), [1]), ("1", 1), (b"a", "a"), (None, False), ({1}, [1]), ({1: 2}, {(1, 2)})):
        assert arrived(a) != b
    assert arrived(range(3)) != range(3)  # no plain data


# -- verdicts

REVERSE = example("def rev(x):\n    return x[::-1]", "assert rev([1, 2]) == [2, 1]", "assert rev('ab') == 'ba'")


@sandboxed
def test_right_and_wrong_programs():
    found = measure(
        "passes",
        REVERSE,
        REVERSE.answer,
        "Sure:\n```python\ndef rev(x):\n    return x if len(x) < 2 else rev(x[1:]) + x[:1]\n```",
        "def rev(x):\n    return x",
        "def rev(x):\n    return [2, 1]",  # right once
        "def reverse(x):\n    return x[::-1]",  # another name
        "def rev(x):\n    return list(reversed(x))",  # another type the second time
        "def rev(x) return",
        "def rev(x):\n    while True: pass",
        settings=Metrics(code_timeout_s=1),
    )
    assert found.values == (1, 1, 0, 0, 0, 0, 0, 0)
    assert (found.unparsable, found.note) == (1, "1 of 8 ran out of time")


@sandboxed
def test_what_was_not_asked_is_not_unparsable():
    found = metric_module("passes").measure("passes", [REVERSE], [Prediction.unanswered(REVERSE, "")], SETTINGS)
    assert (found.values, found.unparsable) == ((0.0,), 0)


@sandboxed
def test_values_keep_their_types():
    kinds = {
        "1 + 1j": True, "b'ab'": True, "{1: (2, [3])}": True, "{frozenset({1})}": True, "None": True, "1.5": True,
        "float('inf')": True, "10 ** 5000": True, "'\\ud800\\n'": True, "__import__('decimal').Decimal('0.1')": True,
        "__import__('fractions').Fraction(1, 3)": True, "__import__('collections').Counter('aab')": True,
        "object()": False, "range(3)": True, "float('nan')": False,
    }  # fmt: skip
    for kind, equal in kinds.items():
        expected = "[0, 1, 2]" if kind == "range(3)" else kind
        test = f"assert {'list(f())' if kind == 'range(3)' else 'f()'} == {expected}"
        found = measure("passes", example("def f(): pass", test), f"def f():\n    return {kind}")
        assert found.values == (float(equal),), kind


@sandboxed
def test_setup_runs_after_the_program_and_uses_it():
    code = "class Node:\n    def __init__(self, v):\n        self.v = v\ndef value(n):\n    return n.v"
    of = example(code, "assert value(root) == 7", setup="root = Node(7)\n")
    assert measure("passes", of, code, "def value(n):\n    return 7").values == (1, 0)


@sandboxed
def test_a_program_is_a_module_as_anywhere():
    """`dataclass` looks for its class's module by name where annotations are texts."""
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass, astuple\n@dataclass\nclass P:\n"
        "    x: int\ndef f(x):\n    return astuple(P(x))"
    )
    assert measure("passes", example(code, "assert f(1) == (1,)"), code).values == (1,)


def test_a_problem_without_tests_is_said():
    with pytest.raises(RunError, match="e: it has no tests, so no program of it can pass or fail"):
        measure("passes", example("def f(x):\n    return x"), "def f(x):\n    return x")


@sandboxed
def test_the_expectation_may_need_what_the_reference_imports():
    of = example(
        "import math\ndef f(x):\n    return math.pi * x", "assert math.isclose(f(2), 2 * math.pi, rel_tol=0.01)"
    )
    found = measure("passes", of, "def f(x):\n    return 6.28", "def f(x):\n    return 6")
    assert found.values == (1, 0)


FORGERIES = {
    "exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "SystemExit in the call": "def rev(x):\n    raise SystemExit(0)",
    "print": "print('true\\ntrue')\ndef rev(x):\n    print('true')",
    "write the answers": "import os\nos.write(3, b'true\\ntrue\\n')\nos._exit(0)",
    "write them and more": "import os\nos.write(3, b'\"ready\"\\ntrue\\ntrue\\ntrue\\n')\ndef rev(x):\n    return x",
    "answers of another form": "import os\nos.write(3, b'{\"other\": 1}\\n[[[\\n')\nos._exit(0)",
    "equal to anything": "class A:\n    __eq__ = lambda s, o: True\n    __hash__ = None\ndef rev(x):\n    return A()",
    "a list equal to anything": "class A(list):\n    __eq__ = lambda s, o: True\ndef rev(x):\n    return A()",
    "a text equal to anything": "class A(str):\n    __eq__ = lambda s, o: True\ndef rev(x):\n    return A('z')",
    "no AssertionError": "import builtins\nbuiltins.AssertionError = type('E', (Warning,), {})\ndef rev(x): return x",
    "bool is true": "import builtins\nbuiltins.bool = lambda x: True\ndef rev(x):\n    return x",
    "json says true": "import json\njson.dumps = lambda *a, **k: 'true'\ndef rev(x):\n    return x",
    "plain says true": "import __main__\n__main__.plain = lambda value: True\ndef rev(x):\n    return x",
    "eval says true": "import builtins\nbuiltins.eval = lambda *a: True\ndef rev(x):\n    return x",
    "read the frames": (
        "import sys\ndef rev(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for v in frame.f_locals.values():\n            if isinstance(v, dict) and 'expressions' in v:\n"
        "                return eval(v['expressions'][0].partition('==')[2] or 'None')\n        frame = frame.f_back\n"
    ),
    "its own methods": (
        "class A:\n    __getattr__ = lambda s, name: lambda *a: True\n    __getitem__ = lambda s, key: True\n"
        "def rev(x):\n    return A()"
    ),
    "search memory": (
        "import gc\ndef rev(x):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'tests' in o:\n"
        "            return o['tests']\n    for o in gc.get_objects():\n        if o == [2, 1]:\n            return o\n"
    ),
    "at exit": "import atexit, os\natexit.register(lambda: os.write(3, b'true\\ntrue\\n'))\ndef rev(x):\n    return x",
    "trace": "import sys\nsys.settrace(lambda *a: None)\ndef rev(x):\n    return True",
    "a finaliser": "import os\nclass A:\n    def __del__(s): os.write(3, b'true\\n')\ndef rev(x):\n    A()",
    "swallow the test": "import ast\nast.parse = None\n__builtins__.clear()\ndef rev(x):\n    return x",
    "assert is nothing": "import sys\nsys.flags = None\n__debug__ = None\ndef rev(x):\n    return x",
    "list is not list": "import builtins\nbuiltins.list = lambda *a: [2, 1]\ndef rev(x):\n    return x",
    "isinstance is true": "import builtins\nbuiltins.isinstance = lambda *a: True\ndef rev(x):\n    return object()",
    "another stdout": "import sys\nsys.stdout = open('/dev/fd/3', 'w')\ndef rev(x):\n    print('true'); return x",
    "all descriptors": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'true\\ntrue\\n')\n    except OSError: pass"
    ),
    "a flood": "import os\nwhile True: os.write(3, b'true\\n' * 9999)",
    "memory": "def rev(x):\n    return [x] * 10**10",
    "a bomb for the reader": "import os\nos.write(3, b'[' * 900000 + b'\\n' + b'9' * 100000 + b'\\n')\nos._exit(0)",
}


# The same question put to the value's own methods: a verdict that an object of the program's must not give.
ASKED = example(REVERSE.answer, "assert rev('ab').startswith('ba')", "assert rev([1, 2])[0:1]")


@sandboxed
@pytest.mark.promise(promised.SANDBOX)
@pytest.mark.parametrize("name", FORGERIES)
def test_a_pass_cannot_be_forged(name, tried):
    assert measure("passes", REVERSE, FORGERIES[name]).values == (0,)
    assert measure("passes", ASKED, FORGERIES[name], REVERSE.answer).values == (0, 1)
    tried(1, "programs that forge a pass")


@sandboxed
def test_the_program_never_meets_what_is_expected(tmp_path):
    """It answers with all it can find of the request in its own process: the expected value is not among it."""
    of = example("def f(x):\n    return 0", "assert f(1) == 'the expected value'")
    spy = (
        "import gc, sys\ndef f(x):\n    frame, found = sys._getframe(), []\n    while frame:\n"
        "        found.append(repr(frame.f_locals)); frame = frame.f_back\n"
        "    return repr(found) + repr([o for o in gc.get_objects() if type(o) in (dict, list, tuple)])[:500000]"
    )
    from stage3_eval import sandbox
    from stage3_eval.metrics.programs import _Problem

    problem = _Problem.of(of)
    ran = sandbox.run([spy], [text for _, text in problem.expressions], sandbox.Limits(20, 512))
    assert "f(1)" in ran.answers[0]  # what was asked is there to be found
    assert "the expected" not in ran.answers[0]
    assert measure("passes", of, "def f(x):\n    return 'the expected value'", spy).values == (1, 0)


@sandboxed
def test_an_answer_is_run_once(monkeypatch):
    from stage3_eval import sandbox

    programs = [f"def rev(x):\n    return x[::-1]  # {os.urandom(4).hex()}", "def rev(x):\n    return x  # once"]
    first = measure("passes", REVERSE, *programs)
    monkeypatch.setattr(sandbox, "run", None)
    assert measure("passes", REVERSE, *programs) == first


@sandboxed
def test_the_results_say_what_ran_the_programs():
    check_available(["passes", "parses"], SETTINGS)
    found = describe(SETTINGS, ["passes", "parses"])
    assert found["passes"]["sandbox"].startswith("bubblewrap ")
    assert (found["passes"]["timeout_s"], found["passes"]["memory_mb"]) == (20, 512)
    assert found["parses"]["python"].startswith("3.")


def test_tests_are_refused_without_a_sandbox(monkeypatch, tmp_path):
    from stage3_eval import sandbox

    sandbox.check.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="bubblewrap is not installed"):
        check_available(["passes"], SETTINGS)
    with pytest.raises(RunError, match="bubblewrap is not installed"):
        measure("passes", REVERSE, "def rev(x):\n    return x[::-1]  # not run")


# -- real problems


def _real(split_name):
    """The examples of a split, as the task makes them."""
    lines = (Path(DATA) / "mbpp" / f"{split_name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [get_task("mbpp").to_example(json.loads(line), i, NoOptions()) for i, line in enumerate(lines)]


@sandboxed
@pytest.mark.skipif(DATA is None, reason="LOGITBANK_DATA names no folder of real rows")
@pytest.mark.parametrize(
    ("split_name", "step"),
    [
        ("test", 50),
        ("validation", 30),
        *[pytest.param(s, 1, marks=pytest.mark.slow) for s in ("prompt", "test", "train", "validation")],
    ],
)
def test_real_solutions_pass_and_their_neighbours_do_not(split_name, step):
    """Every real test can be taken apart; a reference passes its own tests, and not those of the next problem."""
    problems = _real(split_name)
    module = metric_module("passes")
    assert all(module._Problem.of(problem).tests for problem in problems)
    chosen = problems[::step]
    for shift, expected in ((0, 1.0), (1, 0.0)):
        answers = [Prediction("e", "toy", "", problem.answer, 3, True) for problem in chosen[shift:] + chosen[:shift]]
        assert set(module.measure("passes", chosen, answers, SETTINGS).values) == {expected}
