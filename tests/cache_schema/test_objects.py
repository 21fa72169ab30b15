"""A cache in an object store, over the real S3 protocol: lost answers, cut uploads, races, and what a network does."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import promised
import pytest
import s3
from s3 import Fault

from cache_schema.__main__ import main
from cache_schema.copies import Copies
from cache_schema.errors import CorruptShard, FingerprintMismatch, IncompleteCache, NotACache, StorageError
from cache_schema.objects import ObjectStore
from cache_schema.reader import CacheReader
from cache_schema.store import open_store
from cache_schema.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # boto's and moto's


@dataclass
class Bucket:
    """An empty bucket behind a proxy of its own."""

    name: str
    proxy: s3.Proxy
    client: Any

    @property
    def cache(self) -> str:
        return f"s3://{self.name}/some/cache"

    def objects(self) -> dict[str, bytes]:
        """Every object of the cache, by its name inside it."""
        listed = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        found = {}
        for item in listed:
            body = self.client.get_object(Bucket=self.name, Key=item["Key"])["Body"]
            found[item["Key"].removeprefix("some/cache/")] = body.read()
        return found

    def fail(self, method: str, path: str, kind: str, times: int = 1) -> Fault:
        fault = Fault(method, path, kind, times)
        self.proxy.faults.append(fault)
        return fault


@pytest.fixture(scope="module")
def server() -> Iterator[s3.Server]:
    with s3.Server() as server:
        yield server


@pytest.fixture
def bucket(
    server: s3.Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Bucket]:
    import boto3

    for name, value in s3.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 2)  # its own, with longer and longer pauses; 5 elsewhere
    monkeypatch.setattr(Copies.__init__, "__defaults__", (str(tmp_path / "default-copies"), 1 << 30))
    with s3.Proxy(server.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        name = f"bank-{abs(hash(request.node.nodeid)) % 10**9}"
        client = boto3.client("s3", endpoint_url=server.url)
        client.create_bucket(Bucket=name)
        yield Bucket(name, proxy, client)


@pytest.fixture
def copies(tmp_path: Path) -> Copies:
    return Copies(tmp_path / "copies")


# --- the same cache --------------------------------------------------------------------------------------------------


def test_the_same_bytes_as_in_a_folder(toy, bucket, copies, tmp_path):
    """Every object is the file that a folder has; rows are the same; nothing of the writing is left."""
    folder = toy.build(tmp_path / "folder")
    toy.build(bucket.cache)
    assert bucket.objects() == {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    ours, theirs = CacheReader.open(bucket.cache, copies=copies), CacheReader.open(folder)
    assert [row.example_id for row in ours.rows()] == [row.example_id for row in theirs.rows()]
    for mine, plain in zip(ours.rows(), theirs.rows(), strict=True):
        assert (mine.logits == plain.logits).all() and (mine.token_ids == plain.token_ids).all()
    assert ours.vocabulary() == theirs.vocabulary()
    assert verify(bucket.cache).complete and verify(bucket.cache).good


def test_the_commands_take_a_url(toy, bucket, capsys):
    toy.build(bucket.cache)
    assert main(["verify", bucket.cache]) == 0
    assert capsys.readouterr().out.endswith("good\n")
    assert main(["show", bucket.cache, "--example", "2"]) == 0
    assert "example 2 of 7" in capsys.readouterr().out


def test_what_is_missing_or_another_is_said_so(toy, make_toy, bucket, copies):
    with pytest.raises(NotACache, match="no cache at s3://"):
        CacheReader.open(bucket.cache, copies=copies)
    writer = toy.writer(bucket.cache)
    toy.commit(writer, 1)
    with pytest.raises(IncompleteCache) as caught:
        CacheReader.open(bucket.cache, copies=copies)
    assert caught.value.missing == (0, 2)
    with pytest.raises(FingerprintMismatch, match=r"teacher\.seed"):
        make_toy(seed=1).writer(bucket.cache)
    bucket.client.put_object(Bucket=bucket.name, Key="other/thing", Body=b"x")
    with pytest.raises(NotACache, match="not empty"):
        toy.writer(f"s3://{bucket.name}/other")


# --- commits ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise(promised.CRASH)
@pytest.mark.parametrize("kind", ["lose the request", "lose the answer", "busy", "conflict"])
def test_an_ambiguous_answer_is_settled_by_reading(toy, bucket, tried, tmp_path, kind):
    """Whatever happens to a PUT once, the cache ends the same; a commit whose answer was lost is not done twice."""
    clean = toy.build(tmp_path / "clean")
    names = [str(p.relative_to(clean)) for p in clean.rglob("*") if p.is_file()]
    conditional = [name for name in names if name.endswith(".json")]
    faulty = conditional if kind == "conflict" else names
    faults = [bucket.fail("PUT", f"/{name}(\\?|$)", kind) for name in faulty]
    toy.build(bucket.cache)
    assert [fault.met for fault in faults] == [1] * len(faults)
    assert bucket.objects().keys() == set(names) and verify(bucket.cache).good
    tried(len(faults), f"requests of a commit: {kind}")


@pytest.mark.promise(promised.CRASH)
def test_a_store_that_stays_away_is_an_error_and_loses_nothing(toy, bucket, tried):
    """The record's PUT fails for good: an error in bounded time; the same command later finishes the cache."""
    writer = toy.writer(bucket.cache)
    toy.commit(writer, 0)
    before = bucket.objects()
    fault = bucket.fail("PUT", r"shards/00001\.json", "lose the request", times=1000)
    with pytest.raises(StorageError, match=r"creating shards/00001\.json failed(.|\n)*next: check the URL") as caught:
        toy.commit(writer, 1)
    assert "every committed shard is kept" in str(caught.value)
    now = bucket.objects()
    assert {name: now[name] for name in before} == before
    assert [name for name in now.keys() - before.keys() if name.endswith(".json")] == []
    fault.times = 0
    toy.build(bucket.cache)
    assert verify(bucket.cache).good
    tried(fault.met, "requests refused for good")


