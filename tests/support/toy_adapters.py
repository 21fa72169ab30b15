"""Toy adapters for tests: random LoRA weights on a tiny model, in the files that stage 2 leaves and stage 3 reads."""

import hashlib
import json
import warnings
from pathlib import Path

from pipeline.run_dir import RunDir


def write_adapter(folder: Path, model: Path, seed: int) -> str:
    """A random LoRA adapter of a tiny model, in peft's format; the SHA-256 of its weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    transposed = base.config.model_type == "gpt2"  # its Conv1D keeps weights as [in, out]
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=transposed
    )
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


def write_checkpoint(run_dir: RunDir, run: str, step: int, model: Path, seed: int, student: str = "toy") -> Path:
    """What stage 2 leaves of a step that stage 3 reads. run: an arm, or one of its repeats."""
    folder = run_dir.arm(student, run)
    checkpoint = folder.checkpoint(step)
    sha256 = write_adapter(checkpoint, model, seed)
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "adapter_sha256": sha256}))
    if not folder.identity.exists():
        folder.identity.write_text(json.dumps({"cache": "f" * 64}))
    with folder.metrics.open("a") as metrics:
        for s in range(step - 1, step + 1):
            metrics.write(json.dumps({"step": s, "loss": 2.0 / s, "ce": 2.0 / s}) + "\n")
    return checkpoint
