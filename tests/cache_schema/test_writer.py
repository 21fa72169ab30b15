"""Committing shards: races, crashes at every step, claims, sealing, a full disk. The oracle is an undisturbed run.

What needs root, strace or several processes at once is in tests/crash.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import promised
import pytest

from cache_schema.claims import STALE_AFTER_S, Claims
from cache_schema.errors import (
    CorruptShard,
    IncompleteCache,
    InvalidManifest,
    InvalidRow,
    NotACache,
    StorageError,
)
from cache_schema.folder import Folder
from cache_schema.reader import CacheReader
from cache_schema.repair import repair
from cache_schema.schema import QuarantinedExample
from cache_schema.verify import verify

TOYS = Path(__file__).with_name("conftest.py")
PRELUDE = f"""
import importlib.util, os, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("toys_of_the_cache", {str(TOYS)!r})
module = sys.modules["toys_of_the_cache"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
Toy = module.Toy
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error; the process is gone afterwards, whatever happened."""
    with process:
        try:
            _, errors = process.communicate(timeout=200)
        except BaseException:
            process.kill()
            raise
    return process.returncode, errors


def contents(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}


# --- crashes ---------------------------------------------------------------------------------------------------------

KILLED_AT = """
calls = 0

def counted(function, last):
    def call(*arguments, **keywords):
        global calls
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return function(*arguments, **keywords)
    return call

os.fsync = lambda fd: None  # for power cuts, not for kills
__import__("pyarrow").array([""])  # imports pandas if it is there: once, here, and not in every child
toy = Toy(examples=2, shard_examples=1)
for last in range(1000):
    child = os.fork()
    if child == 0:
        for name in ("open", "write", "fsync", "link", "rename", "unlink"):
            setattr(os, name, counted(getattr(os, name), last))
        toy.build(Path(sys.argv[1]) / str(last))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != -signal.SIGKILL:
        sys.exit(code)
"""


@pytest.mark.promise(promised.CRASH)
def test_killed_at_every_step_then_resumed(make_toy, tmp_path, monkeypatch, tried):
    """SIGKILL before each call that touches the disk, one run each: a second run always ends the same."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    toy = make_toy(examples=2, shard_examples=1)
    clean = contents(toy.build(tmp_path / "clean"))
    code, errors = finish(start(KILLED_AT, tmp_path))
    assert code == 0, errors
    killed = sorted(tmp_path.glob("[0-9]*"), key=lambda path: int(path.name))
    orphans = []
    for folder in killed:
        if (folder / "manifest.json").exists():
            report = verify(folder)
            assert report.good, report.problems
            orphans += report.orphans
        assert contents(toy.build(folder)) == clean
    assert len(killed) > 40, "the run has dozens of steps"
    assert orphans, "some kills fell between a data file and its record"
    tried(len(killed), "calls of a cache's writer that touch the disk, killed before each")


def test_killed_between_data_file_and_record(toy, tmp_path, monkeypatch):
    """The orphan counts for nothing; the shard is done again; with other bytes, the orphan is swept at the seal."""
    writer = toy.writer(tmp_path / "c")

    class Killed(BaseException):
        pass

    def killed(self: Folder, name: str, data: bytes) -> bool:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Folder, "create", killed)
        toy.commit(writer, 1)
    (orphan,) = (tmp_path / "c" / "shards").iterdir()
    assert toy.writer(tmp_path / "c").missing() == [0, 1, 2]
    assert verify(tmp_path / "c").orphans == [orphan.name]
    rows, bad = toy.shard(1)
    rows[0] = replace(rows[0], prompt="computed again, elsewhere")
    record = writer.commit(1, rows, bad, {})
    assert record.file != orphan.name and orphan.exists()
    assert toy.build(tmp_path / "c") and not orphan.exists()
    assert verify(tmp_path / "c").good


