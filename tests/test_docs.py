"""The pages are right: what they say is done, block by block, in a copy of the packages.

```python NAME        is a file of that name; ```python without one is run, and so are ```sh and ```diff (by `patch`).
```text               behind a block that was run: each of its lines must stand in what that block printed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cache_schema", "pipeline", "stage1_teacher", "stage2_student", "stage3_eval")
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = ("pipeline/tasks/NEW_TASK.md", "stage1_teacher/NEW_ENGINE.md", "stage2_student/NEW_LOSS.md")


@pytest.fixture
def house(tmp_path):
    """A folder with a copy of the packages: pages write files and change others."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def follow(page, house):
    """Do what a page says in `house`; how many blocks of each kind were done."""
    done, printed = {}, ""
    for kind, name, text in BLOCK.findall(page):
        done[kind] = done.get(kind, 0) + 1
        if kind == "text":
            for line in text.splitlines():
                assert line in printed, f"the page shows {line!r}, found:\n{printed}"
        elif name:
            (house / name).write_text(text, encoding="utf-8")
        elif kind == "diff":
            printed = changed(text, house)
        elif kind in ("sh", "python"):
            command = ["bash", "-euo", "pipefail", "-c", text] if kind == "sh" else ["python", "-c", text]
            printed = ran(command, house)
    return done


def ran(command, house):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(house), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def changed(diff, house):
    """Apply a page's diff. Its hunks have no line numbers: each is found by its context, which must be there once."""
    path = None
    for part in re.split(r"^(\+\+\+ b/\S+|@@)$", diff, flags=re.MULTILINE):
        if part.startswith("+++ b/"):
            path = house / part.removeprefix("+++ b/")
        elif path is not None and part.strip("\n") and part != "@@" and not part.lstrip("\n").startswith("--- a/"):
            lines = [line for line in part.strip("\n").split("\n") if not line.startswith("--- a/")]
            before = "\n".join(line[1:] for line in lines if line[:1] in " -") + "\n"
            after = "\n".join(line[1:] for line in lines if line[:1] in " +") + "\n"
            found = path.read_text(encoding="utf-8")
            assert found.count(before) == 1, f"{path.name}: expected once, found {found.count(before)} times:\n{before}"
            path.write_text(found.replace(before, after), encoding="utf-8")
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_followed_to_its_end(page, house):
    done = follow((ROOT / page).read_text(encoding="utf-8"), house)
    assert done["sh"] and done["python"] and done["text"]


@pytest.mark.parametrize(
    "broken",
    [
        "```python\nassert 1 + 1 == 3\n```\n",
        "```sh\nfalse\necho done\n```\n",
        "```sh\necho one\n```\n\n```text\ntwo\n```\n",
        "```diff\n--- a/pipeline/cli.py\n+++ b/pipeline/cli.py\n@@\n no such line\n+new\n```\n",
    ],
)
def test_a_page_that_is_wrong_would_be_noticed(broken, tmp_path):
    (tmp_path / "pipeline").mkdir()
    shutil.copy(ROOT / "pipeline/cli.py", tmp_path / "pipeline/cli.py")
    with pytest.raises(AssertionError):
        follow(broken, tmp_path)


def test_links_between_pages_lead_somewhere():
    """Relative links of every page that the repository has."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "benchmarks").glob("*.md")]
    pages += [page for package in PACKAGES for page in (ROOT / package).rglob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))]
    local = [(page, link) for page, link in links if not re.match(r"\w+:", link)]
    assert len(local) > 20
    assert not [f"{page.name}: {link}" for page, link in local if not (page.parent / link).exists()]
