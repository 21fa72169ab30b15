"""`doctor`: what it says is lost is what is lost, what it says a repair does is what is done, and it asks first."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache_schema.__main__ import main
from cache_schema.reader import CacheReader

STAGE_1 = "python -m stage1_teacher --recipe toy"  # and where, if that is another place than the recipe's
FILES = ("manifest", "vocabulary", "sealed", "00000.json", "00001.json", "00002.json", "00000-", "00001-", "00002-")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def one(folder: Path, start: str) -> Path:
    return next(p for p in sorted(folder.rglob("*")) if p.is_file() and p.name.startswith(start))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def told_lost(out: str) -> set[int]:
    """The examples of the line that says which are lost."""
    line = next((line for line in out.splitlines() if line.startswith("  lost: examples")), "")
    ranges = re.findall(r"(\d+)(?: to (\d+))?(?=[, ])", line.partition(" of the input")[0] + " ")
    return {i for first, last in ranges for i in range(int(first), int(last or first) + 1)}


def readable(folder: Path) -> set[int]:
    reader = CacheReader.open(folder, require_sealed=False)
    return {int(row.example_id.removeprefix("toy-")) for row in reader.rows()}


@pytest.mark.parametrize("how", ["flipped", "gone"])
@pytest.mark.parametrize("start", FILES)
def test_what_is_said_to_be_lost_is_what_a_repair_leaves_out(toy, cache, capsys, start, how):
    """Every file of a cache is damaged, one at a time; nothing changes before it is told to."""
    whole = content(cache)
    path = one(cache, start)
    flip(path) if how == "flipped" else path.unlink()
    before = content(cache)
    code, out = main(["doctor", str(cache)]), capsys.readouterr().out
    assert content(cache) == before
    if start == "manifest":
        assert code == 2
        return
    if start == "sealed" and how == "gone":  # as a writer leaves it that died before its last step
        assert code == 3 and "the seal alone" in out
        return
    if start == "vocabulary" and how == "gone":  # nothing to move: it is for stage 1
        assert code == 1 and "nothing is to be moved" in out and told_lost(out) == set()
        assert main(["repair", str(cache)]) == 0 and STAGE_1 in capsys.readouterr().out
        toy.build(cache)
        assert main(["doctor", str(cache)]) == 0 and content(cache) == whole
        return
    assert code == 1 and f"doctor {cache} --repair" in out
    code, again = main(["doctor", str(cache), "--repair"]), capsys.readouterr().out
    lost = told_lost(out)
    assert lost == told_lost(again)
    assert lost == (set(toy.manifest.examples_of(int(start[4]))) if start.endswith("-") else set())
    assert readable(cache) == set(range(toy.examples)) - lost
    if start.endswith(".json"):  # the record alone: the seal has it
        assert code == 0 and content(cache) == whole and "repaired" in again
    else:
        assert code == 3 and f"next: {STAGE_1}" in again
    toy.build(cache)  # stage 1's part
    assert main(["doctor", str(cache)]) == 0
    found = content(cache)
    assert {name: found[name] for name in whole} == whole


def test_a_damaged_manifest_is_explained(cache, capsys):
    flip(cache / "manifest.json")
    assert main(["doctor", str(cache)]) == 2
    told = capsys.readouterr().err
    assert "meaning:" in told and "not lost: the shards" in told and "Traceback" not in told


def test_it_repairs_just_as_repair_does(cache, tmp_path):
    for start in ("00001-", "00000.json", "vocabulary"):
        flip(one(cache, start))
    shutil.copytree(cache, tmp_path / "copy")
    assert main(["doctor", str(cache), "--repair"]) == 3
    assert main(["repair", str(tmp_path / "copy")]) == 0
    assert content(cache) == content(tmp_path / "copy")


def test_what_is_missing_and_what_lies_about(toy, tmp_path, capsys):
    writer = toy.writer(tmp_path / "c")
    toy.commit(writer, 1)
    assert writer.claim(2)
    shards = tmp_path / "c" / "shards"
    (shards / "00001-0123456789abcdef.parquet").write_bytes(b"12345")
    (shards / ".tmp-1-ab-00000").write_bytes(b"123")
    (tmp_path / "c" / "aside").mkdir()
    (tmp_path / "c" / "aside" / "00000.json.1").write_bytes(b"1234")
    before = content(tmp_path / "c")
    assert main(["doctor", str(tmp_path / "c"), "--repair"]) == 3, "incomplete, and nothing to repair"
    assert content(tmp_path / "c") == before
    out = capsys.readouterr().out
    for words in (
        "2 of 3 shards, examples 0 to 2, 6 of the input",
        f"to go on where it stopped: {STAGE_1}",
        "shards/00001-0123456789abcdef.parquet (5 bytes)",
        "shards/.tmp-1-ab-00000 (3 bytes)",
        "claims/00002, renewed 0 min ago: somebody may be at work",
        "aside/00000.json.1 (4 bytes)",
        f"rm -r {tmp_path / 'c' / 'aside'}",
        "nothing is damaged",
    ):
        assert words in out
    (tmp_path / "c" / "claims" / "\x1b[2J").touch()
    hours_ago = time.time() - 4 * 3600
    os.utime(tmp_path / "c" / "claims" / "00002", (hours_ago, hours_ago))
    main(["doctor", str(tmp_path / "c")])
    out = capsys.readouterr().out
    assert "claims/00002, renewed 240 min ago: of a writer that is long silent" in out
    assert "\x1b" not in out and r"claims/\x1b[2J, renewed" in out


def test_a_good_cache_has_nothing_to_say(cache, capsys):
    assert main(["doctor", str(cache), "--repair"]) == 0
    out = capsys.readouterr().out
    assert "sealed, so complete" in out and out.endswith("nothing is damaged\n")
    assert "what is wrong" not in out and "lies about" not in out


@pytest.mark.parametrize(("answer", "at_work"), [("y\n", False), ("n\n", False), ("\n", False), (None, True)])
def test_on_a_terminal_it_asks(toy, cache, answer, at_work):
    """In a process of its own on a pseudo-terminal. While somebody may be writing it does not even ask."""
    flip(one(cache, "00001-"))
    if at_work:
        (cache / "claims").mkdir()
        (cache / "claims" / "00001").write_text("{}")
    before = content(cache)
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "cache_schema", "doctor", str(cache)]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown, asked = b"", False
    try:
        while process.poll() is None or select.select([master], [], [], 0.2)[0]:
            if select.select([master], [], [], 0.2)[0]:
                try:
                    shown += os.read(master, 4096)
                except OSError:  # the other side is closed
                    break
            if not asked and answer is not None and b"[y/N]" in shown:
                asked = os.write(master, answer.encode()) > 0
        code = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    repaired = answer == "y\n"
    assert (content(cache) != before) is repaired, shown.decode()
    assert code == (0 if repaired else 1)
    assert (b"set aside  shards/00001.json" in shown) is repaired
    assert (b"repair it now?" in shown) is not at_work
    assert (b"somebody may be writing into this cache" in shown) is at_work