def test_every_name_lasts_before_the_next_one_relies_on_it(toy, tmp_path, monkeypatch):
    """The order that survives a power cut: bytes, name, folder of the data file; then the same of the record."""
    writer = toy.writer(tmp_path / "c")
    toy.commit(writer, 1)  # which makes the folder
    seen = []

    def watched(name):
        call = getattr(os, name)

        def watch(first, *rest, **keywords):
            kind = "" if name != "fsync" else " folder" if stat.S_ISDIR(os.fstat(first).st_mode) else " file"
            seen.append(name + kind)
            return call(first, *rest, **keywords)

        monkeypatch.setattr(os, name, watch)

    for name in ("fsync", "rename", "link"):
        watched(name)
    toy.commit(writer, 0)
    assert seen == ["fsync file", "rename", "fsync folder", "fsync file", "link", "fsync folder"]


# --- races -----------------------------------------------------------------------------------------------------------


@pytest.mark.promise(promised.ONE_WINNER)
def test_the_winner_may_sweep_the_losers_seal_at_any_moment(toy, tmp_path, monkeypatch, tried):
    """Two seal at once: one creates sealed.json and tidies up between the other's attempt and its look at why."""
    folder, link = tmp_path / "c", os.link
    writer, winner = toy.writer(folder), toy.writer(folder)
    for shard in range(writer.manifest.shards):
        toy.commit(writer, shard)

    def beaten(source, path):
        monkeypatch.setattr(os, "link", link)
        seals.append(winner.seal())
        source.unlink(missing_ok=True)
        raise FileExistsError(errno.EEXIST, "beaten", str(source))

    seals = []
    monkeypatch.setattr(os, "link", beaten)
    assert [writer.seal()] == seals and verify(folder).complete
    tried(1, "seals overtaken by another")


@pytest.mark.promise(promised.ONE_WINNER)
def test_loser_takes_the_winners_record(toy, tmp_path, monkeypatch, tried):
    """Another writer commits just before our record: its record is returned, our file goes, in that order."""
    folder = tmp_path / "c"
    slow, fast = toy.writer(folder), toy.writer(folder)
    rows, bad = toy.shard(0)
    won = []

    def overtaken(self: Folder, name: str, data: bytes) -> bool:
        monkeypatch.undo()
        won.append(fast.commit(0, [replace(row, prompt="fast") for row in rows], bad, {}))
        return self.create(name, data)

    monkeypatch.setattr(Folder, "create", overtaken)
    assert slow.commit(0, rows, bad, {}) == won[0]
    assert [p.name for p in (folder / "shards").glob("*.parquet")] == [won[0].file]
    tried(1, "records overtaken by another")


def test_loser_with_the_same_bytes_leaves_the_winners_file(toy, tmp_path):
    writer = toy.writer(tmp_path / "c")
    assert toy.commit(writer, 0) == toy.commit(writer, 0)
    toy.build(tmp_path / "c")
    assert verify(tmp_path / "c").good


@pytest.mark.promise(promised.ONE_WINNER)
def test_sealed_under_a_slow_writer(toy, tmp_path, monkeypatch, tried):
    """The seal sweeps temporary files, a living loser's too: it then finds the winner's record and is content."""
    folder = tmp_path / "c"
    writer = toy.writer(folder)

    def swept(self: Folder, name: str, data: bytes) -> None:
        monkeypatch.undo()
        toy.build(folder)
        raise FileNotFoundError(errno.ENOENT, "swept", name)

    monkeypatch.setattr(Folder, "publish", swept)
    assert toy.commit(writer, 2) == CacheReader.open(folder).records[2]
    tried(1, "caches sealed under a slow writer")


def test_cache_removed_under_a_writer(toy, tmp_path):
    writer = toy.writer(tmp_path / "c")
    (tmp_path / "c").rename(tmp_path / "moved")
    with pytest.raises(NotACache, match="was removed while shard 0 was written"):
        toy.commit(writer, 0)


# --- claims ----------------------------------------------------------------------------------------------------------


