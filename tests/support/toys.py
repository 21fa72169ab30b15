"""Toy objects for tests: a tokenizer, a model and a recipe, real but tiny, written to disk in well under a second.

    import toys
    toys.tiny_tokenizer(folder)                       # byte-level BPE, about 300 tokens, reads any text
    toys.tiny_qwen3(folder, vocab_size=320)           # Qwen3 architecture, random weights from a seed
    path = toys.tiny_recipe(tmp_path, train={"steps": 3}, cache={"top_k": 8})
    recipe = load_recipe(str(path))                   # its model and its rows are already on disk
    toys.fill_cache(recipe)                           # its cache, from the plain forward pass

Only a folder's content depends on the arguments, so two calls with the same ones give the same bytes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    return _saved(folder, seed, lambda: Qwen3ForCausalLM(Qwen3Config(**settings)))


def tiny_t5(folder: Path, vocab_size: int = 320, hidden: int = 32, seed: int = 0, **config: Any) -> Path:
    """An encoder-decoder of FLAN-T5's shape (gated gelu, untied head) with random float32 weights, saved to `folder`.

    `tie_word_embeddings=True` gives the first T5's shape, whose decoder scales what goes into its tied head.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": hidden,
        "d_ff": 2 * hidden,
        "d_kv": max(hidden // 4, 2),
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    } | config

    def build() -> Any:
        model: Any = T5ForConditionalGeneration(T5Config(**settings))  # which ties its head whatever the config says
        if not settings["tie_word_embeddings"]:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(torch.randn(vocab_size, hidden))
        return model

    return _saved(folder, seed, build)


def tiny_gpt2(folder: Path, vocab_size: int = 320, hidden: int = 32, seed: int = 0, **config: Any) -> Path:
    """GPT-2's architecture (Conv1D, tied head) with random float32 weights, saved to `folder`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "n_embd": hidden,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    } | config
    return _saved(folder, seed, lambda: GPT2LMHeadModel(GPT2Config(**settings)))


def tiny_gpt_neox(folder: Path, vocab_size: int = 320, hidden: int = 32, seed: int = 0, **config: Any) -> Path:
    """Pythia's architecture with random float32 weights, saved to `folder`."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    settings = _decoder(vocab_size, hidden) | {"tie_word_embeddings": False} | config
    return _saved(folder, seed, lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**settings)))


