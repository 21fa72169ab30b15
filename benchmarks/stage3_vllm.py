"""Five checkpoints of one run answered by one vLLM engine, against an engine started for each of them.

    python benchmarks/stage3_vllm.py [--data FOLDER] [--work FOLDER] [--prompts 32] [--rounds 1] [--out FILE]

Both sides are processes as a user starts them, imports and loading included, and must write the same answers. The
model is a Qwen3 with random weights and the real vocabulary, the checkpoints are LoRA adapters with random weights. It
needs an environment with vLLM (see stage3_eval/VLLM.md): `.venv-vllm`, or the interpreter that LOGITBANK_VLLM_PYTHON
names; without one it is skipped.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CHECKPOINTS, RANK, NEW_TOKENS = 5, 16, 32


def answer(request: dict[str, Any]) -> None:
    """What runs in vLLM's environment: one engine, all adapters of the request, one after another."""
    from pipeline.models import locate
    from stage3_eval.generate.vllm import VLLMEngine

    prompts, adapters = request["prompts"], [Path(folder) for folder in request["adapters"]]
    longest = max(map(len, prompts)) + NEW_TOKENS
    engine = VLLMEngine(locate(request["model"]), request["dtype"], RANK, longest, adapters)
    found = {str(a): [g.ids for g in engine.generate(prompts, a, NEW_TOKENS, request["end_id"])] for a in adapters}
    Path(request["answers"]).write_text(json.dumps(found), encoding="utf-8")


def start(python: Path, request: dict[str, Any], adapters: Sequence[Path]) -> dict[str, Any]:
    """Run `answer` in a process of its own; what it wrote."""
    work = Path(request["answers"]).parent
    asked = work / "request.json"
    asked.write_text(json.dumps(request | {"adapters": [str(a) for a in adapters]}), encoding="utf-8")
    subprocess.run(
        [str(python), str(Path(__file__)), "--answer", str(asked)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(os.cpu_count())},
        check=True,
        capture_output=True,
    )
    found: dict[str, Any] = json.loads(Path(request["answers"]).read_text(encoding="utf-8"))
    return found


def make_adapters(model: Path, folder: Path) -> list[Path]:
    """LoRA adapters on every linear layer but the head, each drawn from a seed of its own; B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    paths = [folder / f"checkpoint-{i}" for i in range(CHECKPOINTS)]
    for seed, path in enumerate(paths):
        if not (path / "adapter_config.json").is_file():
            base = AutoModelForCausalLM.from_pretrained(model)
            adapted = get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
            torch.manual_seed(seed)
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
            adapted.save_pretrained(path)
    return paths


def main() -> int:
    """Make the models, time both sides in turn, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="real texts and tokenizers; LOGITBANK_DATA unless given")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="where models are made")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        answer(json.loads(args.answer.read_text(encoding="utf-8")))
        return 0
    from harness import Row, data_folder, finish, side_by_side
    from stage3_cost import stage3_model

    from pipeline.fingerprint import Experiment
    from pipeline.recipe import load_recipe

    data = data_folder(args.data)
    python = Path(os.environ.get("LOGITBANK_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not python.is_file():
        print(f"skipped: there is no {python}; `make vllm-cpu` makes it, or LOGITBANK_VLLM_PYTHON names another")
        return 0
    model = stage3_model(args.work, data, "cpu").absolute()
    settings = [f"teacher.model={model}", "teacher.thinking=null", f"data.dir={data}", "data.train_limit=1000"]
    experiment = Experiment(load_recipe("gsm8k-qwen3", settings))
    builder, examples = experiment.teacher_prompts, experiment.training_set.cached[: args.prompts]
    adapters = make_adapters(model, (args.work / "stage3-vllm").absolute())
    request = {
        "model": str(model),
        "dtype": "float32",
        "prompts": [builder.prompt_ids(e.prompt) for e in examples],
        "end_id": builder.end_id,
        "answers": str(adapters[0].parent / "answers.json"),
    }
    found: dict[str, dict[str, Any]] = {}
    runs = {
        "one": lambda: found.update(one=start(python, request, adapters)),
        "each": lambda: found.update(each={k: v for a in adapters for k, v in start(python, request, [a]).items()}),
    }
    times = side_by_side(runs, args.rounds, warmup=0)
    same = sum(a == b for k in found["one"] for a, b in zip(found["one"][k], found["each"][k], strict=True))
    if same < len(adapters) * len(examples):
        sys.exit(f"one engine and five wrote the same {same} of {len(adapters) * len(examples)} answers; expected all")
    rows = [
        Row.of_times("stage 3 vllm, 5 checkpoints", "5 engine starts", times["one"], times["each"], "<= 0.5"),
    ]
    conditions = {"prompts": len(examples), "new tokens": NEW_TOKENS, "seconds": times}
    finish("stage3_vllm", rows, conditions, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
