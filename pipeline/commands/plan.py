"""`python -m pipeline plan`: what an experiment will cost, measured on a few examples before anything is spent.

Stages 1 and 2 run a sample of their work (as processes, like `run`); `pipeline.planning` says what it means for the
whole. Nothing is written to the cache or the run folder. With --dry no model is run: tokens are counted.
"""

import argparse
import json
import math
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli import add_recipe_arguments, positive, recipe_arguments, recipe_of
from pipeline.errors import RunError
from pipeline.stages import run_stage, stage_command

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

HELP = "what an experiment will cost, measured on a few examples"
EXAMPLES = (
    "python -m pipeline plan",
    "python -m pipeline plan --recipe gsm8k-qwen3 --dry",
    "python -m pipeline plan --recipe flan-uld --examples 200 --price-gpu-hour 2.5 --price-gb-month 0.02 --months 3",
)
TIMED_STEPS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--recipe`, `--set`, the size of the sample and the prices."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--examples", type=positive, metavar="N", help="examples to run, drawn from every task (50; --dry: 1000)"
    )
    parser.add_argument("--dry", action="store_true", help="run no model: tokens are counted, bytes are an estimate")
    for name, default, what in (
        ("price-gpu-hour", 2.5, "of an hour of this device"),
        ("price-gb-month", 0.02, "of keeping 10^9 bytes for a month"),
        ("months", 1.0, "how long the cache is kept"),
    ):
        parser.add_argument(f"--{name}", type=_amount, default=default, metavar="X", help=f"{what} ({default:g})")


def _amount(text: str) -> float:
    """A number that is not negative."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected 0 or more, found {text}")
    return number


def run(args: argparse.Namespace) -> int:
    """Have the stages measured, then say what it means; the exit code of a stage that could not be."""
    from pipeline.output import result
    from pipeline.plan_text import told
    from pipeline.planning import Prices, plan_of

    recipe = recipe_of(args)
    with tempfile.TemporaryDirectory(prefix="logitbank-plan-") as folder:
        found = Path(folder)
        examples = args.examples or (1000 if args.dry else 50)
        probe = ["--probe", str(examples), "--probe-out", folder, *(["--probe-dry"] if args.dry else [])]
        code = _measured("stage1_teacher", recipe, [*recipe_arguments(args), *probe])
        if code:
            return code
        teacher = _read(found / "teacher.json")
        students = {}
        for student in recipe.students if not args.dry else ():
            steps = ["--probe", str(TIMED_STEPS), "--probe-out", folder, "--student", student]
            code = _measured("stage2_student", recipe, [*recipe_arguments(args), *steps])
            if code:
                return code
            students[student] = _read(found / f"{student}.json")
    plan = plan_of(recipe, teacher, students, Prices(args.price_gpu_hour, args.price_gb_month, args.months))
    result(told(recipe, plan), plan=_finite(asdict(plan)))
    return 0


def _finite(value: Any) -> Any:
    """JSON has no infinity: an error of which nothing is known is null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measured(stage: str, recipe: "Recipe", arguments: list[str]) -> int:
    """Start a stage's probe and wait for it; its exit code."""
    command = stage_command(stage, recipe, arguments)
    code = run_stage(command)
    if code:
        said = f"no plan: {stage} could not be measured (exit code {code})"
        if "--probe-dry" not in arguments:
            given = arguments[: arguments.index("--probe")]
            said += f"; without any model: {shlex.join(['python', '-m', 'pipeline', 'plan', '--dry', *given])}"
        print(said, file=sys.stderr)
    return code


def _read(path: Path) -> Any:
    """What a probe has found."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: the stage has left nothing that can be read: {error}") from None
