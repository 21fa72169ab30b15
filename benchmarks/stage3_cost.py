"""What generating answers costs in stage 3 on transformers, against what one would write oneself.

    python benchmarks/stage3_cost.py [--device cuda] [--data FOLDER] [--out FILE]

Against batches of the same size in the order of the data, padded on the left, each run through transformers' own
`generate` until its last row is finished, worked examples read again in every row. Both write the same tokens, which
is asserted. The pocket model writes its own answers. A model with random weights never ends one, so there each answer
is half as long as the example's real one: what the model computes is thrown away and a script says the next token.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import stand_ins
import torch
from harness import Row, data_folder, finish, side_by_side

from pipeline.data import eval_examples
from pipeline.fingerprint import Experiment
from pipeline.models import load_causal_lm, locate
from pipeline.recipe import load_recipe
from stage3_eval.generate import Generated
from stage3_eval.generate.hf import HFEngine

DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
SHAPE = {"cpu": "small", "cuda": "qwen3-1.7b"}  # of the Qwen3 with random weights


@dataclass(frozen=True)
class Work:
    """Prompts for one model. lengths: of the answers that a script dictates; None where the model writes its own."""

    name: str
    model: Any
    prompts: list[list[int]]
    batch_size: int
    limit: int  # new tokens, the end included
    end_id: int


def main() -> None:
    """Measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, help="real texts and tokenizers; LOGITBANK_DATA unless given")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="where models are made")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=128, help="of the model with random weights")
    parser.add_argument("--batch-size", type=int, default=16, help="of the model with random weights")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.data = data_folder(args.data)
    rows: list[Row] = []
    conditions: dict[str, Any] = {"device": args.device}
    for work in (*pocket(args), *random_weights(args)):
        rows += compare(work, args.rounds)
        lengths = [len(a.ids) for a in HFEngine(work.model, work.batch_size).generate(*call(work))]
        conditions[work.name] = describe(work, lengths)
    finish("stage3_cost", rows, conditions, args.out)


def call(work: Work) -> tuple[list[list[int]], None, int, int]:
    """The arguments of Engine.generate."""
    return work.prompts, None, work.limit, work.end_id


def describe(work: Work, lengths: Sequence[int]) -> str:
    """The conditions in words."""
    prompts = [len(prompt) for prompt in work.prompts]
    return (
        f"{len(prompts)} prompts of {min(prompts)} to {max(prompts)} tokens in batches of {work.batch_size}; "
        f"answers of {min(lengths)} to {max(lengths)}, {sum(lengths) / len(lengths):.0f} on average, "
        f"cut at {work.limit}"
    )


