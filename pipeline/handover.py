"""Handing over: a folder that is whole or not there, and its way to the Hub.

Called by `python -m stage2_student.export` (a student) and by `pipeline.cache_card` (a cache).
"""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache_schema.atomic import flush
from pipeline.errors import RunError, first_line


@contextmanager
def whole_folder(to: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `to` at the end, all of it or, where anything fails, nothing of it.

    Raises RunError where `to` is there already and not an empty folder, or the disk refuses.
    """
    from safetensors import SafetensorError

    check_empty(to)
    temporary = to.parent / f".tmp-{to.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        folders = [path for path in temporary.rglob("*") if path.is_dir()]
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in files:
            path.chmod(0o644)  # safetensors makes its own for the owner alone
        for path in (*sorted(files), *sorted(folders, reverse=True), temporary):
            flush(path)
        temporary.rename(to)  # over an empty folder too, never over one that somebody has filled meanwhile
        flush(to.parent)
    except (OSError, SafetensorError) as error:
        there = next(path for path in to.parents if path.is_dir())
        raise RunError(
            f"writing {to} failed: {getattr(error, 'strerror', None) or error} "
            f"({shutil.disk_usage(there).free / 1e6:.0f} MB free there); nothing of it was kept\n"
            "  next: make room, or choose another folder: --to FOLDER"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_empty(to: Path) -> None:
    """Raise RunError unless `to` is free to be written: not there, or an empty folder."""
    if not to.exists():
        return
    if not to.is_dir():
        raise RunError(f"--to {to}: found a file, expected a folder that is empty or not there; choose another")
    try:
        found = sorted(path.name for path in to.iterdir())
    except OSError as error:
        raise RunError(f"--to {to}: it cannot be looked into: {error.strerror}; choose another") from None
    if found:
        raise RunError(
            f"--to {to}: found {len(found)} files in it ({', '.join(found[:3])}{', ...' if found[3:] else ''}), "
            "expected a folder that is empty or not there; nothing is ever written over: choose another"
        )


class _Public(Exception):
    """Private was asked for, and the repository is not."""


def push(folder: Path, repo: str, *, kind: str = "model", private: bool = False) -> str:
    """Upload a folder to a repository of the Hub, made where there is none; its address.

    kind: `model` or `dataset`. private: nothing goes to a repository that is there already and public. The token is
    huggingface_hub's own: HF_TOKEN, else that of `hf auth login`. The Hub is HF_ENDPOINT, where that is set. Raises
    RunError, with the command that tries the upload again, where it fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        made = api.create_repo(repo, repo_type=kind, private=private or None, exist_ok=True)
        if private and not api.repo_info(made.repo_id, repo_type=kind).private:
            raise _Public
        api.upload_folder(repo_id=repo, folder_path=str(folder), repo_type=kind, commit_message="Upload, with its card")
    except _Public:
        raise RunError(
            f"--private: {repo} is there already and everybody can read it, so nothing was uploaded; make it private "
            f"in its settings, choose another name, or leave --private out\n  {folder} is written and kept"
        ) from None
    except Exception as error:  # whatever the Hub, the network and the clients of both make of it
        again = ["hf", "upload", repo, str(folder), ".", "--repo-type", kind, *(["--private"] if private else [])]
        raise RunError(
            f"--push {repo}: {_refusal(error, repo, api.endpoint)}\n"
            f"  {folder} is written and kept; to upload it: {shlex.join(again)}"
        ) from None
    return f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo}"


def _refusal(error: Exception, repo: str, endpoint: str) -> str:
    """What went wrong, for people."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"{endpoint} does not know you (401); set HF_TOKEN to a token that may write, or run hf auth login"
    if status == 403:
        return f"{endpoint} does not let you write there (403); set HF_TOKEN to a token that may write to {repo}"
    if status == 404:
        return f"{endpoint} has no such place (404), or hides it from you; check the name's owner, and HF_TOKEN"
    if status is not None:
        return f"{endpoint} answers {status}: {first_line(error)}"
    return f"no upload to {endpoint}: {first_line(error) or type(error).__name__}"
