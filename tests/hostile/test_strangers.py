"""Caches of a stranger that are not what they should be, with every hash right: refused by name, nothing told.

The schema, the paths and the numbers; then the house itself, which has no way to run what it reads.
"""

import ast
import json
import pickle
import shlex
import shutil
from pathlib import Path

import promised
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from strangers import ROOT, Parquet, change_record, data_file, put_shard, rewrite
from thrift import BINARY, Field

from cache_schema.errors import CacheError, CorruptShard, DamagedDocument
from cache_schema.reader import CacheReader
from cache_schema.schema import Columns
from cache_schema.verify import verify

PACKAGES = ("cache_schema", "pipeline", "stage1_teacher", "stage2_student", "stage3_eval", "benchmarks")


# -- the schema


class Payload:
    """What unpickling turns into a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


class Extension(pa.ExtensionType):
    """A type that is known to pyarrow here, as one of a library that is installed would be."""

    def __init__(self):
        super().__init__(pa.string(), "evil.extension")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        raise AssertionError("a stranger's type was made")


def table_of(change):
    """Shard 1 written again by pyarrow's own ways from a changed table, its `logitbank` key kept."""

    def forge(cache, mark):
        path = data_file(cache, 1)
        options = {"compression": "zstd", "write_statistics": False, "store_schema": False, "write_page_checksum": True}
        table = change(pq.read_table(path), options)
        with pq.ParquetWriter(sink := pa.BufferOutputStream(), table.schema, **options) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"logitbank": pq.read_metadata(path).metadata[b"logitbank"]})
        put_shard(cache, 1, sink.getvalue().to_pybytes())

    return forge


def retyped(name, kind):
    def change(table, options):
        i = table.schema.get_field_index(name)
        return table.set_column(i, pa.field(name, kind), table[name].cast(kind))

    return change


def with_options(**more):
    def change(table, options):
        options |= more
        return table

    return change


def footer_key(key, value):
    """Another key of the footer; value: a function of the place where code would leave its mark."""

    def forge(cache, mark):
        parquet = Parquet.of(data_file(cache, 1).read_bytes())
        entry = {1: Field(BINARY, key), 2: Field(BINARY, value(mark))}
        parquet.footer[5].value.append(entry)
        put_shard(cache, 1, parquet.data())

    return forge


def pickled_schema(mark):
    """ARROW:schema with an extension type as pyarrow before 14.0.1 unpickled it."""
    import base64

    about = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(mark)),
    }
    fields = [pa.field("example_id", pa.string(), nullable=False, metadata=about)]
    return base64.b64encode(pa.schema(fields).serialize().to_pybytes())


def footer_of(change):
    def forge(cache, mark):
        parquet = Parquet.of(data_file(cache, 1).read_bytes())
        change(parquet)
        put_shard(cache, 1, parquet.data())

    return forge


def renamed(parquet):
    parquet.footer[2].value[1][4].value = b"example_ie"


def converted(parquet):
    """A text that does not say that it is one."""
    for number in (6, 10):
        parquet.footer[2].value[3].pop(number, None)


def encrypted(parquet):
    parquet.magic = b"PARE"


def elsewhere(parquet):
    for column in parquet.footer[4].value[0][1].value:
        column[1] = Field(BINARY, b"../../../../etc/passwd")
        items = dict(sorted(column.items()))
        column.clear()
        column.update(items)


