"""`python -m cache_schema verify|doctor|repair|show`: look into a cache, given its place or a recipe.

    python -m cache_schema verify caches/NAME
    python -m cache_schema doctor caches/NAME
    python -m cache_schema repair s3://bucket/NAME
    python -m cache_schema show --recipe pocket --example 3 --top 5

Exit codes: 0 good; 1 something committed is damaged; 2 a mistake in the call, or no cache there; 3 it is incomplete;
130 and 143 stopped by SIGINT and SIGTERM. `--quiet` and `--json`: see `console`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cache_schema.console import JSON, PLAIN, QUIET, Console
from cache_schema.errors import CacheError, IncompleteCache

if TYPE_CHECKING:
    from cache_schema.verify import VerifyReport

DAMAGED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print; the exit code."""
    line = parser()
    options = line.parse_args(arguments)
    if options.cache is not None and options.set:
        line.error("--set changes a recipe; with a folder it has no meaning")
    console = Console(options.output or PLAIN, options.command)
    try:
        with console:
            location = options.cache if options.cache is not None else _folder_of_recipe(options.recipe, options.set)
            code = _run(options, location, console)
        return console.finish(code)
    except CacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return console.finish(error.exit_code, str(error))
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:  # at once: nothing here leaves anything half done
        said = "stopped; the same command begins again"
        print(f"\n{said}", file=sys.stderr)
        return console.finish(128 + (stop.args[0] if stop.args else signal.SIGINT), said)


def _run(options: argparse.Namespace, location: str, console: Console) -> int:
    if options.command == "show":
        return _show(location, options.example, options.top, console)
    if options.command == "doctor":
        return _doctor(location, options.repair, console)
    return _verify(location, console) if options.command == "verify" else _repair(location, console)


COMMANDS = {  # name -> what it does, and the command lines that end its --help
    "verify": (
        "check every byte and every invariant; name what is bad",
        ("python -m cache_schema verify caches/NAME", "python -m cache_schema verify --recipe gsm8k-qwen3"),
    ),
    "doctor": (
        "verify, say what is lost and what is not, and repair it if told to",
        ("python -m cache_schema doctor caches/NAME", "python -m cache_schema doctor --recipe pocket --repair"),
    ),
    "repair": (
        "verify, then set aside what is bad and nothing else, for stage 1 to make again",
        ("python -m cache_schema repair caches/NAME", "python -m cache_schema repair s3://bucket/NAME"),
    ),
    "show": (
        "print one example: each answer token with the teacher's candidates",
        (
            "python -m cache_schema show --recipe pocket --example 3 --top 5",
            "python -m cache_schema show caches/NAME --example 12",
        ),
    ),
}


def parser() -> argparse.ArgumentParser:
    """The command line with every sub-command."""
    parser = argparse.ArgumentParser(prog="python -m cache_schema", description="Look into a cache of teacher logits.")
    commands = parser.add_subparsers(dest="command", required=True)
    made = {}
    for name, (about, examples) in COMMANDS.items():
        made[name] = command = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        which = command.add_mutually_exclusive_group(required=True)
        which.add_argument(
            "cache", nargs="?", metavar="DIR", help="the cache: a folder, or a URL such as s3://bucket/name"
        )
        which.add_argument("--recipe", metavar="NAME-or-FILE", help="the recipe whose cache is meant")
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe; any number of times"
        )
        speaks = command.add_mutually_exclusive_group()
        for mode, what in (
            (QUIET, "errors and the result alone"),
            (JSON, "a JSON object a line, the result last"),
        ):
            speaks.add_argument(f"--{mode}", dest="output", action="store_const", const=mode, help=f"print {what}")
    made["doctor"].add_argument(
        "--repair", action="store_true", help="do what a repair would do; on a terminal it is asked otherwise"
    )
    show = made["show"]
    show.add_argument("--example", default="0", metavar="N-or-ID", help="which example (default: the first)")
    show.add_argument("--top", type=_count, default=5, metavar="N", help="candidates a token (default: 5)")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 1")
    return int(text)


def _folder_of_recipe(recipe: str, overrides: Sequence[str]) -> str:
    """Ask `pipeline`, as a process: this package imports nothing of the rest. Its error messages pass through."""
    command = [sys.executable, "-m", "pipeline", "show", "--recipe", recipe, "--field", "cache.dir"]
    for override in overrides:
        command += ["--set", override]
    plain = {key: value for key, value in os.environ.items() if key != "LOGITBANK_OUTPUT"}
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=plain)
    if answer.returncode != 0:
        raise SystemExit(answer.returncode)
    return answer.stdout.strip()


