"""Prediction files: what is written is read back, what belongs to something else is not found, damage is named."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import atomic
from pipeline.errors import RunError
from pipeline.run_dir import RunDir
from pipeline.tasks import Example
from stage3_eval import predictions
from stage3_eval.predictions import Prediction, PredictionFile

IDENTITY = {"adapter": "ab", "engine": "hf"}
PREDICTION = Prediction("test/1", "gsm8k", "0123", "#### 4", 5, True)
LINES = st.lists(
    st.builds(
        Prediction,
        id=st.text(max_size=8),
        task=st.just("gsm8k"),
        prompt=st.text("0123456789abcdef", min_size=16, max_size=16),
        prediction=st.text(),
        tokens=st.integers(1, 500),
        finished=st.booleans(),
    ),
    unique_by=lambda p: p.id,
    max_size=5,
)


def empty(folder, identity=IDENTITY) -> PredictionFile:
    path = predictions.path_of(RunDir(folder), "toy", "sft@2", "test", identity)
    return predictions.load(path, identity)


@given(first=LINES, second=LINES)
def test_what_is_saved_is_read_back_and_can_be_added_to(tmp_path_factory, first, second):
    file = empty(tmp_path_factory.mktemp("p"))
    file = predictions.save(file, first, {"host": "here"})
    file = predictions.save(file, second, {"host": "here"})
    again = predictions.load(file.path, IDENTITY)
    assert again == file
    assert again.predictions == {p.id: p for p in [*first, *second]}
    assert again.provenance == {"host": "here"}
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]  # no temporary file stays


def test_the_name_changes_with_the_identity(tmp_path):
    saved = predictions.save(empty(tmp_path), [PREDICTION], {})
    assert saved.path.name.startswith("test-")
    assert empty(tmp_path).predictions == {"test/1": PREDICTION}
    assert empty(tmp_path, {**IDENTITY, "adapter": "cd"}).predictions == {}


def test_a_prediction_of_another_prompt_is_not_taken(tmp_path):
    example = Example("test/1", "gsm8k", "2+2?", "#### 4")
    shot = Example("train/1", "gsm8k", "1+1?", "#### 2")
    bare, shown = predictions.prompt_digest(example), predictions.prompt_digest(example, [shot])
    assert bare != shown != predictions.prompt_digest(example, [shot, shot])
    made = Prediction("test/1", "gsm8k", bare, "#### 4", 5, True)
    file = predictions.save(empty(tmp_path), [made], {})
    assert file.of(example, bare) == made
    assert file.of(example, shown) is None


def test_a_prediction_that_weighed_other_labels_is_not_taken(tmp_path):
    """As many, but others; an example without labels has the digest it always had."""
    example = Example("test/1", "anli", "so?", "yes", labels=("yes", "no"))
    digest = predictions.prompt_digest(example)
    made = Prediction("test/1", "anli", digest, "yes", 2, True, label_logprobs=(-1.0, -2.0))
    file = predictions.save(empty(tmp_path), [made], {})
    assert file.of(example, digest) == made
    other = Example("test/1", "anli", "so?", "yes", labels=("yes", "maybe"))
    assert file.of(other, predictions.prompt_digest(other)) is None
    assert predictions.prompt_digest(Example("test/1", "gsm8k", "2+2?", "4")) == "697603732fad8e82"


def test_the_newest_is_found_whatever_wrote_it(tmp_path):
    assert predictions.newest(RunDir(tmp_path), "toy", "sft@2", "test") is None
    old = predictions.save(empty(tmp_path), [PREDICTION], {})
    new = predictions.save(empty(tmp_path, {**IDENTITY, "adapter": "cd"}), [PREDICTION], {})
    os.utime(old.path, (1, 1))
    assert predictions.newest(RunDir(tmp_path), "toy", "sft@2", "test") == new
    assert predictions.kept_conditions(RunDir(tmp_path), "toy") == ["sft@2"]


def damaged(data: bytes, how: str) -> bytes:
    import zstandard

    lines = zstandard.decompress(data).split(b"\n")
    if how == "truncated":
        return data[:-7]
    if how == "not compressed":
        return b"\n".join(lines)
    changed = {
        "a line less": [lines[0], b""],
        "a line cut": [lines[0], lines[1][:20], b""],
        "another header": [b'{"format": "x"}', *lines[1:]],
        "another identity": [lines[0].replace(b'"ab"', b'"zz"'), *lines[1:]],
        "a field more": [lines[0], lines[1].replace(b"{", b'{"x": 1, '), b""],
        "nothing": [b""],
    }[how]
    return zstandard.compress(b"\n".join(changed))


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "not compressed",
        "a line less",
        "a line cut",
        "another header",
        "another identity",
        "a field more",
        "nothing",
    ],
)
def test_damage_is_named_with_the_way_out(tmp_path, how):
    file = predictions.save(empty(tmp_path), [PREDICTION], {})
    file.path.write_bytes(damaged(file.path.read_bytes(), how))
    with pytest.raises(RunError, match=r"remove it .* it is generated again"):
        empty(tmp_path)


def test_a_file_in_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "predictions").write_text("")
    with pytest.raises(RunError, match="cannot be written: Not a directory"):
        predictions.save(empty(tmp_path), [PREDICTION], {})


def test_a_temporary_file_of_a_live_process_stays_and_a_dead_ones_goes(tmp_path):
    """Two calls may score one checkpoint at once: sweeping the other's file made it end with an error."""
    file = empty(tmp_path)
    file.path.parent.mkdir(parents=True)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    temporary = file.path.parent / f".tmp-{other.pid}-ab-{file.path.name}"
    temporary.write_text("half")
    predictions.save(file, [PREDICTION], {})
    assert temporary.exists()
    other.kill()
    other.wait()
    predictions.save(file, [PREDICTION], {})
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]


@pytest.mark.parametrize("sweeps", [1, 2, 3])
def test_a_file_swept_by_another_machine_is_written_again(tmp_path, monkeypatch, sweeps):
    """It cannot tell whether we live. Swept in the moment before the file gets its name; thrice is told."""
    file, real, swept = empty(tmp_path), atomic._write, []

    def write(path, data):
        real(path, data)
        if len(swept) < sweeps:
            swept.append(path)
            path.unlink()

    monkeypatch.setattr(atomic, "_write", write)
    if sweeps == 3:
        with pytest.raises(RunError, match="cannot be written: No such file"):
            predictions.save(file, [PREDICTION], {})
    else:
        predictions.save(file, [PREDICTION], {})
        assert empty(tmp_path).predictions == {"test/1": PREDICTION}
    assert len(swept) == sweeps