SCHEMAS = {
    "a column more": table_of(lambda t, o: t.append_column("extra", pa.array([1, 2, 3]))),
    "a column less": table_of(lambda t, o: t.drop_columns(["status"])),
    "no columns": table_of(lambda t, o: t.select(["task"])),
    "another order": table_of(lambda t, o: t.select(t.column_names[::-1])),
    "another name": footer_of(renamed),
    "large texts": table_of(retyped("prompt", pa.large_string())),
    "bytes for a text": table_of(retyped("prompt", pa.binary())),
    "a large list": table_of(retyped("slots", pa.large_list(pa.uint8()))),
    "a list of larger numbers": table_of(retyped("answer_ids", pa.list_(pa.int64()))),
    "a list of lists": table_of(
        lambda t, o: t.set_column(4, "answer_ids", pa.array([[[1]]] * 3, pa.list_(pa.list_(pa.int32()))))
    ),
    "a struct": table_of(lambda t, o: t.set_column(0, "example_id", pa.array([{"a": 1}] * 3))),
    "a map": table_of(
        lambda t, o: t.set_column(0, "example_id", pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int8())))
    ),
    "an extension type": table_of(
        lambda t, o: o.update(store_schema=True)
        or t.set_column(0, "example_id", pa.ExtensionArray.from_storage(Extension(), t["example_id"].combine_chunks()))
    ),
    "a dictionary, said in ARROW:schema": table_of(
        lambda t, o: o.update(store_schema=True) or t.set_column(1, "task", t["task"].dictionary_encode())
    ),
    "ARROW:schema of the honest types": table_of(with_options(store_schema=True)),
    "ARROW:schema with a pickle": footer_key(b"ARROW:schema", pickled_schema),
    "a key of pandas": footer_key(b"pandas", lambda mark: b"{}"),
    "an encrypted footer": footer_of(encrypted),
    "columns in another file": footer_of(elsewhere),
    "another logical type": footer_of(converted),
    **{f"{kind} compression": table_of(with_options(compression=kind)) for kind in ("none", "snappy", "gzip", "lz4")},
    "dictionaries for every text": table_of(with_options(use_dictionary=True)),
    "prefixes for texts": table_of(
        with_options(use_dictionary=False, column_encoding={"prompt": "DELTA_BYTE_ARRAY"})
    ),
    "no checksums": table_of(with_options(write_page_checksum=False)),
    "pages of the second version": table_of(with_options(data_page_version="2.0")),
}  # fmt: skip


def everything(cache):
    """Read all columns; the error that comes instead."""
    reader = CacheReader.open(cache)
    for columns in Columns:
        for _ in reader.rows(columns):
            pass


@pytest.mark.promise(promised.STRANGE_CACHE)
def test_no_schema_but_ours(forge, tmp_path, tried):
    mark = tmp_path / "ran"
    pa.register_extension_type(Extension())
    try:
        for name, change in SCHEMAS.items():
            cache = forge()
            change(cache, mark)
            try:
                everything(cache)
            except CorruptShard as error:
                assert error.shard == 1, name
            else:
                raise AssertionError(f"{name}: it was read")
            assert [problem.shard for problem in verify(cache).problems] == [1], name
            assert not mark.exists(), name
    finally:
        pa.unregister_extension_type("evil.extension")
    tried(len(SCHEMAS), "data files with other columns, types, encodings or keys")


# -- paths


PLACES = ("sealed", "vocabulary", "shards/00001")
SECRET = "the secret of somebody else 7f3a"


@pytest.mark.promise(promised.STRANGE_CACHE)
@pytest.mark.parametrize(
    "name",
    ["manifest.json", "data", *(pytest.param(f"{n}.json", marks=pytest.mark.slow) for n in PLACES)],
)
def test_a_link_out_of_the_folder_tells_nothing(forge, jail, tmp_path, tried, name):
    """A snapshot of a hub is links, so they are followed; what is not the cache's is not data, nor in a message."""
    contents = [SECRET, json.dumps({"secret": SECRET}), json.dumps({"format": SECRET}), json.dumps([SECRET])]
    targets = [str(tmp_path / f"secret{i}") for i in range(len(contents))]
    for target, content in zip(targets, contents, strict=True):
        Path(target).write_text(content)
    targets += ["/proc/self/environ", "/proc/self/pagemap", "/dev/zero", "/", "nowhere"]
    for target in targets:
        cache = forge()
        path = data_file(cache, 1) if name == "data" else cache / name
        path.unlink()
        path.symlink_to(target)
        if name.startswith("shards"):
            (cache / "sealed.json").unlink()
        visit = jail.read(cache)
        assert not visit.bad, (target, visit.bad)
        told = " ".join(outcome.message for outcome in visit.outcomes)
        assert any(outcome.error for outcome in visit.outcomes), target
        assert "secret of somebody" not in told and "PATH=" not in told, told
    tried(len(targets), f"links out of the folder in the place of {'a data file' if name == 'data' else name}")