def _verify(location: str, console: Console) -> int:
    from cache_schema.verify import verify  # numpy and pyarrow only now: --help answers at once

    report = verify(location, console.progress)
    totals = report.totals
    console.facts(**_facts(report))
    print(f"cache      {report.store.location}")
    print(f"identity   {report.manifest.fingerprint}")
    print(
        f"shards     {len(report.records)} of {report.manifest.shards}, {'sealed' if report.sealed else 'not sealed'}"
    )
    print(f"examples   {totals.examples}")
    print(f"positions  {totals.positions}")
    print(f"bytes      {totals.bytes} ({totals.bytes_per_position:.1f} a position)")
    print(f"codec      off by {totals.codec_error_max:.6f} logits at most (step {report.manifest.step:g})")
    for name in report.orphans:
        print(f"note       shards/{name} belongs to no commit record; it is swept when the cache is sealed")
    for problem in report.problems:
        console.result(f"BAD        {problem}")
    if not report.good:
        bad = sorted({p.shard for p in report.problems if p.shard is not None})
        count = f"{len(report.problems)} problem" + "s" * (len(report.problems) > 1)
        where = f", in shard{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}" if bad else ""
        console.result(f"not good: {count}{where}")
        return DAMAGED
    if not report.complete:
        console.result("what is there is good")
        raise _incomplete(report)
    console.result("good")
    return 0


def _repair(location: str, console: Console) -> int:
    from cache_schema.repair import repair

    report = repair(location, console.progress)
    console.facts(**_facts(report.found), rewritten=report.rewritten, set_aside=report.set_aside)
    console.facts(left=[str(problem) for problem in report.left])
    for problem in report.found.problems:
        console.result(f"BAD        {problem}")
    for name in report.rewritten:
        console.result(f"rewritten  {name}, from the seal")
    for name in report.set_aside:
        console.result(f"set aside  {name}")
    for problem in report.left:
        console.result(f"left       {problem}")
    if report.left:
        console.result(
            "not good: what is left cannot be repaired; copy the cache again, or make it again in another folder"
        )
        return DAMAGED
    if report.for_stage1:
        many = "shards" if len(report.shards) > 1 else "shard"
        again = f"{many} {', '.join(map(str, report.shards))}" if report.shards else "what is missing"
        console.result(f"next: {report.found.next_command}   makes {again} again, and nothing else")
        return 0
    if not report.found.complete:
        console.result("what is there is good")
        raise _incomplete(report.found)
    console.result("good again" if report.rewritten else "good")
    return 0


def _doctor(location: str, do_repair: bool, console: Console) -> int:
    from cache_schema.doctor import describe, diagnose
    from cache_schema.repair import carry_out

    diagnosis = diagnose(location, console.progress)
    console.facts(**_facts(diagnosis.found), repairable=diagnosis.repairable)
    print(f"{describe(diagnosis)}\n")
    plan, found = diagnosis.plan, diagnosis.found
    asks = console.mode == PLAIN and sys.stdin.isatty() and sys.stdout.isatty()
    if diagnosis.repairable and not do_repair and asks:
        if diagnosis.leftovers.at_work:
            print("somebody may be writing into this cache: a repair is for when all writers have stopped")
        elif _yes("repair it now? [y/N] "):
            return _repair(location, console)  # from the start: it may have changed while the question stood
    if not found.problems:
        console.result("nothing is damaged")
        return 0 if found.complete else IncompleteCache.exit_code
    if not (diagnosis.repairable and do_repair):
        if diagnosis.repairable:
            told = shlex.join(["python", "-m", "cache_schema", "doctor", location, "--repair"])
            console.result(f"to repair it: {told}")
        else:
            console.result("a repair has nothing to do about this")
        return DAMAGED
    carry_out(plan)
    console.result(f"repaired; next: {found.next_command}" if plan.for_stage1 else "repaired")
    if plan.left:
        return DAMAGED
    return 0 if found.complete and not plan.for_stage1 else IncompleteCache.exit_code


def _yes(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _incomplete(found: VerifyReport) -> IncompleteCache:
    manifest = found.manifest
    return IncompleteCache(found.store.location, manifest.shards, found.missing, found.next_command)


def _facts(report: VerifyReport) -> dict[str, Any]:
    """What a machine is told of a cache."""
    return {
        "cache": report.store.location,
        "fingerprint": report.manifest.fingerprint,
        "shards": report.manifest.shards,
        "missing": report.missing,
        "sealed": report.sealed,
        "good": report.good,
        "complete": report.complete,
        "problems": [str(problem) for problem in report.problems],
        "orphans": report.orphans,
        **asdict(report.totals),
    }


def _show(location: str, example: str, top: int, console: Console) -> int:
    from cache_schema.reader import CacheReader
    from cache_schema.show import describe_example, find_example

    reader = CacheReader.open(location, require_sealed=False)
    text = describe_example(reader, find_example(reader, example), top)
    console.facts(example=text)
    console.result(text)
    return 0


def _terminated(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
