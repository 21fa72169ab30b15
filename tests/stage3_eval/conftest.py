"""A tiny trained run for the tests of stage 3: a real model and real adapters, random, on disk."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
import toys

from pipeline.recipe import Recipe, load_recipe
from pipeline.run_dir import RunDir


def write_adapter(folder: Path, model: Path, seed: int) -> str:
    """A random LoRA adapter of a tiny model, in peft's format; the SHA-256 of its weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def write_checkpoint(run_dir: RunDir, arm: str, step: int, model: Path, seed: int) -> Path:
    """What stage 2 leaves of a step that stage 3 reads."""
    folder = run_dir.arm("toy", arm)
    checkpoint = folder.checkpoint(step)
    sha256 = write_adapter(checkpoint, model, seed)
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "adapter_sha256": sha256}))
    if not folder.identity.exists():
        folder.identity.write_text(json.dumps({"cache": "f" * 64}))
    with folder.metrics.open("a") as metrics:
        for s in range(step - 1, step + 1):
            metrics.write(json.dumps({"step": s, "loss": 2.0 / s, "ce": 2.0 / s}) + "\n")
    return checkpoint


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with a tiny recipe, its rows, and two checkpoints of each arm. Do not write to it: copy it."""
    root = tmp_path_factory.mktemp("trained")
    recipe = load_recipe(str(toys.tiny_recipe(root)))
    for arm, seed in (("sft", 10), ("distill", 20)):
        for step in (2, 4):
            write_checkpoint(RunDir.of(recipe), arm, step, root / "model", seed + step)
    return root


@pytest.fixture
def run(trained, tmp_path) -> "TinyRun":
    """A copy of the trained run that a test may change; its recipe reads the shared model and rows."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return TinyRun(trained, tmp_path / "run")


class TinyRun:
    """The recipe file of the shared run with a run folder of its own."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.model, self.folder = root / "model", folder
        self.arguments = ["--recipe", str(root / "recipe.yaml"), "--set", f"run_dir={folder}"]

    def sets(self, *overrides: str) -> list[str]:
        """The command line's arguments with some more overrides."""
        return [*self.arguments, *(part for override in overrides for part in ("--set", override))]

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(self.arguments[1], [f"run_dir={self.folder}", *overrides])