def compare(work: Work, rounds: int) -> list[Row]:
    """The naive loop against what is left of its time as one thing after another is added."""
    naive = list(range(len(work.prompts)))
    ordered = sorted(naive, key=lambda i: -len(work.prompts[i]))
    engine = HFEngine(work.model, work.batch_size)
    answers: dict[str, list[Generated]] = {}

    def kept(name: str, run: Callable[[], list[Generated]]) -> Callable[[], None]:
        return lambda: answers.__setitem__(name, run())

    def no_leaving() -> list[Generated]:
        with patch("stage3_eval.generate.decoding.Decoding.drop_ended", lambda self: None):
            return by_batches(engine, work, ordered)

    runs = {
        "naive": kept("naive", lambda: plain_generate(work, naive)),
        "sorted": kept("sorted", lambda: plain_generate(work, ordered)),
        "shared": kept("shared", no_leaving),
        "leaving": kept("leaving", lambda: by_batches(engine, work, ordered)),
        "refilled": kept("refilled", lambda: engine.generate(*call(work))),
    }
    times = side_by_side(runs, rounds, warmup=0)
    for name, found in answers.items():
        if found != answers["naive"]:
            wrong = sum(a != b for a, b in zip(found, answers["naive"], strict=True))
            sys.exit(f"{work.name}: {name} wrote {wrong} of {len(found)} answers otherwise than transformers' generate")
    against = "unsorted batches through transformers' generate"

    def ratio(name: str) -> list[float]:
        return [a / b for a, b in zip(times["naive"], times[name], strict=True)]

    def row(what: str, name: str, goal: str = "") -> Row:
        found = sorted(ratio(name))
        return Row(f"stage 3 hf, {work.name}{what}", against, found[len(found) // 2], found[0], found[-1], goal)

    return [
        row(", answers/s", "refilled", ">= 2"),
        row(": sorted by length", "sorted"),
        row(": and the shared context read once", "shared"),
        row(": and finished rows leaving", "leaving"),
    ]


def by_batches(engine: HFEngine, work: Work, order: Sequence[int]) -> list[Generated]:
    """The engine on one batch after another, so that nothing can take a finished row's place."""
    found: dict[int, Generated] = {}
    for start in range(0, len(order), work.batch_size):
        batch = order[start : start + work.batch_size]
        prompts = [work.prompts[i] for i in batch]
        found.update(zip(batch, engine.generate(prompts, None, work.limit, work.end_id), strict=True))
    return [found[i] for i in range(len(order))]


def plain_generate(work: Work, order: Sequence[int]) -> list[Generated]:
    """Batches in this order, padded on the left, each until its last row is finished."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=work.limit, eos_token_id=work.end_id, pad_token_id=0)
    work.model.generation_config = GenerationConfig()
    found: dict[int, Generated] = {}
    for start in range(0, len(order), work.batch_size):
        batch = order[start : start + work.batch_size]
        length = max(len(work.prompts[i]) for i in batch)
        rows = [[0] * (length - len(work.prompts[i])) + work.prompts[i] for i in batch]
        mask = [[0] * (length - len(work.prompts[i])) + [1] * len(work.prompts[i]) for i in batch]
        device = work.model.device
        with torch.inference_mode():
            ids_BL, mask_BL = torch.tensor(rows, device=device), torch.tensor(mask, device=device)
            out = work.model.generate(ids_BL, attention_mask=mask_BL, generation_config=config)
        for i, ids in zip(batch, out[:, length:].tolist(), strict=True):
            ended = work.end_id in ids
            found[i] = Generated(ids[: ids.index(work.end_id) + 1] if ended else ids, ended)
    return [found[i] for i in range(len(order))]


def pocket(args: argparse.Namespace) -> list[Work]:
    """The embedded model on its own problems, with and without worked examples; it writes what it writes."""
    recipe = load_recipe("pocket", ["data.tasks={pocket_math: {train: 264, eval: 192}}"])
    experiment = Experiment(recipe)
    builder, shots = experiment.teacher_prompts, experiment.training_set.shots
    model = load_causal_lm(locate(recipe.teacher.model), "float32", "none", torch.device(args.device))
    examples, settings = eval_examples(recipe, "test"), recipe.eval
    few = [builder.prompt_ids(e.prompt, shots.of(e)) for e in examples]
    bare = [builder.prompt_ids(e.prompt) for e in examples]
    assert builder.end_id is not None
    rest = settings.batch_size, settings.max_new_tokens, builder.end_id
    return [Work("pocket, 8 shots", model, few, *rest), Work("pocket, no shots", model, bare, *rest)]


def random_weights(args: argparse.Namespace) -> list[Work]:
    """A Qwen3 of the real vocabulary on GSM8K's texts, its answers half as long as the real ones."""
    folder = stage3_model(args.work, args.data, args.device)
    settings = [f"teacher.model={folder}", "teacher.thinking=null", f"data.dir={args.data}", "data.train_limit=1000"]
    experiment = Experiment(load_recipe("gsm8k-qwen3", settings))
    builder, shots = experiment.teacher_prompts, experiment.training_set.shots
    model = load_causal_lm(locate(str(folder)), DTYPE[args.device], "none", torch.device(args.device))
    examples, limit = experiment.training_set.cached[: args.prompts], experiment.recipe.eval.max_new_tokens // 2
    lengths = [min(limit, len(builder.encode(e.prompt, e.answer).answer_ids) // 2) for e in examples]
    assert builder.end_id is not None
    script = Script(model, lengths, limit, builder.end_id)
    works = []
    for label, prompts in (
        ("no shots", [builder.prompt_ids(e.prompt) for e in examples]),
        ("8 shots", [builder.prompt_ids(e.prompt, shots.of(e)) for e in examples]),
    ):
        scripted = [[*prompt[:-1], script.start(i)] for i, prompt in enumerate(prompts)]
        works.append(Work(f"random Qwen3, {label}", model, scripted, args.batch_size, limit, builder.end_id))
    return works


def stage3_model(work: Path, data: Path, device: str) -> Path:
    """The folder of the Qwen3 with random weights, made where it is not there yet."""
    return stand_ins.make_model(work, data, SHAPE[device], ("qwen", "decoder"), DTYPE[device])


class Script:
    """Makes a model write answers of given lengths: each token of each answer has an id of its own, and the id read
    last decides the next one, in whatever batch and row it stands. Nothing of the model's work is left out."""

    def __init__(self, model: Any, lengths: Sequence[int], limit: int, end_id: int) -> None:
        self._first = end_id + 1 if end_id < 1_000 else 1_000
        self._width = limit + 1
        self._lengths_P = torch.tensor(lengths, device=model.device)
        self._end_id = end_id
        assert self._first + len(lengths) * self._width < end_id or end_id < self._first
        model.register_forward_hook(self._dictate, with_kwargs=True)

    def start(self, prompt: int) -> int:
        """The id to end a prompt with."""
        return self._first + prompt * self._width

    def _dictate(self, model: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        place_B = kwargs["input_ids"][:, -1] - self._first
        known_B = (place_B >= 0) & (place_B < len(self._lengths_P) * self._width)
        prompt_B = place_B.clamp(0, len(self._lengths_P) * self._width - 1) // self._width
        ends_B = place_B % self._width + 1 >= self._lengths_P[prompt_B]
        next_B = torch.where(ends_B, self._end_id, place_B + self._first + 1)
        rows = known_B.nonzero()[:, 0]
        out.logits[rows, -1, next_B[rows]] = torch.inf


if __name__ == "__main__":
    main()
