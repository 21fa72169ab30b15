"""What the benchmarks of stages 1 and 2 run on: true shapes with random weights, real texts, the recipes' own settings.

    stand_ins.run("stage2_cost", __doc__, measure, MEASURED, rounds=5)  # --model --device --data --work --rounds --out
    experiment = stand_ins.experiment("mid", args, rows=48)             # a recipe whose models and rows are on disk

Time and memory do not depend on what the weights say, so no download is needed. `mid` is what a processor can do: a
Qwen3 with the vocabulary of the large ones, whose body and head cost 44 and 78 MFLOP a token (Qwen3-1.7B: 2,800 and
620; a body of that ratio, 4.5, would take minutes a step here, so on `mid` the head weighs more than it does on a real
model). The worked examples are chosen to be about 1,200 tokens. Without a folder of real texts and tokenizers, the
embedded ones serve: word problems, some of them joined to one.
"""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Row, finish

from pipeline.fingerprint import Experiment
from pipeline.models import EMBEDDED_DIR
from pipeline.recipe import Recipe, load_recipe

CONTEXT_TOKENS = 1_200  # of eight worked examples, as published
QWEN3 = {"vocab_size": 151_936, "max_position_embeddings": 40_960, "tie_word_embeddings": True, "rope_theta": 1e6}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {  # model -> (type, what differs from the type's defaults)
    "mid": (
        "qwen3",
        {
            **QWEN3,
            "hidden_size": 256,
            "intermediate_size": 1_536,
            "num_hidden_layers": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    ),
    "small": (  # what writes whole answers in stage 3, a token at a time
        "qwen3",
        {
            **QWEN3,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    ),
    "qwen3-1.7b": (
        "qwen3",
        {
            **QWEN3,
            "hidden_size": 2_048,
            "intermediate_size": 6_144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "flan-t5-xl": (
        "t5",
        {
            "vocab_size": 32_128,
            "d_model": 2_048,
            "d_kv": 64,
            "d_ff": 5_120,
            "num_layers": 24,
            "num_heads": 32,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
    ),
    "gpt2-medium": ("gpt2", {"n_embd": 1_024, "n_layer": 24, "n_head": 16}),
    "pythia-410m": (
        "gpt_neox",
        {
            "vocab_size": 50_304,
            "hidden_size": 1_024,
            "intermediate_size": 4_096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
    "smollm-360m": (
        "llama",
        {
            "vocab_size": 49_152,
            "hidden_size": 960,
            "intermediate_size": 2_560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True)
class Pair:
    """A recipe with stand-ins for its teacher and one student; None: the recipe's own, which are embedded.

    Tokenizers by their folder under DATA/tokenizers, and the embedded one that serves without.
    """

    recipe: str
    teacher: str | None = None
    student: str | None = None
    tokenizers: tuple[tuple[str, str], tuple[str, str]] = (("qwen", "decoder"), ("qwen", "decoder"))


def _taught_by_t5(student: str, tokenizer: str) -> Pair:
    return Pair("flan-uld", "flan-t5-xl", student, (("t5", "t5"), (tokenizer, "gpt2")))


PAIRS = {
    "pocket": Pair("pocket"),
    "pocket-uld": Pair("pocket-uld"),
    "mid": Pair("gsm8k-qwen3", "mid", "mid"),
    "qwen3-1.7b": Pair("gsm8k-qwen3", "qwen3-1.7b", "qwen3-1.7b"),
    "gpt2-medium": _taught_by_t5("gpt2-medium", "gpt2"),
    "pythia-410m": _taught_by_t5("pythia-410m", "gpt-neox-20b"),
    "smollm-360m": _taught_by_t5("smollm-360m", "smollm2"),
}
MEASURED = {"cpu": ("pocket", "pocket-uld", "mid"), "cuda": ("qwen3-1.7b", "gpt2-medium", "pythia-410m", "smollm-360m")}


Measure = Callable[[str, argparse.Namespace], tuple[list[Row], dict[str, Any]]]


def run(name: str, doc: str | None, measure: Measure, models: Mapping[str, Sequence[str]], rounds: int) -> int:
    """The `main` of a benchmark: `measure` every model asked for, its rows and conditions; report.

    models: by device, those measured unless others are given.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=PAIRS, metavar="NAME", help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, help="real texts and tokenizers; LOGITBANK_DATA unless given")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="where models and caches are made")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.data = args.data or (Path(os.environ["LOGITBANK_DATA"]) if os.environ.get("LOGITBANK_DATA") else None)
    rows, conditions = [], {}
    for model in args.model or models[args.device]:
        found, conditions[model] = measure(model, args)
        rows += found
    finish(name, rows, conditions, args.out)
    return 0


def experiment(
    name: str, args: argparse.Namespace, rows: int, own_tokens: int | None = None, settings: Sequence[str] = ()
) -> Experiment:
    """The recipe of a pair, its models and `rows` training examples on disk, ready to be run on `args.device`.

    own_tokens: take the rows whose prompt and answer are about so long, not the first ones. settings: further --set.
    """
    pair = PAIRS[name]
    dtype = "bfloat16" if args.device == "cuda" else "float32"  # float32 is the faster one on a processor
    work = args.work / name
    changes = [f"runtime.device={args.device}", f"run_dir={work / 'run'}", *settings]
    if pair.teacher is None:
        return Experiment(load_recipe(pair.recipe, [f"cache.dir={work / 'cache'}", *changes]))
    assert pair.student is not None
    (teacher, student), (theirs, ours) = (pair.teacher, pair.student), pair.tokenizers
    folders = [
        make_model(args.work, args.data, model, tokenizer, dtype)
        for model, tokenizer in ((teacher, theirs), (student, ours))
    ]
    lora = "{r: 16, alpha: 32, dropout: 0.0, targets: all-linear}"
    changes += [
        f"teacher.model={folders[0]}",
        f"teacher.dtype={dtype}",
        "teacher.thinking=null",  # the local Qwen tokenizer's template has no switch
        f"students={{{student}: {{model: {folders[1]}, dtype: {dtype}, lora: {lora}}}}}",
        f"cache.dir={work / f'cache-{rows}-{own_tokens}'}",
    ]
    if pair.recipe != "gsm8k-qwen3":
        tasks = "{pocket_yesno: {}, pocket_qa: {}, pocket_summary: {}}"
        texts = [f"data.dir={args.data}"] if args.data else [f"data.tasks={tasks}"]
        return Experiment(load_recipe(pair.recipe, [*changes, f"data.train_limit={rows}", *texts]))
    folder, count = work / f"texts-{rows}-{own_tokens}", load_recipe(pair.recipe, changes).teacher.shots
    shots, own = _chosen_rows(Experiment(load_recipe(pair.recipe, [*changes, _texts(args)])), rows, count, own_tokens)
    _write_gsm8k(folder, [*own, *shots])
    drawn = Experiment(load_recipe(pair.recipe, [*changes, f"data.dir={folder}"]))
    places = sorted(int(shot.id.rpartition("-")[2]) for shot in drawn.training_set.shots.pool["gsm8k"])
    for place in places:  # the draw goes by place alone: put the short ones there
        own.insert(place, {})
    _write_gsm8k(folder, [row or shots.pop() for row in own])
    return Experiment(drawn.recipe)


def context_of(experiment: Experiment) -> list[int]:
    """The ids that every prompt of the (only) task begins with: its worked examples."""
    shots, prompts = experiment.training_set.shots, experiment.teacher_prompts
    one, other = (prompts.prompt_ids(text, shots.of(experiment.training_set.cached[0])) for text in ("0", "a"))
    return one[: next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)]


def own_lengths(experiment: Experiment) -> tuple[float, float]:
    """Mean tokens of an example's own, and of its answer, on the teacher's side."""
    examples, prompts = experiment.training_set.cached, experiment.teacher_prompts
    found = [prompts.encode(example.prompt, example.answer) for example in examples]
    own = sum(len(e.input_ids) + len(e.encoder_ids) for e in found)
    return own / len(found), sum(len(e.answer_ids) for e in found) / len(found)


def make_model(work: Path, data: Path | None, name: str, tokenizer: tuple[str, str], dtype: str) -> Path:
    """The folder of a model of this shape with random weights, and a tokenizer beside it; made once."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    real = data / "tokenizers" / tokenizer[0] if data else None
    folder = work / "models" / f"{name}-{dtype}-{tokenizer[0] if real else tokenizer[1]}"
    if not (folder / "config.json").is_file():
        kind, differing = CONFIGS[name]
        config = AutoConfig.for_model(kind, **differing)
        torch.manual_seed(0)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        AutoTokenizer.from_pretrained(real or EMBEDDED_DIR / tokenizer[1]).save_pretrained(folder)
        auto.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return folder


def _texts(args: argparse.Namespace) -> str:
    """The setting that names a folder with gsm8k's rows: the real one, or embedded problems, two to six to a row."""
    folder = args.data or args.work / "texts"
    if not args.data and not (folder / "gsm8k" / "train.jsonl").is_file():
        problems = iter(Experiment(load_recipe("pocket", ["data.tasks.pocket_math.train=4000"])).training_set.cached)
        rows = []
        for i in range(900):
            some = list(itertools.islice(problems, 2 + i % 5))
            rows.append({"question": " ".join(p.prompt for p in some), "answer": "\n".join(p.answer for p in some)})
        _write_gsm8k(folder, rows)
    return f"data.dir={folder}"


def _chosen_rows(
    experiment: Experiment, count: int, shots: int, own_tokens: int | None
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Of the first 2,000 training rows: `shots` that are about CONTEXT_TOKENS together, and `count` others.

    Those are the first ones, or the ones closest to `own_tokens`.
    """
    examples, prompts = experiment.training_set.cached[:2_000], experiment.teacher_prompts
    lengths = {e.id: len(prompts.encode(e.prompt, e.answer).input_ids) for e in examples}

    def closest(length: float) -> list[Any]:
        return sorted(examples, key=lambda e: abs(lengths[e.id] - length))

    chosen = closest(CONTEXT_TOKENS / shots)[:shots]
    others = [e for e in (closest(own_tokens) if own_tokens else examples) if e not in chosen][:count]
    return _as_rows(chosen), _as_rows(others)


def _as_rows(examples: Sequence[Any]) -> list[dict[str, str]]:
    return [{"question": e.prompt, "answer": e.answer} for e in examples]


def _write_gsm8k(folder: Path, rows: Sequence[dict[str, str]]) -> None:
    (folder / "gsm8k").mkdir(parents=True, exist_ok=True)
    for split, part in (("train", rows), ("test", rows[:1])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / "gsm8k" / f"{split}.jsonl").write_text(text, encoding="utf-8")


def describe(experiment: Experiment) -> dict[str, Any]:
    """For the conditions of a result: what the lengths were."""
    recipe: Recipe = experiment.recipe
    own, answer = own_lengths(experiment)
    shared = recipe.teacher.shots and recipe.teacher.kind == "causal"
    return {
        "context_tokens": len(context_of(experiment)) if shared else 0,
        "own_tokens": round(own, 1),
        "answer_positions": round(answer, 1),
        "top_k": recipe.cache.top_k,
        "dtype": recipe.teacher.dtype,
    }