def test_an_answer_lost_to_the_one_who_was_second(toy, bucket):
    """Our PUT is refused because another's record is there, and that answer is lost: we read, and take theirs."""
    slow, fast = toy.writer(bucket.cache), toy.writer(bucket.cache)
    rows, bad = toy.shard(0)
    won = fast.commit(0, [replace(row, prompt="fast") for row in rows], bad, {})
    answers = iter([None, won])  # the first time it looked, there was none
    slow._committed = lambda shard: next(answers)
    fault = bucket.fail("PUT", r"shards/00000\.json", "lose the answer")
    assert slow.commit(0, rows, bad, {}) == won and fault.met == 1
    assert [name for name in bucket.objects() if name.endswith(".parquet")] == [f"shards/{won.file}"]


@pytest.mark.promise(promised.ONE_WINNER)
@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_eight_writers_of_other_bytes(make_toy, bucket, tried, rounds):
    """All write all shards, each with rows of its own; a record has one winner, and the seal leaves its files alone."""
    toy, writers = make_toy(examples=4, shard_examples=1), 8
    for number in range(rounds):
        cache, gate, errors = f"s3://{bucket.name}/race-{number}", threading.Barrier(writers), []

        def race(me: int, cache: str = cache, gate: threading.Barrier = gate, errors: list[Any] = errors) -> None:
            try:
                writer = toy.writer(cache)
                gate.wait(60)
                for shard in range(4):
                    writer.commit(shard, [replace(toy.row(shard), prompt=f"by {me}")], [], {"writer": me})
                writer.seal()
            except BaseException as error:
                gate.abort()
                errors.append(error)

        threads = [threading.Thread(target=race, args=(me,)) for me in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        report = verify(cache)
        assert report.good and report.complete and report.orphans == []
        for row, record in zip(CacheReader.open(cache).rows(), report.records, strict=True):
            assert row.prompt == f"by {record.provenance['writer']}"
    tried(rounds * 4, "shards with 8 writers, on S3")


def test_a_store_that_ignores_the_condition_is_refused(toy, bucket):
    """What an old server does: the second PUT overwrites. Found out before anything is written."""
    bucket.fail("PUT", "probe", "no condition", times=1000)
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        toy.writer(bucket.cache)
    assert bucket.objects() == {}


def test_a_file_system_without_conditions_serves_one_writer(toy, tmp_path):
    """fsspec's own memory: anything it opens can hold a cache; `exclusive` says that it takes one writer at a time."""
    writer = toy.writer(f"memory://{tmp_path.name}/cache")
    assert not writer.exclusive and toy.writer(tmp_path / "folder").exclusive
    toy.build(f"memory://{tmp_path.name}/cache")
    assert verify(f"memory://{tmp_path.name}/cache").complete


def test_claims_are_objects_too(toy, bucket):
    ours, theirs = toy.writer(bucket.cache), toy.writer(bucket.cache)
    theirs._claims._me = {"host": "elsewhere", "pid": 7}
    assert ours.claim(0) and not theirs.claim(0) and theirs.claim(1)
    ours.release(0)
    assert theirs.claim(0)
    theirs._claims._renewed.clear()
    assert not ours.claim(0)  # silent for less than 15 minutes
    toy.build(bucket.cache)
    assert not [name for name in bucket.objects() if name.startswith("claims/")]


@pytest.mark.promise(promised.TORN)
@pytest.mark.parametrize("kind", ["lose the request", pytest.param("busy", marks=pytest.mark.slow)])
def test_an_upload_in_parts_that_breaks_off_is_not_there(bucket, tried, kind):
    """120 MB go up in parts of 50, one is lost for good: nothing has the name, no part is kept, a new try succeeds."""
    store, data = open_store(bucket.cache), bytes(120 << 20)
    fault = bucket.fail("PUT", "partNumber=2", kind, times=1000)
    with pytest.raises(StorageError, match="writing shards/big failed"):
        store.publish("shards/big", data)
    assert bucket.objects() == {} and not store.has("shards/big")
    assert "Uploads" not in bucket.client.list_multipart_uploads(Bucket=bucket.name)
    fault.times = 0
    store.publish("shards/big", data)
    assert store.listing("shards") == {"big": len(data)}
    assert len([path for _, path in bucket.proxy.seen if "partNumber=3" in path]) >= 1
    tried(fault.met, f"parts of an upload: {kind}")


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise(promised.TORN)
@pytest.mark.parametrize("kind", ["alter the answer", "cut the answer"])
def test_a_download_that_arrives_altered_is_never_a_copy(toy, bucket, copies, tried, kind):
    """For good: the shard is named, or the network is. Once: the rows are right in the end."""
    toy.build(bucket.cache)
    fault = bucket.fail("GET", r"shards/00001-.*parquet", kind, times=1000)
    reader = CacheReader.open(bucket.cache, copies=copies)
    with pytest.raises((CorruptShard, StorageError), match="00001"):
        reader.read([3])
    assert [path.name for path in copies.folder.glob("*00001*")] == []
    fault.times = 0
    assert reader.read([3])[0].example_id == "toy-3"
    tried(fault.met, f"downloads: {kind}")


def test_an_object_of_another_size_is_not_downloaded(toy, bucket, copies):
    """A stranger's record of 4 kB may name an object of a terabyte."""
    toy.build(bucket.cache)
    victim = next(name for name in bucket.objects() if name.startswith("shards/00001-"))
    bucket.client.put_object(Bucket=bucket.name, Key=f"some/cache/{victim}", Body=bytes(1 << 20))
    with pytest.raises(CorruptShard, match=f"it has {1 << 20} bytes, its commit record says"):
        CacheReader.open(bucket.cache, copies=copies).read([3])
    assert not [path for method, path in bucket.proxy.seen if method == "GET" and victim in path]


@pytest.mark.promise(promised.TORN)
def test_repair_in_an_object_store(toy, bucket, copies, tried):
    toy.build(bucket.cache)
    before = bucket.objects()
    victim = next(name for name in before if name.startswith("shards/00001-"))
    bucket.client.put_object(Bucket=bucket.name, Key=f"some/cache/{victim}", Body=before[victim][:-1] + b"X")
    assert main(["verify", bucket.cache]) == 1
    assert main(["repair", bucket.cache]) == 0
    assert toy.writer(bucket.cache).missing() == [1]
    toy.build(bucket.cache)
    after = bucket.objects()
    aside = sorted(name for name in after if name.startswith("aside/"))
    assert aside == sorted(f"aside/{name.removeprefix('shards/')}.1" for name in (victim, "00001.json", "sealed.json"))
    assert {name: data for name, data in after.items() if name not in aside} == before
    tried(1, "altered objects repaired")


def test_what_cannot_be_reached_is_not_called_damaged(toy, bucket, copies, monkeypatch):
    toy.build(bucket.cache)
    fault = bucket.fail("GET", "manifest", "lose the request", times=1000)
    with pytest.raises(StorageError, match=r"reading manifest\.json failed"):
        CacheReader.open(bucket.cache, copies=copies)
    fault.times = 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="Could not connect"):
        CacheReader.open(bucket.cache, copies=copies)