@pytest.mark.promise(promised.STRANGE_CACHE)
def test_names_are_never_taken_from_a_cache(forge, tried, tmp_path):
    outside = tmp_path / "outside.parquet"
    names = ["../../outside.parquet", str(outside), "/etc/passwd", "..", ".", "", "a\nb.parquet", "00001-\0.parquet"]
    names += ["00001-0123456789abcdef.parquet/../x", "~/x", "file:///etc/passwd", "s3://evil/x", "C:\\x"]
    for name in names:
        cache = forge()
        shutil.copy(data_file(cache, 1), outside)
        records = json.loads((cache / "sealed.json").read_text())["records"]
        records[1]["file"] = name
        rewrite(cache / "sealed.json", records=records)
        with pytest.raises(DamagedDocument, match=r"records\[1\]: file is"):
            CacheReader.open(cache)
        (cache / "sealed.json").unlink()
        rewrite(cache / "shards" / "00001.json", file=name)
        with pytest.raises(DamagedDocument, match=r"file is"):
            CacheReader.open(cache, require_sealed=False)
    tried(len(names), "names of files elsewhere")


def test_a_snapshot_of_links_is_a_cache(honest, tmp_path):
    """The control, and what a hub's client leaves on a disk."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    (snapshot / "shards").mkdir(parents=True)
    for i, path in enumerate(p for p in honest.rglob("*") if p.is_file()):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.relative_to(honest)).symlink_to(blobs / str(i))
    everything(snapshot)
    assert verify(snapshot).good and verify(snapshot).complete


def test_what_a_message_says_is_no_command_of_theirs(forge):
    """`next:` is there to be typed."""
    cache = forge()
    for recipe in ("x; touch ran", "$(touch ran)", "`touch ran`", "x\ntouch ran", "\x1b[2Jx"):
        rewrite(cache / "manifest.json", provenance={"recipe": recipe})
        (cache / "sealed.json").unlink(missing_ok=True)
        with pytest.raises(CacheError) as caught:
            CacheReader.open(cache)
        (line,) = [line for line in str(caught.value).splitlines() if "--recipe" in line]
        words = shlex.split(line[line.index("python -m") :].partition("   ")[0])
        named = recipe if recipe.isprintable() else "NAME"
        assert words[:7] == ["python", "-m", "stage1_teacher", "--recipe", named, "--set", f"cache.dir={cache}"]
        assert not recipe.isprintable() or shlex.quote(recipe) in line


def test_reasons_are_told_without_control_characters(forge):
    cache = forge()
    gone = {"example_id": "e", "task": "t", "reason": "\x1b[2J\nok", "positions": 0}
    change_record(cache, 1, rows=2, quarantined=[gone])
    assert "\x1b" not in str(CacheReader.open(cache).totals().examples)


# -- the house


FORBIDDEN = {"eval", "exec", "compile", "__import__"}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MAY = {("stage3_eval/sandbox/inside.py", name) for name in ("eval", "exec", "compile")}  # the sandbox itself
MAY |= {("pipeline/recipe.py", "yaml.load")}  # of a SafeLoader's child


def calls_of_danger(text, path):
    """Every way to run what was read: unpickling, evaluating, and readers that do either when asked."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            roots = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {root}" for root in roots if root.split(".")[0] in UNSAFE)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in FORBIDDEN and (path, name) not in MAY:
                yield name
            if name in ("torch.load", "np.load", "numpy.load", "pd.read_pickle", "yaml.load", "yaml.unsafe_load"):
                safe = name == "yaml.load" and ("Safe" in ast.unparse(node) or (path, name) in MAY)
                yield from () if safe else (name,)
            if options.get("trust_remote_code", "False") != "False" or options.get("allow_pickle", "False") != "False":
                yield f"{name}({options})"


@pytest.mark.promise(promised.STRANGE_CACHE)
def test_nothing_here_runs_what_it_reads(tried):
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = {}
    for path in files:
        name = str(path.relative_to(ROOT))
        if hits := list(calls_of_danger(path.read_text(encoding="utf-8"), name)):
            found[name] = hits
    assert not found
    tried(len(files), "modules without a pickle, an eval or an unsafe loader")


@pytest.mark.parametrize(
    "text",
    [
        *("import pickle", "from pickle import loads", "eval(x)", "torch.load(f)", "yaml.load(f)"),
        *("f(trust_remote_code=True)", "np.load(f, allow_pickle=True)", "f(trust_remote_code=x)"),
    ],
)
def test_what_would_be_found_in_the_house(text):
    assert list(calls_of_danger(text, "x.py"))
