"""Programs: the share that parses, and the share that passes the tests of its problem. Programs run in a sandbox only.

The program is the first fenced block of an answer, or the whole answer where there is none. It `parses` where
`ast.parse` of this Python takes it, and `passes` where every test is true of it. The verdict is not reached where the
program runs: each test is taken apart (`asserts`), the program's sandbox gets its half and answers with plain values,
and a second sandbox, which never saw the program, says whether they are right. So there is no verdict to forge.

Needs `extra["tests"]`, single `assert` lines, and `extra["setup"]`, code to run after the program, of an example; its
answer is the reference solution, of which the names defined and the modules imported are read.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from pipeline.errors import RunError
from pipeline.sections import Metrics
from pipeline.tasks import Example
from stage3_eval import sandbox
from stage3_eval.compare import Measured
from stage3_eval.metrics.asserts import defined_names, imports_of, parse, split
from stage3_eval.predictions import Prediction

LIBRARIES: dict[str, str] = {}
Outcome = Literal["passed", "failed", "timed out"]
_FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def check(settings: Metrics) -> None:
    """Raise RunError where there is no working sandbox."""
    sandbox.check()


def measure(name: str, examples: Sequence[Example], answers: Sequence[Prediction], settings: Metrics) -> Measured:
    """1 where the program of an answer parses, or passes. A program that does not parse is unparsable to the tests."""
    programs = [program_of(answer.prediction) for answer in answers]
    parsed = [parses(program) for program in programs]
    if name == "parses":
        return Measured(tuple(map(float, parsed)))
    sandbox.check()
    problems = [_Problem.of(example) for example in examples]
    limits = _limits(settings)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # each thread waits for a process of its own
        runs = [
            pool.submit(_outcome, program, problem, limits) if fine else None
            for program, problem, fine in zip(programs, problems, parsed, strict=True)
        ]
        outcomes = [run.result() if run else "failed" for run in runs]
    timed_out = outcomes.count("timed out")
    return Measured(
        tuple(float(outcome == "passed") for outcome in outcomes),
        unparsable=sum(not fine and not answer.too_long for fine, answer in zip(parsed, answers, strict=True)),
        note=f"{timed_out} of {len(outcomes)} ran out of time" if timed_out else "",
    )


def describe(name: str, settings: Metrics) -> dict[str, Any]:
    """Which Python, and the sandbox with its limits."""
    said = sandbox.describe(_limits(settings))
    return {"python": said["python"], "score": "ast.parse"} if name == "parses" else {**said, "score": "all tests true"}


def program_of(answer: str) -> str:
    """The program in an answer: its first fenced block, even if the fence is never closed, else all of it."""
    fenced = _FENCED.search(answer)
    return fenced.group(1) if fenced else answer


def parses(program: str) -> bool:
    """Whether this Python's grammar takes it. An empty program is none."""
    try:
        return bool(parse(program).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # null bytes; nested too deeply
        return False


@dataclass(frozen=True)
class _Problem:
    """The tests of an example: what its program evaluates (by name), and what must be true of the values."""

    setup: str
    imports: str
    expressions: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]

    @classmethod
    def of(cls, example: Example) -> "_Problem":
        """Raises RunError where there is no test, or one that cannot be taken apart."""
        setup, lines = example.extra["setup"], example.extra["tests"]
        if not lines:
            raise RunError(
                f"{example.id}: it has no tests, so no program of it can pass or fail; take its row out of the task"
            )
        line = example.answer
        try:
            names = defined_names(example.answer) | defined_names(line := setup)
            assertions = [split(line := test, names, number) for number, test in enumerate(lines)]
        except (SyntaxError, ValueError) as error:
            raise RunError(
                f"{example.id}: the verdict on {line!r} cannot be reached outside the sandbox: {error}. Expected a "
                "test like: assert f(1, 2) == 3, of a function that the reference solution defines"
            ) from None
        return cls(
            setup,
            imports_of(example.answer),
            tuple(pair for assertion in assertions for pair in assertion.expressions.items()),
            tuple(assertion.test for assertion in assertions),
        )


@lru_cache(maxsize=100_000)  # checkpoints are scored on subsets too: a program is run once
def _outcome(program: str, problem: _Problem, limits: sandbox.Limits) -> Outcome:
    """Evaluate the program's half of the tests, then ours on its values, each in a sandbox of its own."""
    names, expressions = zip(*problem.expressions, strict=True)
    ran = sandbox.run([program, problem.setup], expressions, limits)
    if len(ran.answers) != len(names):
        return "timed out" if ran.timed_out else "failed"
    values = dict(zip(names, ran.answers, strict=True))
    judged = sandbox.run([problem.imports], [f"bool({test})" for test in problem.tests], limits, values)
    return "passed" if judged.answers == ("true",) * len(problem.tests) else "failed"


def _limits(settings: Metrics) -> sandbox.Limits:
    return sandbox.Limits(settings.code_timeout_s, settings.code_memory_mb)
