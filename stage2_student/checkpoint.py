"""A checkpoint: a folder that is either whole or not there. Called by `train` (save, load) and by `arms` (newest).

    step-000200/
      adapter_config.json  adapter_model.safetensors     peft's own format, which peft and vLLM load
      optimizer.safetensors                              AdamW's moments: <parameter>.exp_avg, <parameter>.exp_avg_sq
      state.json                                         written last; without it there is no checkpoint

Written under a temporary name, flushed to disk, renamed. No pickle: torch.load is never called. What else a resumed
run needs is a pure function of the step: the order of examples, the learning rate and every random draw.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schema.atomic import flush
from pipeline.errors import RunError

if TYPE_CHECKING:
    import torch

ADAPTER, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
_TEMPORARY = ".tmp-"


def complete_steps(checkpoints: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, in order."""
    found = (re.fullmatch(r"step-(\d{6,})", path.parent.name) for path in checkpoints.glob(f"step-*/{STATE}"))
    return sorted(int(match[1]) for match in found if match)


def save(
    folder: Path,
    step: int,
    model: Any,
    parameters: "Mapping[str, torch.nn.Parameter]",
    optimizer: "torch.optim.Optimizer",
    notes: Mapping[str, Any],
) -> None:
    """Write the checkpoint after `step` optimizer steps; `notes` go into state.json.

    Raises RunError, with nothing of it left behind, when the disk refuses.
    """
    from safetensors.torch import save_file

    temporary = folder.parent / f"{_TEMPORARY}{folder.name}-{os.getpid()}"
    with storage_errors(folder, f"saving the checkpoint of step {step}"):
        try:
            temporary.mkdir(parents=True)
            model.save_pretrained(str(temporary), save_embedding_layers=False)
            (temporary / "README.md").unlink(missing_ok=True)  # peft's model card, an empty form
            moments = {f"{n}.{m}": optimizer.state[p][m].cpu() for n, p in parameters.items() for m in MOMENTS}
            save_file(moments, temporary / OPTIMIZER)
            sha256 = {name: _sha256(temporary / name) for name in (ADAPTER, OPTIMIZER)}
            state = {"step": step, "adapter_sha256": sha256[ADAPTER], "optimizer_sha256": sha256[OPTIMIZER], **notes}
            (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            for path in (*sorted(temporary.iterdir()), temporary):
                flush(path)
            temporary.rename(folder)
            flush(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def drop_between(checkpoints: Path, save_every: int, before: int) -> None:
    """Remove the checkpoints before a step that are no multiples of `save_every`: runs that were stopped left them to
    go on from, and a run that was not has none."""
    for step in complete_steps(checkpoints):
        if step < before and step % save_every:
            folder = checkpoints / f"step-{step:06d}"
            with storage_errors(folder, f"removing the checkpoint of step {step}"):
                gone = folder.rename(checkpoints / f"{_TEMPORARY}{folder.name}-{os.getpid()}")  # whole, or not there
                shutil.rmtree(gone)


def load(
    folder: Path,
    model: Any,
    parameters: "Mapping[str, torch.nn.Parameter]",
    optimizer: "torch.optim.Optimizer",
) -> int:
    """Put a checkpoint into the model's adapter and the optimizer; its step.

    Raises RunError naming the file when it is damaged or belongs to another adapter.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        for name, sha256 in ((ADAPTER, state["adapter_sha256"]), (OPTIMIZER, state["optimizer_sha256"])):
            if _sha256(folder / name) != sha256:
                raise ValueError(f"{name} is not what was written (its SHA-256 differs from {STATE})")
        step = int(state["step"])
        moments = load_file(folder / OPTIMIZER)
        loaded: Any = set_peft_model_state_dict(model, load_file(folder / ADAPTER))
        if loaded.unexpected_keys or set(parameters) & set(loaded.missing_keys):
            raise ValueError(f"{ADAPTER} holds other tensors than this adapter has")
        for name, parameter in parameters.items():
            optimizer.state[parameter] = {"step": torch.tensor(float(step))}
            for moment in MOMENTS:
                optimizer.state[parameter][moment] = moments[f"{name}.{moment}"].to(parameter.device)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"checkpoint {folder} cannot be used: {error or type(error).__name__}\n"
            f"  next: remove it (rm -r {shlex.quote(str(folder))}) and run the same command: it goes on from the "
            "checkpoint before"
        ) from None
    return step


def sweep(folder: Path) -> None:
    """Remove what a killed process left half written in a folder."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # where nothing may be removed, what matters cannot be written either
                path.unlink()


@contextmanager
def storage_errors(where: Path, doing: str) -> Iterator[None]:
    """Turn what the file system refuses into a RunError that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        folder = next(path for path in (where, *where.parents) if path.is_dir())
        free_mb = shutil.disk_usage(folder).free / 1e6
        raise RunError(
            f"{doing} failed: {getattr(error, 'strerror', None) or error} ({where}; {free_mb:.0f} MB free there)\n"
            "  next: make room, or set run_dir=<folder>, and run the same command: it goes on from the last checkpoint"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
