"""A tiny run with a cache and two tokenizers, whose texts are hostile: for the tests of `report.html`.

Two students: `toy`, which is the teacher itself, and `other`, whose tokenizer cuts texts otherwise. Some positions are
quarantined. The worked examples are none, so the untouched `toy` reads exactly what the teacher read.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import toys
from toy_adapters import write_checkpoint

from cache_schema.schema import Status
from pipeline.recipe import Recipe, load_recipe
from pipeline.run_dir import RunDir

# Each would set window.pwned, fetch something, or hide the page, where a browser took it for more than text.
HOSTILE = (
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<svg/onload=window.pwned=1>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<!--<script>",
    "<style>*{display:none!important}</style>",
    "<meta http-equiv=refresh content='0;url=http://evil.example/'>",
    "<link rel=stylesheet href=http://evil.example/x.css>",
    "<base href=http://evil.example/><a href=x>",
    "'\"><a href=javascript:window.pwned=1 autofocus onfocus=window.pwned=1>",
    "\u2028window.pwned=1\u2029",
    "\u202egnp.exe \x07\x1b[31m &lt;b&gt; &amp; ]]>",
    "`${window.pwned=1}` {{constructor.constructor('window.pwned=1')()}}",
    "😀e\u0301 العربية 漢字 \t tab",
)


def hostile_rows(count: int, start: int) -> list[dict[str, str]]:
    """Rows whose question and answer hold the corpus in turn."""
    rows = toys.rows(count, start)
    for i, row in enumerate(rows):
        text = HOSTILE[i % len(HOSTILE)]
        row["question"] = f"{text} {row['question']}"
        row["answer"] = f"{text}\n{row['answer']}"
    return rows


def quicken(patch: Any) -> None:
    """Leave out what the page does not show: pictures, and all but a few draws of the bootstrap."""
    patch.setattr("stage3_eval.compare._RESAMPLES", 100)
    patch.setattr("stage3_eval.report.pictures.draw", lambda *_: [])


def make_run(root: Path) -> Recipe:
    """Everything a report needs but the answers, which `python -m stage3_eval` generates; the recipe, in `root`."""
    toys.write_jsonl(root / "data" / "gsm8k" / "train.jsonl", hostile_rows(28, 0))
    toys.write_jsonl(root / "data" / "gsm8k" / "test.jsonl", hostile_rows(14, 100))
    toys.tiny_tokenizer(root / "other", vocab_size=290)
    toys.tiny_gpt2(root / "other", vocab_size=290)
    student = {"model": str(root / "other"), "dtype": "float32", "lora": {"r": 4, "alpha": 8}}
    path = toys.tiny_recipe(
        root,
        teacher={"shots": 0},
        students={"other": student},
        arms={"distill": None, "uld": {"ce": 1.0, "uld": 0.5}},
        eval={"baselines": ["zero_shot"], "max_new_tokens": 4, "splits": ["train", "test"]},
    )
    recipe = load_recipe(str(path))
    fingerprint = _cached(recipe)
    for name, of in recipe.students.items():
        for arm, seed in (("sft", 10), ("uld", 20)):
            for step in (2, 4):
                write_checkpoint(RunDir.of(recipe), arm, step, Path(of.model), seed + step, name)
            identity = RunDir.of(recipe).arm(name, arm).identity
            identity.write_text(f'{{"cache": "{fingerprint}"}}')
    return recipe


def _cached(recipe: Recipe) -> str:
    """Its cache, in which the answers of every seventh row end in positions that cannot be used."""
    from pipeline.fingerprint import Experiment

    seen = 0

    def edit(row: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen % 7:
            return row
        status = row.status.copy()
        status[-3:] = Status.UNKNOWN_TOKEN
        return replace(row, status=status)

    toys.fill_cache(recipe, edit)
    return Experiment(recipe).fingerprint