def test_claim_is_exclusive_until_released(toy, tmp_path):
    ours, theirs = toy.writer(tmp_path / "c"), toy.writer(tmp_path / "c")
    theirs._claims._me = {"host": "elsewhere", "pid": 7}
    assert ours.claim(0) and ours.claim(0)  # again is a heartbeat
    assert not theirs.claim(0) and theirs.claim(1) and not ours.claim(1)
    theirs.release(0)  # not theirs to give
    assert not theirs.claim(0)
    ours.release(0)
    assert theirs.claim(0)


def test_claims_end_with_the_commit(toy, tmp_path):
    writer = toy.writer(tmp_path / "c")
    assert writer.claim(0)
    toy.commit(writer, 0)
    assert not list((tmp_path / "c" / "claims").iterdir())
    assert not writer.claim(0)
    toy.build(tmp_path / "c")
    assert not writer.claim(1)


def test_a_process_that_dies_while_it_claims_leaves_no_claim(toy, tmp_path, monkeypatch):
    """Half a claim would name nobody, and so keep others off the shard until it is stale."""
    writer, other = toy.writer(tmp_path / "c"), toy.writer(tmp_path / "c")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(os, "write", die)
        with pytest.raises(KeyboardInterrupt):
            writer.claim(0)
    assert not (tmp_path / "c" / "claims" / "00000").exists()
    other._claims._me = {"host": "elsewhere", "pid": 7}
    assert other.claim(0)


def test_claim_of_a_dead_process_is_taken_over(toy, tmp_path):
    writer = toy.writer(tmp_path / "c")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    other = toy.writer(tmp_path / "c")
    other._claims._me = {**other._claims._me, "pid": dead.pid}
    assert other.claim(0) and writer.claim(0) and writer.claim(0)
    other._claims._me["host"] = "elsewhere"  # on another machine the number says nothing
    assert other.claim(1) and not writer.claim(1)


@pytest.mark.parametrize(("silent_s", "taken"), [(899, False), (901, True)])
def test_silent_claim_is_taken_over(toy, tmp_path, silent_s, taken):
    writer, other = toy.writer(tmp_path / "c"), toy.writer(tmp_path / "c")
    other._claims._me = {"host": "elsewhere", "pid": 7}
    assert other.claim(0)
    path = tmp_path / "c" / "claims" / "00000"
    os.utime(path, (path.stat().st_mtime - silent_s,) * 2)
    other._claims._renewed.clear()  # so long ago
    assert writer.claim(0) is taken
    assert other.claim(0) is not taken  # the heartbeat of one who lost it


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"host": 1, "pid": "x"}', b'{"host": "h", "pid": -1}', b"\xff"]
)
def test_garbage_in_a_claim_only_costs_time(toy, tmp_path, content):
    writer = toy.writer(tmp_path / "c")
    path = tmp_path / "c" / "claims" / "00000"
    path.parent.mkdir()
    path.write_bytes(content)
    assert not writer.claim(0)
    os.utime(path, (0, 0))
    assert writer.claim(0)


def test_claims_of_this_process_are_renewed(toy, tmp_path):
    writer = toy.writer(tmp_path / "c")
    assert isinstance(writer._claims, Claims) and writer.claim(0)
    path = tmp_path / "c" / "claims" / "00000"
    os.utime(path, (0, 0))
    assert writer.claim(0) and path.stat().st_mtime == 0  # not at every batch
    writer._claims._renewed[0] -= STALE_AFTER_S / 30
    assert writer.claim(0) and path.stat().st_mtime > 0
    assert json.loads(path.read_bytes())["pid"] == os.getpid()


# --- sealing ---------------------------------------------------------------------------------------------------------


def test_seal_names_what_is_missing(toy, tmp_path):
    writer = toy.writer(tmp_path / "c")
    toy.commit(writer, 1)
    with pytest.raises(IncompleteCache, match=r"2 of 3 shards are missing \(0, 2\)") as caught:
        writer.seal()
    assert caught.value.missing == (0, 2)
    assert "python -m stage1_teacher --recipe toy" in str(caught.value)
    assert not (tmp_path / "c" / "sealed.json").exists()


