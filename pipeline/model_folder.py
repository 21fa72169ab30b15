"""What a folder with a model or an adapter may hold, looked at before transformers, peft or vLLM see it.

They read a folder's own words on where its weights lie, which code it needs and which adapter it is. A folder may come
from anyone, so only weights beside it in safetensors are taken, and an adapter that is plain LoRA. Called by `models`
and by the stages that load adapters.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache_schema.errors import shown
from pipeline.errors import ModelError

INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# What decides a plain LoRA adapter. Of all else that peft knows, each at its own default: some of it names modules to
# import (megatron_core), other weights to load, or layers to copy any number of times.
_OF_LORA = {"r", "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out"}
_SAYS_NOTHING = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type"}
_DEFAULTS = {
    "peft_type": "LORA",
    "bias": "none",
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}
MOST_RANK = 4096  # of a LoRA adapter: two matrices of so many columns for each that it adapts
MOST_ALPHA = 2**20
_MAX_DEPTH = 64


def check_model(folder: Path) -> None:
    """Raise ModelError unless a model can be loaded from this folder without reading or running anything else."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {folder}: expected a folder written by save_pretrained, found no config.json")
    if (folder / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"model {folder}: found {ADAPTER_CONFIG}, so it is an adapter that names another model; "
            "give a whole model (merge the adapter first), or remove that file"
        )
    config = _object(folder / "config.json")
    for place, name in _kernels(config, "config.json"):
        raise ModelError(f"model {folder}: {place} is {shown(name)}, code of the Hub; remove it from config.json")
    index = folder / INDEX
    if not index.exists():
        return
    names = _object(index).get("weight_map")
    if not isinstance(names, dict):
        raise ModelError(f"{index}: found no weight_map; save the model again")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: weight_map names {shown(name)}, expected safetensors files of the same folder")


def check_adapter(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder. Raises ModelError unless it is a plain LoRA adapter."""
    path = folder / ADAPTER_CONFIG
    config = _object(path)
    for name, value in config.items():
        if name in _OF_LORA or name in _SAYS_NOTHING or value == _DEFAULTS.get(name, ...):
            continue
        if name in _DEFAULTS or not (value is None or value is False or value == {}):
            raise ModelError(
                f"{path}: {shown(name)} is {shown(value)}; only plain LoRA adapters are loaded: train it again as one"
            )
    targets = config.get("target_modules")
    listed = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if config.get("peft_type") != "LORA" or not (listed or targets == "all-linear"):
        raise ModelError(f"{path}: expected a LoRA adapter with a list of target_modules; found {shown(targets)}")
    for name, least, most in (("r", 1, MOST_RANK), ("lora_alpha", 0, MOST_ALPHA), ("lora_dropout", 0, 1)):
        value = config.get(name, least)
        if type(value) not in ((int,) if name == "r" else (int, float)) or not least <= value <= most:
            raise ModelError(f"{path}: {name} is {shown(value)}, expected {least} to {most}")
    return config


def _kernels(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Where a config asks for an implementation of the Hub's: an owner, a slash and a name."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        here = f"{place}: {shown(name)}"
        if "_implementation" in str(name) and "/" in str(part):
            yield here, part
        yield from _kernels(part, here)


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: it cannot be read: {error}") from None
    level: list[Any] = [[value]]
    for _ in range(_MAX_DEPTH):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
    if level:
        raise ModelError(f"{path}: it has lists or objects more than {_MAX_DEPTH} deep in each other")
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected an object, found a {type(value).__name__}")
    return value