def tiny_llama(folder: Path, vocab_size: int = 320, hidden: int = 32, seed: int = 0, **config: Any) -> Path:
    """SmolLM's architecture (Llama, tied head) with random float32 weights, saved to `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = _decoder(vocab_size, hidden) | {"num_key_value_heads": 2, "tie_word_embeddings": True} | config
    return _saved(folder, seed, lambda: LlamaForCausalLM(LlamaConfig(**settings)))


def _decoder(vocab_size: int, hidden: int) -> dict[str, Any]:
    """What the configs of most decoders call alike."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _saved(folder: Path, seed: int, build: Callable[[], Any]) -> Path:
    """`folder`, with the model that `build` makes under this seed."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
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


def fill_cache(recipe: Any, edit: Callable[[Any], Any] = lambda row: row) -> Path:
    """Make and seal a recipe's cache from its teacher's plain forward pass, one unpadded example at a time; its folder.

    An independent reference: nothing of stage 1 is used. Row t is read one place before answer token t. `edit` may
    change a CacheRow before it is written, or put a QuarantinedExample in its place.
    """
    import torch

    from cache_schema.manifest import Manifest, vocabulary_sha256
    from cache_schema.schema import CacheRow
    from cache_schema.writer import CacheWriter
    from pipeline.fingerprint import Experiment
    from pipeline.models import load_causal_lm, load_seq2seq_lm, vocabulary

    experiment, cache = Experiment(recipe), recipe.cache
    load = load_seq2seq_lm if recipe.teacher.kind == "seq2seq" else load_causal_lm
    model = load(experiment.teacher_source, recipe.teacher.dtype, "none", torch.device("cpu"))
    texts = vocabulary(experiment.teacher_tokenizer, model.config.vocab_size)
    examples = experiment.training_set.cached
    manifest = Manifest.create(
        identity=experiment.identity,
        provenance={"recipe": recipe.name},
        selector=cache.selector,
        top_k=cache.top_k,
        vocab_size=model.config.vocab_size,
        temperatures=cache.temperatures,
        step=cache.step,
        store_ids=cache.store_ids,
        examples=len(examples),
        shard_examples=cache.shard_examples,
        vocabulary_sha256=vocabulary_sha256(texts),
    )
    writer = CacheWriter.open(experiment.cache_dir, manifest, texts)
    rows = []
    for example in examples:
        shots = experiment.training_set.shots.of(example)
        encoded = experiment.teacher_prompts.encode(example.prompt, example.answer, shots)
        logits_NV = answer_logits(model, encoded)
        if cache.selector == "sampled":
            u_NK = np.random.default_rng([cache.sample_seed, len(rows)]).random((len(logits_NV), cache.top_k))
            numbers = drawn(logits_NV, u_NK, cache.temperatures)
        else:
            numbers = top_k(logits_NV, cache.top_k, cache.temperatures)
        row = CacheRow(
            example_id=example.id,
            task=example.task,
            prompt=example.prompt,
            answer=example.answer,
            answer_ids=np.array(encoded.answer_ids, np.int32),
            answer_start=encoded.answer_start,
            answer_offsets=np.array(encoded.answer_offsets, np.int32),
            status=np.zeros(len(logits_NV), np.uint8),
            **(numbers if cache.store_ids else numbers | {"token_ids": None}),
        )
        rows.append(edit(row))
    for shard in writer.missing():
        planned = [rows[i] for i in manifest.examples_of(shard)]
        kept = [row for row in planned if isinstance(row, CacheRow)]
        writer.commit(shard, kept, [row for row in planned if not isinstance(row, CacheRow)], {})
    writer.seal()
    return Path(experiment.cache_dir)


def answer_logits(model: Any, encoded: Any) -> Any:
    """float32 numpy [N, V]: what a model says of each answer token, the body in its own dtype, the head in float32.

    An encoder-decoder (`encoded.encoder_ids`) is asked as a whole, its head in its own dtype too.
    """
    import torch

    ids_1L = torch.tensor([encoded.input_ids])
    with torch.no_grad():
        if encoded.encoder_ids:
            encoder_ids = torch.tensor([encoded.encoder_ids])
            return model(input_ids=encoder_ids, decoder_input_ids=ids_1L[:, :-1]).logits[0].float().numpy()
        hidden_NH = model.base_model(input_ids=ids_1L).last_hidden_state[0, encoded.answer_start - 1 : -1]
        return (hidden_NH.float() @ model.get_output_embeddings().weight.float().T).numpy()


def top_k(logits_NV: Any, k: int, temperatures: Sequence[float]) -> dict[str, Any]:
    """The cached numbers of full logits, summed in float64; equal logits go by lower id."""
    ids_NK = np.argsort(-logits_NV, axis=1, kind="stable")[:, :k]
    logits_NK = np.take_along_axis(logits_NV, ids_NK, 1)
    exact_NV = logits_NV.astype(np.float64)
    outside_NV = exact_NV.copy()
    np.put_along_axis(outside_NV, ids_NK, -np.inf, 1)

    def log_sums(values_NV: Any) -> Any:
        scaled = [values_NV / t for t in temperatures]
        tops = [s.max(1, keepdims=True) for s in scaled]
        sums = [np.log(np.exp(s - top).sum(1)) + top[:, 0] for s, top in zip(scaled, tops, strict=True)]
        return np.stack(sums, 1).astype(np.float32)

    return {
        "top_logit": logits_NK[:, 0].copy(),
        "logits": logits_NK,
        "token_ids": ids_NK.astype(np.int32),
        "logsumexp": log_sums(exact_NV),
        "log_tail": log_sums(outside_NV) if k < logits_NV.shape[1] else None,
    }


def drawn(logits_NV: Any, u_NK: Any, temperatures: Sequence[float]) -> dict[str, Any]:
    """The cached numbers of one id from each of K slices of the cumulative softmax at temperatures[0], as u decides."""
    vocab_size, k = logits_NV.shape[1], u_NK.shape[1]
    every = top_k(logits_NV, vocab_size, temperatures)  # all ids by rank
    scaled_NV = logits_NV.astype(np.float64) / temperatures[0]
    cumulative_NV = np.exp(scaled_NV - scaled_NV.max(1, keepdims=True)).cumsum(1)
    token_ids, draws, logits = (np.zeros(u_NK.shape, kind) for kind in (np.int32, np.int32, np.float32))
    for n, (cumulative_V, u_K) in enumerate(zip(cumulative_NV, u_NK, strict=True)):
        ids = np.searchsorted(cumulative_V, (np.arange(k) + u_K) / k * cumulative_V[-1], side="right")
        times_V = np.bincount(ids, minlength=vocab_size)
        slots = [int(i) for i in every["token_ids"][n] if times_V[i]]
        token_ids[n, : len(slots)], draws[n, : len(slots)] = slots, times_V[slots]
        logits[n] = logits_NV[n, slots[-1]]
        logits[n, : len(slots)] = logits_NV[n, slots]
    numbers = {"top_logit": logits[:, 0].copy(), "logits": logits, "token_ids": token_ids, "draws": draws}
    return every | numbers | {"log_tail": None}


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
