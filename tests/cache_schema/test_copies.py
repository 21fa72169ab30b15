"""Local copies of data files: bounded, shared by processes, never half there."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import threading
from pathlib import Path

import pytest

from cache_schema.copies import Copies


def put(size: int = 10, calls: list[str] | None = None):
    def fetch(path: Path) -> None:
        if calls is not None:
            calls.append(path.name)
        path.write_bytes(bytes(size))

    return fetch


def names(copies: Copies) -> set[str]:
    return {path.name for path in copies.folder.iterdir()}


def test_a_copy_is_fetched_once(tmp_path):
    copies, calls = Copies(tmp_path / "c"), []
    for _ in range(3):
        assert copies.get("a", put(10, calls)).read_bytes() == bytes(10)
    assert calls == [".a.part"] and names(copies) == {"a"}


def test_what_was_used_longest_ago_goes_first(tmp_path):
    copies = Copies(tmp_path, most_bytes=30)
    for age, name in ((20, "a"), (30, "b"), (40, "c")):
        os.utime(copies.get(name, put()), (age, age))
    copies.get("a", put())  # used again
    copies.get("d", put())
    assert names(copies) == {"a", "c", "d"}


def test_the_newest_stays_however_large(tmp_path):
    copies = Copies(tmp_path, most_bytes=5)
    copies.get("a", put())
    copies.get("b", put())
    assert names(copies) == {"b"}


def test_a_fetch_that_fails_leaves_nothing(tmp_path):
    copies = Copies(tmp_path)

    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("cut off")

    with pytest.raises(ValueError, match="cut off"):
        copies.get("a", fails)
    assert names(copies) == set()
    assert copies.get("a", put()).read_bytes() == bytes(10)


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    """A part is ours once the lock is: a dead process has none."""
    (tmp_path / ".a.part").write_bytes(b"half")
    assert Copies(tmp_path).get("a", put()).read_bytes() == bytes(10)
    assert names(Copies(tmp_path)) == {"a"}


def _get_all(folder: Path, start: multiprocessing.synchronize.Event, log: Path, count: int) -> None:
    copies = Copies(folder, most_bytes=1 << 20)
    start.wait()
    for i in range(count):

        def fetch(path: Path, i: int = i) -> None:
            with log.open("a") as file:
                file.write(f"{i}\n")
            path.write_bytes(bytes([i]) * 1000)

        assert copies.get(f"n{i}", fetch).read_bytes() == bytes([i]) * 1000
    os._exit(0)


def test_processes_fetch_each_copy_once(tmp_path):
    context = multiprocessing.get_context("fork")
    start, log = context.Event(), tmp_path / "log"
    children = [context.Process(target=_get_all, args=(tmp_path / "c", start, log, 40)) for _ in range(6)]
    for child in children:
        child.start()
    start.set()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 6
    assert sorted(map(int, log.read_text().split())) == list(range(40))
    assert names(Copies(tmp_path / "c")) == {f"n{i}" for i in range(40)}


def test_threads_that_make_room_for_each_other(tmp_path):
    """Much less room than is wanted at a time: every open copy is whole, and the bound holds in the end."""
    copies, wrong = Copies(tmp_path, most_bytes=3000), []

    def run(seed: int) -> None:
        for i in range(100):
            number = (i * 7 + seed) % 9
            try:
                with copies.get(f"n{number}", put_number(number)).open("rb") as file:
                    if file.read() != bytes([number]) * 1000:
                        wrong.append(number)
            except FileNotFoundError:  # removed between being got and being opened: callers ask again
                continue

    def put_number(number: int):
        return lambda path: path.write_bytes(bytes([number]) * 1000) and None

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    copies.get("last", put())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3000


def test_no_room_for_a_copy(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(OSError, match="No space left"):
            Copies(mount).get("a", put(1 << 20))
        assert names(Copies(mount)) == set()
    finally:
        subprocess.run(["umount", str(mount)], check=True)
