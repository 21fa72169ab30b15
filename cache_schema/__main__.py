"""`python -m cache_schema verify|repair|show`: look into a cache, given its place or a recipe.

    python -m cache_schema verify caches/NAME
    python -m cache_schema repair s3://bucket/NAME
    python -m cache_schema show --recipe pocket --example 3 --top 5

Exit codes: 0 good; 1 something committed is damaged; 2 a mistake in the call, or no cache there; 3 it is incomplete.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    try:
        location = options.cache if options.cache is not None else _folder_of_recipe(options.recipe, options.set)
        if options.command == "show":
            return _show(location, options.example, options.top)
        return _verify(location) if options.command == "verify" else _repair(location)
    except CacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


COMMANDS = {  # name -> what it does, and the command lines that end its --help
    "verify": (
        "check every byte and every invariant; name what is bad",
        ("python -m cache_schema verify caches/NAME", "python -m cache_schema verify --recipe gsm8k-qwen3"),
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
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode != 0:
        raise SystemExit(answer.returncode)
    return answer.stdout.strip()


def _verify(location: str) -> int:
    from cache_schema.verify import verify  # numpy and pyarrow only now: --help answers at once

    report = verify(location, _progress)
    totals = report.totals
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
        print(f"BAD        {problem}")
    if not report.good:
        bad = sorted({p.shard for p in report.problems if p.shard is not None})
        count = f"{len(report.problems)} problem" + "s" * (len(report.problems) > 1)
        print(f"not good: {count}" + (f", in shards {', '.join(map(str, bad))}" if bad else ""))
        return DAMAGED
    if not report.complete:
        print("what is there is good")
        raise _incomplete(report)
    print("good")
    return 0


def _repair(location: str) -> int:
    from cache_schema.repair import repair

    report = repair(location, _progress)
    manifest = report.found.manifest
    for problem in report.found.problems:
        print(f"BAD        {problem}")
    for name in report.rewritten:
        print(f"rewritten  {name}, from the seal")
    for name in report.set_aside:
        print(f"set aside  {name}")
    for problem in report.left:
        print(f"left       {problem}")
    if report.left:
        print("not good: what is left cannot be repaired; copy the cache again, or make it again in another folder")
        return DAMAGED
    if report.set_aside:
        many = "shards" if len(report.shards) > 1 else "shard"
        again = f"{many} {', '.join(map(str, report.shards))}" if report.shards else "what is missing"
        print(f"next: {manifest.stage1_command}   makes {again} again, and nothing else")
        return 0
    if not report.found.complete:
        print("what is there is good")
        raise _incomplete(report.found)
    print("good again" if report.rewritten else "good")
    return 0


def _incomplete(found: VerifyReport) -> IncompleteCache:
    manifest = found.manifest
    return IncompleteCache(found.store.location, manifest.shards, found.missing, manifest.stage1_command)


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\rshard {done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)


def _show(location: str, example: str, top: int) -> int:
    from cache_schema.reader import CacheReader
    from cache_schema.show import describe_example, find_example

    reader = CacheReader.open(location, require_sealed=False)
    print(describe_example(reader, find_example(reader, example), top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