def test_seal_twice(toy, cache):
    before = contents(cache)
    assert toy.writer(cache).seal().records == CacheReader.open(cache).records
    assert contents(cache) == before


def test_seal_refuses_a_shard_whose_data_is_gone(toy, tmp_path):
    writer = toy.writer(tmp_path / "c")
    records = [toy.commit(writer, shard) for shard in range(3)]
    (tmp_path / "c" / "shards" / records[1].file).unlink()
    with pytest.raises(CorruptShard, match="gone") as caught:
        writer.seal()
    assert caught.value.shard == 1
    assert records[1].file in str(caught.value) and "repair" in str(caught.value)


def test_advice_for_a_corrupt_shard_works(toy, cache):
    """Follow the error message: repair, run again; the cache is whole, and what was damaged lies aside."""
    before = contents(cache)
    victim = next((cache / "shards").glob("00001-*"))
    victim.write_bytes(b"x" * victim.stat().st_size)
    with pytest.raises(CorruptShard) as caught:
        list(CacheReader.open(cache).rows())
    (line,) = [line for line in str(caught.value).splitlines() if "repair" in line]
    command = line.partition("next: python")[2].partition("   ")[0]
    subprocess.run(sys.executable + command, shell=True, check=True)
    assert toy.writer(cache).missing() == [1]
    toy.build(cache)
    after = contents(cache)
    aside = {after.pop(name) for name in list(after) if name.startswith("aside/")}
    assert after == before
    assert aside == {b"x" * victim.stat().st_size, before["shards/00001.json"], before["sealed.json"]}


# --- places where a cache cannot be ----------------------------------------------------------------------------------


def test_file_in_place_of_the_folder(toy, tmp_path):
    (tmp_path / "c").write_text("x")
    for folder in (tmp_path / "c", tmp_path / "c" / "deeper"):
        with pytest.raises(NotACache, match=r"/c is a file.*\n.*--set cache\.dir"):
            toy.writer(folder)


def test_broken_link_in_place_of_the_folder(toy, tmp_path):
    (tmp_path / "c").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotACache, match="a broken link"):
        toy.writer(tmp_path / "c")


def test_folder_with_other_things_in_it(toy, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(NotACache, match=r"not empty \(it has 'thesis.tex'\)"):
        toy.writer(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_fresh_file_system_is_empty_enough(toy, tmp_path):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".tmp-1-ab-manifest.json").write_text("of a writer that died")
    toy.build(tmp_path)
    assert verify(tmp_path).good


# --- no room ---------------------------------------------------------------------------------------------------------


def test_disk_full(toy, tmp_path, monkeypatch):
    """Out of space in the middle of a shard: said so, nothing left behind, what was committed stays."""
    writer = toy.writer(tmp_path / "c")
    toy.commit(writer, 0)
    before = contents(tmp_path / "c")
    write = os.write

    def full(fd: int, data: memoryview) -> int:
        if len(data) > 1000:
            return write(fd, data[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match=r"writing shard 1 failed: No space left.*\n.*free there.*MB") as caught:
            toy.commit(writer, 1)
    assert "every committed shard is kept" in str(caught.value)
    assert contents(tmp_path / "c") == before
    toy.build(tmp_path / "c")
    assert verify(tmp_path / "c").good


def test_short_writes_are_completed(toy, tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:100])))
    toy.build(tmp_path / "c")
    assert verify(tmp_path / "c").good


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
from cache_schema.errors import StorageError
toy = Toy(examples=3, shard_examples=1, max_positions=400)
try:
    toy.build(Path(sys.argv[1]))