def test_urls_that_cannot_be_served(toy, bucket, monkeypatch, capsys):
    for url, words in (("s3://no-such-bucket-here/x", "bucket does not exist"), ("zzz://a/b", "Protocol not known")):
        with pytest.raises(StorageError, match=words):
            toy.writer(url)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    assert main(["verify", bucket.cache]) == 2
    assert "pip install 'logitbank[s3]'" in capsys.readouterr().err


def test_names_of_folders_are_not_files(bucket):
    """Some tools put an object where a folder would be; listing passes over it."""
    store = ObjectStore(bucket.cache)
    for key in ("some/cache/", "some/cache/shards/", "some/cache/shards/00000.json"):
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"" if key.endswith("/") else b"x")
    assert store.listing("shards") == {"00000.json": 1}
    assert store.listing() == {"shards": -1}


def test_a_copy_that_a_disk_has_altered_is_fetched_again(toy, bucket, copies):
    """Found out by each process that uses it first; what lies in the bucket is sound."""
    toy.build(bucket.cache)
    CacheReader.open(bucket.cache, copies=copies).read([3])
    (copy,) = copies.folder.glob("00001-*")
    whole = copy.read_bytes()
    copy.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert CacheReader.open(bucket.cache, copies=copies).read([3])[0].example_id == "toy-3"
    assert copy.read_bytes() == whole


def test_a_file_system_of_folders_by_url(toy, tmp_path):
    """What SFTP and its like are: folders are made, and a claim that was left behind stops nobody."""
    url, writer = f"local://{tmp_path}/cache", toy.writer(f"local://{tmp_path}/cache")
    assert not writer.exclusive and writer.claim(0)
    toy.commit(writer, 1)
    again = toy.writer(url)
    again._claims._me = {"host": "elsewhere", "pid": 7}
    again._store.age_s = lambda name: float("inf")  # as where a store does not tell
    assert again.missing() == [0, 2] and again.claim(0)
    toy.build(url)
    assert verify(url).complete
