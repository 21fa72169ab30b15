"""The command line: exit codes, what `verify` names, what `show` prints; and invariants that checksums cannot see."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_schema import jsondoc
from cache_schema.__main__ import main
from cache_schema.errors import CorruptShard
from cache_schema.reader import CacheReader
from cache_schema.schema import ALIGNMENT
from cache_schema.shard import footer_of, parquet_writer
from cache_schema.table import ARROW_SCHEMA
from cache_schema.verify import Problem, verify


def test_good_cache(toy, cache, capsys):
    assert main(["verify", str(cache)]) == 0
    out = capsys.readouterr().out
    assert toy.manifest.fingerprint in out and "3 of 3, sealed" in out and out.endswith("good\n")
    assert "examples   7 in = 7 written + 0 quarantined (none)" in out


def test_every_bad_shard_is_named_and_the_others_are_checked(cache, capsys):
    for shard in (0, 2):
        path = next((cache / "shards").glob(f"{shard:05d}-*"))
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    assert main(["verify", str(cache)]) == 1
    out = capsys.readouterr().out
    assert "shard 0, shards/00000-" in out and "shard 2, shards/00002-" in out and "shard 1," not in out
    assert out.endswith("not good: 2 problems, in shards 0, 2\n")


def test_incomplete_cache(toy, tmp_path, capsys):
    toy.commit(toy.writer(tmp_path / "c"), 1)
    assert main(["verify", str(tmp_path / "c")]) == 3
    captured = capsys.readouterr()
    assert "what is there is good" in captured.out
    assert "2 of 3 shards are missing (0, 2)" in captured.err


def test_incomplete_and_bad_is_bad(toy, tmp_path, capsys):
    record = toy.commit(toy.writer(tmp_path / "c"), 1)
    (tmp_path / "c" / "shards" / record.file).write_bytes(b"")
    assert main(["verify", str(tmp_path / "c")]) == 1
    assert capsys.readouterr().out.endswith("not good: 1 problem, in shard 1\n")


@pytest.mark.parametrize("command", ["verify", "show"])
def test_mistakes(tmp_path, capsys, command):
    (tmp_path / "file").write_text("x")
    for folder, what in ((tmp_path / "none", "no such folder"), (tmp_path / "file", "it is a file")):
        assert main([command, str(folder)]) == 2
        captured = capsys.readouterr()
        assert what in captured.err and captured.err.startswith("error: ") and "Traceback" not in captured.err


@pytest.mark.parametrize(
    "arguments", [[], ["verify"], ["verify", "d", "--recipe", "r"], ["verify", "d", "--set", "a=1"]]
)
def test_wrong_calls(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_seal_and_records_must_agree(cache):
    (cache / "shards" / "00000.json").unlink()
    path = cache / "shards" / "00001.json"
    body = json.loads(path.read_text())
    for name in ("format", "schema_version", "checksum"):
        del body[name]
    path.write_bytes(jsondoc.dump("record", {**body, "provenance": {"device": "other"}}))
    problems = {(p.shard, p.what) for p in verify(cache).problems}
    assert problems == {(0, "the commit record is gone"), (1, "the seal and the commit record do not agree")}


def forge(cache: Path, shard: int, change) -> None:
    """Replace the rows of a shard by others, all hashes made to fit: only the invariants can tell."""
    old = next((cache / "shards").glob(f"{shard:05d}-*"))
    table = change(pq.read_table(old))
    tag = pq.read_metadata(old).metadata[b"logitbank"]
    like = table.schema.names == ARROW_SCHEMA.names
    with (
        parquet_writer(old)
        if like
        else pq.ParquetWriter(old, table.schema, store_schema=False, compression="zstd") as writer
    ):
        writer.write_table(table.cast(ARROW_SCHEMA) if like else table)
        writer.add_key_value_metadata({"logitbank": tag})
    data = old.read_bytes()
    sha256, footer = hashlib.sha256(data).hexdigest(), hashlib.sha256(footer_of(memoryview(data))).hexdigest()
    new = old.rename(old.with_name(f"{shard:05d}-{sha256[:16]}.parquet"))
    fit = {"file": new.name, "sha256": sha256, "footer_sha256": footer, "bytes": len(data)}
    for path, kind in ((cache / "shards" / f"{shard:05d}.json", "record"), (cache / "sealed.json", "seal")):
        body = json.loads(path.read_text())
        for name in ("format", "schema_version", "checksum"):
            del body[name]
        (body if kind == "record" else body["records"][shard]).update(fit)
        path.write_bytes(jsondoc.dump(kind, body))


def with_list(name: str, change):
    def apply(table):
        column = table[name].combine_chunks()
        values = change(column.values.to_numpy().copy(), column.offsets.to_numpy())
        array = pa.ListArray.from_arrays(column.offsets, pa.array(values, column.type.value_type), type=column.type)
        return table.set_column(table.schema.get_field_index(name), table.schema.field(name), array)

    return apply


def first_to(value):
    def change(values, offsets):
        values[0] = value
        return values

    return change


def swap_ends(values, offsets):
    values[[0, 7]] = values[[7, 0]]
    return values


FORGERIES = {
    "id_order runs from 2 to 40": with_list("id_order", first_to(40)),
    "id_order runs from -1": with_list("id_order", first_to(-1)),
    "id_order has an id twice": with_list("id_order", lambda v, o: np.where(np.arange(len(v)) == 1, v[0], v)),
    "id_excess has .* numbers, expected": with_list("slots", lambda v, o: v | 15),
    "height_excess has .* numbers, expected": with_list("slots", lambda v, o: v | 0xF0),
    "slots lead to place .*, expected 0 to 39": with_list("slots", lambda v, o: v & 0xF0 | 14),
    "height_low run from 0 to 64": with_list("height_low", first_to(64)),
    "a token id twice": with_list("slots", lambda v, o: np.where(np.arange(len(v)) == 1, v & 0xF0, v)),
    "status run from 0 to 9": with_list("status", first_to(9)),
    "unusable positions": with_list("status", first_to(3)),
    "logsumexp is not that": with_list("logsumexp", lambda v, o: v + 1),
    "not finite": with_list("log_tail", lambda v, o: v * np.nan),
    "answer_offsets run from 0 to 10000": with_list("answer_offsets", first_to(10_000)),
    "answer_offsets run from -1": with_list("answer_offsets", first_to(-1)),
    "is there twice": lambda t: t.set_column(0, t.schema.field(0), pa.array(["x", "y", "x"], pa.string())),
    "is in shard 0 as well": lambda t: t.set_column(0, t.schema.field(0), pa.array(["toy-0", "x", "y"], pa.string())),
    "its columns are not those": lambda t: t.drop_columns(["status"]),
    "2 rows, its commit record says 3": lambda t: t.slice(0, 2),
}


SAMPLED_FORGERIES = {
    "draws run from 0 to 9": with_list("draws", first_to(9)),
    "draws are not 8 in all": with_list("draws", lambda v, o: v + (np.arange(len(v)) == 0)),
    "a slot without draws before one with": with_list("height_low", lambda v, o: v + (np.arange(len(v)) == 7)),
    "a token id twice": with_list("slots", lambda v, o: np.where(np.arange(len(v)) == 1, v & 0xF0, v)),
    "temperature 1.0, the drawn ids have a probability above 1": with_list("logsumexp", lambda v, o: v - 1),
    "temperature 2.5, the drawn ids have a probability above 1": with_list(
        "logsumexp", lambda v, o: v - 2 * (np.arange(len(v)) % 2)
    ),
}


@pytest.mark.parametrize("what", SAMPLED_FORGERIES)
def test_invariants_of_drawn_ids(make_toy, tmp_path, what):
    cache = make_toy(selector="sampled").build(tmp_path / "c")
    assert verify(cache).good
    forge(cache, 1, SAMPLED_FORGERIES[what])
    (problem,) = verify(cache).problems
    assert re.search(what, problem.what), problem.what


@pytest.mark.parametrize("added", [0.0, 0.5, 2.0])
def test_counts_tell_a_normaliser_that_is_too_large(make_toy, tmp_path, added):
    """A sum of the drawn ids' probabilities cannot, for it may be anything up to 1."""
    toy = make_toy(selector="sampled", top_k=12, temperatures=(1.0,), max_positions=20)
    cache = toy.build(tmp_path / "c")
    forge(cache, 1, with_list("logsumexp", lambda v, o: v + np.float32(added)))
    problems = [problem.what for problem in verify(cache).problems]
    assert ["an id was drawn more or less often" in what for what in problems] == [True] * (added > 0), problems


