"""A folder is handed over whole or not at all, and pushed to a stand-in for the Hub that checks what arrives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import Hub

from pipeline.errors import RunError
from pipeline.handover import whole_folder

ROOT = Path(__file__).parent.parent.parent
PUSH = """
import sys
from pathlib import Path
from pipeline.cli import guarded
from pipeline.handover import push
folder, repo, kind, private = sys.argv[1:]
sys.exit(guarded(lambda _: print(push(Path(folder), repo, kind=kind, private=private == "private")) or 0))
"""


def pushed(folder, repo, environment, kind="model", private=""):
    command = [sys.executable, "-c", PUSH, str(folder), repo, kind, private]
    environment = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def folder(tmp_path):
    """Something small and something in the Hub's large storage, one of it in a folder below."""
    with whole_folder(tmp_path / "made") as made:
        (made / "shards").mkdir()
        (made / "README.md").write_text("---\ntags:\n- logitbank\n---\n\n# Text\n", encoding="utf-8")
        (made / "config.json").write_text(json.dumps({"a": 1}), encoding="utf-8")
        (made / "model.safetensors").write_bytes(bytes(range(256)) * 100)
        (made / "shards" / "0.safetensors").write_bytes(b"other" * 1000)
    return tmp_path / "made"


def test_a_folder_is_there_when_all_of_it_is(tmp_path):
    with whole_folder(tmp_path / "a" / "to") as made:
        (made / "file").write_text("x", encoding="utf-8")
        assert not (tmp_path / "a" / "to").exists()
    assert (tmp_path / "a" / "to" / "file").read_text(encoding="utf-8") == "x"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["to"]


def test_nothing_is_left_of_a_folder_that_failed(tmp_path):
    with pytest.raises(RunError, match="nothing of it was kept"), whole_folder(tmp_path / "to") as made:
        (made / "file").write_text("x", encoding="utf-8")
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "to") as made:
        (made / "file").write_text("x", encoding="utf-8")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken_a_full_one_never(tmp_path):
    (tmp_path / "to").mkdir()
    with whole_folder(tmp_path / "to") as made:
        (made / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RunError, match=r"found 1 files in it \(file\)"), whole_folder(tmp_path / "to"):
        raise AssertionError("never reached")
    with pytest.raises(RunError, match="found a file"), whole_folder(tmp_path / "to" / "file"):
        raise AssertionError("never reached")
    assert (tmp_path / "to" / "file").read_text(encoding="utf-8") == "x"


def test_a_folder_that_somebody_fills_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(RunError, match="nothing of it was kept"), whole_folder(tmp_path / "to") as made:
        (made / "file").write_text("ours", encoding="utf-8")
        (tmp_path / "to").mkdir()
        (tmp_path / "to" / "file").write_text("theirs", encoding="utf-8")
    assert (tmp_path / "to" / "file").read_text(encoding="utf-8") == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


@pytest.mark.parametrize(("kind", "private"), [("model", ""), ("dataset", "private")])
def test_all_of_a_folder_arrives(folder, kind, private):
    with Hub() as hub:
        for _ in range(2):  # into the repository that is there already, too
            done = pushed(folder, "me/thing", hub.environment("hf_writes"), kind, private)
            assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip() == f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}me/thing"
        assert hub.repos == {(kind, "me/thing"): bool(private)}
        sent = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert hub.files[kind, "me/thing"] == sent and len(sent) == 4
        assert sum(method == "PUT" for method, _ in hub.requests) >= 2, "large files go through LFS"


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        ("hf_wrong", "me/thing", "does not know you (401); set HF_TOKEN"),
        ("hf_reads", "me/thing", "does not let you write there (403)"),
        ("hf_writes", "others/thing", "has no such place (404)"),
        ("hf_writes", "me/a thing", "no upload to"),
    ],
)
def test_a_refusal_says_what_to_do(folder, token, repo, words):
    with Hub() as hub:
        done = pushed(folder, repo, hub.environment(token))
        assert not any(hub.files.values())
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert words in done.stderr and "is written and kept; to upload it: hf upload" in done.stderr


def test_what_is_to_be_private_never_goes_where_everybody_reads(folder):
    """Neither into a public repository nor, by the command that is named, into a new one that would be public."""
    with Hub() as hub:
        environment = hub.environment("hf_writes")
        hub.repos["model", "me/thing"], hub.files["model", "me/thing"] = False, {}
        done = pushed(folder, "me/thing", environment, private="private")
        assert hub.files["model", "me/thing"] == {} and not any(method == "PUT" for method, _ in hub.requests)
        assert done.returncode == 2 and "everybody can read it, so nothing was uploaded" in done.stderr
        assert pushed(folder, "me/thing", environment).returncode == 0, "the control"
        assert len(hub.files["model", "me/thing"]) == 4
    for private in ("private", ""):
        failed = pushed(folder, "me/other", environment, private=private)  # the server is gone
        assert ("--repo-type model --private" in failed.stderr) == bool(private)


def test_no_network_is_no_traceback(folder):
    with Hub() as hub:
        environment = hub.environment("hf_writes")
    done = pushed(folder, "me/thing", environment)  # the server is gone
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"no upload to {environment['HF_ENDPOINT']}" in done.stderr
    offline = pushed(folder, "me/thing", environment | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 2 and "Traceback" not in offline.stderr and "offline" in offline.stderr.lower()
