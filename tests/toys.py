"""Toy objects for tests: a tokenizer, a model and a recipe, real but tiny, written to disk in well under a second.

    import toys
    toys.tiny_tokenizer(folder)                       # byte-level BPE, about 300 tokens, reads any text
    toys.tiny_qwen3(folder, vocab_size=320)           # Qwen3 architecture, random weights from a seed
    path = toys.tiny_recipe(tmp_path, train={"steps": 3}, cache={"top_k": 8})
    recipe = load_recipe(str(path))                   # its model and its rows are already on disk

Only a folder's content depends on the arguments, so two calls with the same ones give the same bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gus", "Hana")
THINGS = ("pears", "coins", "books", "shells", "stamps")

# A chat template of the usual shape with the thinking switch: off writes an empty thought into the prompt.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """`count` raw rows in GSM8K's form, each another sum; rows from another `start` share no question."""
    made = []
    for i in range(start, start + count):
        a, b = 2 + i % 7, 3 + i % 11
        name, thing = NAMES[i % len(NAMES)], THINGS[i % len(THINGS)]
        made.append(
            {
                "question": f"{name} has {a} {thing} and finds {b} more on day {i}. How many {thing} now?",
                "answer": f"{name} has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {thing}.\n#### {a + b}",
            }
        )
    return made


def write_jsonl(path: Path, lines: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def tiny_tokenizer(folder: Path, *, vocab_size: int = 320, chat: bool = False) -> Any:
    """A byte-level BPE tokenizer trained on the toy rows, saved to `folder` and returned.

    Without `chat` it has no template (plain layout) and ends with <|eos|>; with it the template above, whose turns
    end with <|end|>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|eos|>", "<|pad|>", "<|start|>", "<|end|>"],
    )
    core.train_from_iterator([text for row in rows(40) for text in row.values()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|eos|>", pad_token="<|pad|>")
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def tiny_qwen3(
    folder: Path, vocab_size: int = 320, hidden: int = 32, layers: int = 2, seed: int = 0, **config: Any
) -> Path:
    """A Qwen3 decoder with random float32 weights, saved to `folder`. Further keywords go to its config.

    The weights are drawn with a standard deviation of 0.3, so that its distributions are far from uniform.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": max(hidden // 4, 2),
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    } | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**settings))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    return folder


def tiny_recipe(tmp_path: Path, **overrides: Any) -> Path:
    """A recipe file of one small gsm8k-like task, teacher and student the same tiny model; its path.

    Writes `tmp_path`/{model, data/gsm8k/{train,test}.jsonl, recipe.yaml}; what is already there is kept. Overrides are
    sections, merged key by key: `tiny_recipe(tmp_path, train={"steps": 3}, arms={"kl": {"kl": 1.0}})` adds an arm;
    None as the value of a key in `students` or `arms` takes it out.
    """
    model, data = tmp_path / "model", tmp_path / "data"
    if not model.exists():
        tiny_tokenizer(model)
        tiny_qwen3(model)
    if not (data / "gsm8k").exists():
        write_jsonl(data / "gsm8k" / "train.jsonl", rows(24))
        write_jsonl(data / "gsm8k" / "test.jsonl", rows(8, start=100))
    tree: dict[str, Any] = {
        "name": "tiny",
        "data": {"tasks": {"gsm8k": {}}, "dir": str(data)},
        "teacher": {"model": str(model), "dtype": "float32", "shots": 2},
        "cache": {"dir": str(tmp_path / "cache"), "top_k": 16, "shard_examples": 8},
        "students": {"toy": {"model": str(model), "dtype": "float32", "lora": {"r": 4, "alpha": 8}}},
        "train": {
            "steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "lr": 1.0e-3,
            "warmup_steps": 1,
            "save_every": 2,
        },
        "arms": {"sft": {"ce": 1.0}, "distill": {"ce": 1.0, "logit_mse": 0.5}},
        "eval": {"max_new_tokens": 16, "batch_size": 4},
        "runtime": {"device": "cpu"},
        "run_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(_merged(tree, overrides), sort_keys=False), encoding="utf-8")
    return path


def _merged(tree: Mapping[str, Any], overrides: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """`tree` with `overrides` laid over it; a None inside a section takes a mapping out."""
    merged = dict(tree)
    for key, value in overrides.items():
        old = merged.get(key)
        if depth and value is None and isinstance(old, Mapping):
            del merged[key]
        elif isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = _merged(old, value, depth + 1)
        else:
            merged[key] = value
    return merged