except StorageError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.promise(promised.REFUSED)
def test_file_size_limit(make_toy, tmp_path, tried):
    code, errors = finish(start(LIMITED, tmp_path / "c"))
    assert code == 2 and "File too large" in errors and "free there" in errors
    assert not list((tmp_path / "c").rglob(".tmp-*"))
    make_toy(examples=3, shard_examples=1, max_positions=400).build(tmp_path / "c")
    tried(1, "file size limits under a cache's writer")


def test_no_hard_links(toy, tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(StorageError, match="hard links"):
        toy.writer(tmp_path / "c")


# --- rows that must not get in ---------------------------------------------------------------------------------------


def changed(row, name, change):
    value = np.array(getattr(row, name))
    return replace(row, **{name: change(value)})


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


BAD_ROWS = {
    "top_logit is not the logit of rank 0": lambda r: changed(r, "top_logit", lambda a: a + 1),
    "not sorted": lambda r: changed(r, "logits", put((0, 3), -1e3)),
    "not finite": lambda r: changed(r, "logits", put((0, 7), np.nan)),
    "not finite, or too far below": lambda r: changed(r, "logits", put((0, 7), -3e5)),
    "a token id twice": lambda r: changed(r, "token_ids", put((0, 1), r.token_ids[0, 0])),
    "a token id outside the vocabulary of 40": lambda r: changed(r, "token_ids", put((0, 1), 40)),
    "a token id outside": lambda r: changed(r, "token_ids", put((0, 1), -1)),
    "equal logits are not ordered by lower id": lambda r: replace(
        r,
        logits=np.repeat(r.logits[:, :1], 8, axis=1),
        token_ids=np.repeat([range(8)[::-1]], len(r.status), 0).astype("i4"),
    ),
    "at temperature 2.5, logsumexp is not that": lambda r: changed(r, "logsumexp", put((0, 1), r.logsumexp[0, 0])),
    "at temperature 1.0, logsumexp is not that": lambda r: changed(r, "log_tail", lambda a: a + 5),
    "answer_ids run from": lambda r: changed(r, "answer_ids", put(0, 40)),
    "answer_offsets leave the answer": lambda r: changed(r, "answer_offsets", put((-1, 1), 10_000)),
    "answer_offsets go backwards": lambda r: changed(r, "answer_offsets", lambda a: a[::-1]),
    "status 4 is unknown": lambda r: changed(r, "status", put(0, 4)),
    r"status is int64\[5\], expected uint8\[5\]": lambda r: changed(r, "status", lambda a: a.astype("i8")),
    r"logits is float32\[5, 7\], expected float32\[5, 8\]": lambda r: changed(r, "logits", lambda a: a[:, 1:]),
    "token_ids is None, expected int32": lambda r: replace(r, token_ids=None),
    "log_tail is None, expected float32": lambda r: replace(r, log_tail=None),
    "top_logit is list, expected float32": lambda r: replace(r, top_logit=r.top_logit.tolist()),
    "answer_start is -1": lambda r: replace(r, answer_start=-1),
    "prompt is not valid Unicode": lambda r: replace(r, prompt="\udc80"),
    "example_id is empty": lambda r: replace(r, example_id=""),
    "no positions": lambda r: replace(r, answer_ids=r.answer_ids[:0]),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_row_is_refused(make_toy, tmp_path, what):
    toy = make_toy(examples=4, shard_examples=4, max_positions=6, seed=3)
    rows, _ = toy.shard(0)
    which = next(i for i, row in enumerate(rows) if len(row.status) == 5)
    rows[which] = BAD_ROWS[what](rows[which])
    writer = toy.writer(tmp_path / "c")
    with pytest.raises(InvalidRow, match=rf"shard 0, row {which} .*{what}"):
        writer.commit(0, rows, [], {})
    assert not list((tmp_path / "c").rglob("*.parquet"))


def test_numbers_of_unusable_positions_may_be_anything(toy, tmp_path):
    rows, _ = toy.shard(0)
    spoilt = []
    for row in rows:
        bad = row.status != 0
        fill = {name: np.array(getattr(row, name)) for name in ("logits", "logsumexp", "log_tail", "token_ids")}
        for array in fill.values():
            array[bad] = -77 if array.dtype == np.int32 else np.inf
        spoilt.append(replace(row, **fill))
    assert any((row.status != 0).any() for row in rows)
    a, b = (toy.writer(tmp_path / name).commit(0, r, [], {}) for name, r in (("a", rows), ("b", spoilt)))
    assert a.sha256 == b.sha256


def test_rows_and_quarantined_must_be_the_plan(toy, tmp_path):
    writer = toy.writer(tmp_path / "c")
    rows, _ = toy.shard(0)
    with pytest.raises(InvalidRow, match="2 rows and 0 quarantined; expected 3 in all"):
        writer.commit(0, rows[:2], [], {})
    with pytest.raises(InvalidRow, match="example 'toy-0' of task 'toy' is there 2 times"):
        writer.commit(0, rows[:2], [QuarantinedExample("toy-0", "toy", "too_long")], {})
    with pytest.raises(InvalidRow, match="has no reason"):
        writer.commit(0, rows[:2], [QuarantinedExample("toy-2", "toy", "")], {})
    with pytest.raises(InvalidRow, match="there is no shard 3"):
        writer.commit(3, rows, [], {})


# --- what is no damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ETIMEDOUT])
@pytest.mark.parametrize("where", ["open_data", "read"])
def test_what_cannot_be_read_just_now_is_not_set_aside(toy, cache, monkeypatch, where, code):
    """A server that has gone away says nothing about its files. EIO does: the control."""
    whole = getattr(Folder, where)

    def refused(self, name, *rest):
        if "00001" in name:
            raise OSError(code, os.strerror(code))
        return whole(self, name, *rest)

    before = contents(cache)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, where, refused)
        with pytest.raises(StorageError, match=os.strerror(code)):
            repair(cache)
        assert contents(cache) == before
        code = errno.EIO
        assert repair(cache).found.problems
    assert contents(cache) != before or where == "read"  # a record is written again from the seal


def test_a_late_sweep_leaves_what_was_made_again(toy, cache):
    """A sealer sleeps; the shard is repaired and made again with other bytes; it wakes up and tidies."""
    late = toy.writer(cache)
    seal = late.seal()
    victim = cache / "shards" / seal.records[1].file
    victim.write_bytes(b"x" * victim.stat().st_size)
    assert repair(cache).shards == [1]
    rows, bad = toy.shard(1)
    redone = toy.writer(cache).commit(1, [replace(row, prompt="again") for row in rows], bad, {})
    assert redone.file != victim.name
    late._sweep(seal)
    toy.build(cache)
    assert verify(cache).complete and verify(cache).good


def test_a_cache_too_large_for_its_seal_says_so_before_it_writes_one(toy, tmp_path, monkeypatch):
    writer = toy.writer(tmp_path / "c")
    for shard in range(3):
        toy.commit(writer, shard)
    monkeypatch.setattr("cache_schema.writer.SEAL_MOST_BYTES", 500)
    with pytest.raises(InvalidManifest, match="cannot be sealed: its records, with 0 quarantined examples"):
        writer.seal()
    monkeypatch.setattr("cache_schema.writer.RECORD_MOST_BYTES", 500)
    with pytest.raises(InvalidRow, match=r"set cache\.shard_examples lower"):
        toy.commit(toy.writer(tmp_path / "d"), 0)
    assert not (tmp_path / "c" / "sealed.json").exists() and not list((tmp_path / "d").rglob("*.parquet"))


def test_a_file_in_place_of_the_shards(toy, tmp_path):
    writer = toy.writer(tmp_path / "c")
    (tmp_path / "c" / "shards").write_text("in the way")
    with pytest.raises(NotACache, match="shards is a file; expected a folder"):
        toy.writer(tmp_path / "c")
    assert writer.missing() == [0, 1, 2]