@pytest.mark.parametrize("what", FORGERIES)
def test_invariants_hold_whatever_the_hashes_say(cache, what):
    forge(cache, 1, FORGERIES[what])
    (problem,) = verify(cache).problems
    assert problem.shard == 1
    assert re.search(what, problem.what), problem.what


def test_offsets_beyond_the_answer_are_not_read(cache):
    """They are indices to whoever aligns another tokenizer: the cheap read that is for that refuses them too."""
    forge(cache, 1, with_list("answer_offsets", first_to(-1)))
    with pytest.raises(CorruptShard, match="answer_offsets run from -1"):
        list(CacheReader.open(cache).rows(ALIGNMENT))


def test_a_forgery_that_changes_nothing_is_good(cache):
    """The forger's tools are in order: the failures above are about the rows."""
    forge(cache, 1, lambda table: table)
    report = verify(cache)
    assert report.good, report.problems


def test_show_prints_tokens_candidates_and_probabilities(toy, cache, capsys):
    assert main(["show", str(cache), "--example", "toy-4", "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "example 4 of 7: toy-4 (task toy)" in out and "What is 4?" in out and "outside top 8" in out
    written = toy.row(4)
    lines = out.splitlines()[-len(written.answer_ids) :]
    p = np.exp(toy.full_logits(4).astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    for t, line in enumerate(lines):
        if written.status[t]:
            assert line.endswith("not usable: not_finite")
            continue
        best = int(p[t].argmax())
        assert f"{p[t, best]:6.3f}" in line
        assert (toy.vocabulary[best] or f"<{best}>") in line
        tail = 1 - p[t, written.token_ids[t]].sum()
        assert float(line.split()[-1]) == pytest.approx(tail, rel=0.06)


def test_show_prints_draws_beside_probabilities(make_toy, tmp_path, capsys):
    toy = make_toy(selector="sampled")
    assert main(["show", str(toy.build(tmp_path / "c")), "--example", "toy-4", "--top", "8"]) == 0
    out = capsys.readouterr().out
    written, p = toy.row(4), np.exp(toy.full_logits(4).astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    assert "share of 8 draws" in out and out.splitlines()[-len(written.answer_ids) - 1].endswith("ids drawn")
    for t, line in enumerate(out.splitlines()[-len(written.answer_ids) :]):
        if written.status[t] == 0:
            drawn = written.token_ids[t][written.draws[t] > 0]
            shown = re.findall(r"(0\.\d{3}) (0\.\d{3}|1\.000)", line)
            np.testing.assert_allclose([float(a) for a, _ in shown], p[t, drawn], rtol=toy.step / 2, atol=5e-4)
            assert [float(b) for _, b in shown] == (written.draws[t][: len(drawn)] / 8).tolist()
            assert line.split()[-1] == str(len(drawn))


def test_show_without_ids_and_by_number(make_toy, tmp_path, capsys):
    path = make_toy(store_ids=False).build(tmp_path / "c")
    assert main(["show", str(path), "--example", "2"]) == 0
    assert "this cache keeps no token ids" in capsys.readouterr().out


def test_show_marks_the_answer_token(make_toy, tmp_path, capsys):
    toy = make_toy(vocab_size=9, top_k=9, examples=5)
    main(["show", str(toy.build(tmp_path / "c")), "--top", "9"])
    row = toy.row(0)
    lines = capsys.readouterr().out.splitlines()[-len(row.answer_ids) :]
    assert [line.count("*") for line in lines] == [int(code == 0) for code in row.status]


def test_show_says_why_an_example_is_not_there(make_toy, tmp_path, capsys):
    path = make_toy(quarantined={2: "too_long"}).build(tmp_path / "c")
    assert main(["show", str(path), "--example", "toy-2"]) == 2
    assert "it is quarantined, too_long" in capsys.readouterr().err
    assert main(["show", str(path), "--example", "99"]) == 2
    assert "a number from 0 to 5" in capsys.readouterr().err


def long_ids(size):
    def change(table):
        ids = [f"{name}-{'x' * size}" for name in table["example_id"].to_pylist()]
        return table.set_column(0, table.schema.field(0), pa.array(ids, pa.string()))

    return change


def test_verify_remembers_no_names(make_toy, tmp_path):
    """Of ids of a megabyte, in eight shards, it holds a few at a time."""
    size, shards = 10**6, 8
    cache = make_toy(examples=shards, shard_examples=1).build(tmp_path / "c")
    for shard in range(shards):
        forge(cache, shard, long_ids(size))
    tracemalloc.start()
    try:
        assert verify(cache).good
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size < peak < shards * size  # the control: what it holds is counted


def test_names_that_run_into_each_other_are_two(make_toy, tmp_path):
    """Task a, example bc is not task ab, example c; the same pair in two shards is a problem."""

    def named(task, name):
        return lambda t: t.set_column(0, t.schema.field(0), pa.array([name])).set_column(
            1, t.schema.field(1), pa.array([task])
        )

    cache = make_toy(examples=2, shard_examples=1).build(tmp_path / "c")
    forge(cache, 0, named("a", "bc"))
    forge(cache, 1, named("ab", "c"))
    assert verify(cache).good
    forge(cache, 1, named("a", "bc"))
    assert [p.what for p in verify(cache).problems] == ["row 0 (example 'bc'): it is in shard 0 as well"]


def test_a_message_repeats_little_of_a_cache(cache, capsys):
    forge(cache, 1, lambda table: with_list("logsumexp", lambda v, o: v + 1)(long_ids(10**6)(table)))
    assert main(["verify", str(cache)]) == 1
    out = capsys.readouterr().out
    assert "BAD" in out and len(out) < 5000
    assert len(str(Problem(0, "f", "x" * 10**6))) < 2000 and "\x1b" not in str(Problem(0, "f", "\x1b[2J"))


def test_show_passes_no_control_characters(make_toy, tmp_path, capsys):
    path = make_toy(quarantined={2: "\x1b[2J\rgone" + "x" * 10**4}).build(tmp_path / "c")
    assert main(["show", str(path), "--example", "toy-2"]) == 2
    told = capsys.readouterr().err
    assert "\\x1b[2J\\rgone" in told and "\x1b" not in told and "\r" not in told and len(told) < 500


def test_show_cuts_a_text_without_end(cache, capsys):
    def prompt(table):
        texts = ["\0" * 3 * 10**5] * len(table)
        return table.set_column(2, table.schema.field(2), pa.array(texts, pa.string()))

    forge(cache, 0, prompt)
    assert main(["show", str(cache)]) == 0
    out = capsys.readouterr().out
    assert "(300000 characters in all)" in out and out.count("\\x00") == 100_000 and "\0" not in out


def test_show_of_an_unsealed_cache(toy, tmp_path):
    toy.commit(toy.writer(tmp_path / "c"), 0)
    assert main(["show", str(tmp_path / "c")]) == 0


PIPELINE = """
import sys
arguments = sys.argv[1:]
if "broken" in arguments:
    print("unknown recipe 'broken'. Did you mean 'pocket'?", file=sys.stderr)
    sys.exit(2)
assert arguments == ["show", "--recipe", "pocket", "--field", "cache.dir", "--set", "a=1", "--set", "b=2"], arguments
print("the cache")
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "cache_schema", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_recipe_is_asked_for_its_folder(toy, tmp_path):
    """`python -m pipeline` answers as a process of its own; a small one stands in its place here."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").touch()
    (tmp_path / "pipeline" / "__main__.py").write_text(PIPELINE)
    toy.build(tmp_path / "the cache")
    good = run(tmp_path, "verify", "--recipe", "pocket", "--set", "a=1", "--set", "b=2")
    assert good.returncode == 0 and good.stdout.endswith("good\n"), good.stderr
    bad = run(tmp_path, "show", "--recipe", "broken")
    assert bad.returncode == 2 and bad.stderr == "unknown recipe 'broken'. Did you mean 'pocket'?\n"


def test_output_into_a_closed_pipe(toy, cache):
    root = Path(__file__).parents[2]
    script = f"{sys.executable} -m cache_schema show {cache} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and done.returncode == 0, done.stderr


def test_needs_numpy_and_pyarrow_only():
    """The whole package, command line included, without any of the heavy libraries."""
    heavy = ["torch", "transformers", "pandas", "datasets", "pydantic", "yaml", "pipeline", "zstandard", "rich"]
    code = f"import sys\nfor name in {heavy}: sys.modules[name] = None\n"
    code += "import cache_schema.__main__, cache_schema.writer, cache_schema.verify, cache_schema.show"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_totals_are_in_the_reader_too(cache):
    assert CacheReader.open(cache).totals() == verify(cache).totals


def test_repair_says_what_it_did_and_what_is_left_to_do(toy, cache, capsys):
    assert main(["repair", str(cache)]) == 0 and capsys.readouterr().out == "good\n"
    victim = next((cache / "shards").glob("00001-*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"X")
    assert main(["repair", str(cache)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        "set aside  sealed.json",
        "set aside  shards/00001.json",
        f"set aside  shards/{victim.name}",
        f"next: python -m stage1_teacher --recipe toy --set cache.dir={cache}   makes shard 1 again, and nothing else",
    ]
    assert main(["repair", str(cache)]) == 3
    out, errors = capsys.readouterr()
    assert out == "what is there is good\n" and "1 of 3 shards are missing (1)" in errors
    toy.build(cache)
    (cache / "shards" / "00000.json").unlink()
    assert main(["repair", str(cache)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["rewritten  shards/00000.json, from the seal", "good again"]
