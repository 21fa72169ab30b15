"""Everything `report.html` shows, as plain JSON. Called by `report`.

results    what results.json holds, without the provenance of single prediction files
losses     student -> run -> [[step, cross-entropy], ...], at most LOSS_POINTS means of equally many steps
answers    a list: student, block, task, metric, conditions, ids, values (condition -> a score an example), and
           the texts of at most ANSWERS examples (of ALL_ANSWERS in a page, shared evenly), those first that tell
           the experiment's two arms apart
cost       what the cache took and what it saved, as far as it is known
viewer     see `stage3_eval.viewer`
versions   of what wrote the page
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.recipe import Recipe
from pipeline.run_dir import RunDir
from pipeline.tasks import Example, get_task
from stage3_eval.blocks import Block
from stage3_eval.conditions import asked, baselines
from stage3_eval.evaluate import Evaluated
from stage3_eval.report.rows import pair_of
from stage3_eval.report.tables import block_name, notes
from stage3_eval.scorebook import ScoreBook

ANSWERS, ALL_ANSWERS, CHARACTERS, LOSS_POINTS = 400, 4000, 3000, 400
_PACKAGES = ("logitbank", "torch", "transformers", "peft", "tokenizers", "pyarrow", "numpy", "scipy", "vllm")
Losses = Mapping[str, Mapping[str, Mapping[int, float]]]


def collect(
    recipe: Recipe,
    blocks: Sequence[Block],
    models: Sequence[Evaluated],
    found: Mapping[str, Any],
    losses: Losses,
    inside: Mapping[str, Any],
) -> dict[str, Any]:
    """The data of a page. found: the content of results.json. inside: of `look_inside`."""
    students = [model for model in models if model.name in recipe.students]
    shown = {key: value for key, value in found.items() if key != "provenance"}
    return {
        "results": {**shown, "block_names": {b: block_name(b, found["shots"]) for b in found["blocks"]}},
        "notes": notes(found),
        "losses": {
            s: {run: points for run, of in runs.items() if (points := thinned(of))} for s, runs in losses.items()
        },
        "answers": answers_of(recipe, blocks, students),
        "cost": cost_of(recipe, students, inside.get("cache")),
        "viewer": {"students": inside["students"], "missing": inside["missing"]},
        "provenance": _provenance(found, inside.get("cache")),
        "versions": dict(_versions()),
    }


def thinned(losses: Mapping[int, float], points: int = LOSS_POINTS) -> list[list[float]]:
    """[step, loss] pairs in order; of more than `points`, the means of equally many neighbours, at their last step.
    A loss that is no number is left out."""
    pairs = sorted((step, loss) for step, loss in losses.items() if math.isfinite(loss))
    width = -(-len(pairs) // points) if pairs else 1
    groups = [pairs[i : i + width] for i in range(0, len(pairs), width)]
    return [[group[-1][0], round(sum(loss for _, loss in group) / len(group), 6)] for group in groups]


def answers_of(recipe: Recipe, blocks: Sequence[Block], students: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Of each student, block and task what its conditions answered, scored by the task's first metric: the first
    seed of an arm, at its headline checkpoint."""
    book, found = ScoreBook(recipe.eval.metrics), []
    tables = len(students) * sum(len(block.tasks) for block in blocks)
    most = min(ANSWERS, max(20, ALL_ANSWERS // max(1, tables)))
    for model in students:
        runs = {run.name: run for run in model.runs if run.is_first}
        for block in blocks:
            names = {c.name: c.name for c in baselines(recipe) if asked(c, block)}
            names |= {name: run.checkpoints[model.headline[name]].name for name, run in runs.items()}
            names = {name: c for name, c in names.items() if (c, block.name) in model.files}
            for task, examples in block.tasks.items() if names else ():
                found.append(_answers(book, model, block, task, examples, names, pair_of(recipe) or (), most))
    return found


def _answers(
    book: ScoreBook,
    model: Evaluated,
    block: Block,
    task: str,
    examples: Sequence[Example],
    names: Mapping[str, str],
    pair: Sequence[str],
    most: int,
) -> dict[str, Any]:
    metric = get_task(task).metrics[0]
    values = {
        name: [round(v, 4) for v in book.of(model, condition, block.name, examples).measured[metric].values]
        for name, condition in names.items()
    }
    said = {name: model.answers(condition, block.name) for name, condition in names.items()}

    def alike(i: int) -> tuple[bool, bool]:
        """Whether the two arms score the same, and whether all do."""
        return len({values[arm][i] for arm in pair if arm in values}) < 2, len({of[i] for of in values.values()}) < 2

    kept = sorted(sorted(range(len(examples)), key=alike)[:most])
    return {
        "student": model.name,
        "block": block.name,
        "task": task,
        "metric": metric,
        "conditions": dict(names),
        "n": len(examples),
        "values": values,
        "texts": [
            {
                "at": i,
                "id": examples[i].id,
                "prompt": cut(examples[i].prompt),
                "gold": cut(examples[i].answer),
                "said": {name: cut(of[examples[i].id].prediction) for name, of in said.items()},
            }
            for i in kept
        ],
    }


def cut(text: str) -> str:
    """A text of which a page shows the beginning."""
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ... ({len(text) - CHARACTERS:,} characters more)"


def cost_of(recipe: Recipe, students: Sequence[Evaluated], cache: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of the cache what `cache_facts` found; of each training how many examples it read, and its seconds."""
    run_dir, trainings = RunDir.of(recipe), []
    for model in students:
        for run in model.runs:
            steps = list(_metrics(run_dir.arm(model.name, run.name).metrics))
            timed = [row["tokens"] / row["tokens_per_s"] for row in steps if row.get("tokens_per_s")]
            trainings.append(
                {
                    "student": model.name,
                    "run": run.name,
                    "reads_teacher": recipe.arms[run.arm].needs_teacher,
                    "steps": len(steps),
                    "examples": len(steps) * recipe.train.batch_size,
                    "seconds": round(sum(timed), 1) if steps and len(timed) == len(steps) else None,
                }
            )
    return {"cache": None if cache is None else dict(cache), "trainings": trainings}


def _metrics(path: Path) -> Iterable[Mapping[str, Any]]:
    """The steps of a training, of one that was run twice the last; a line that a kill cut off is left out."""
    if not path.is_file():
        return []
    steps: dict[int, Mapping[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            steps[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            continue
    return steps.values()


def _provenance(found: Mapping[str, Any], cache: Mapping[str, Any] | None) -> dict[str, Any]:
    """The commands, the recipe, and what wrote the answers: each kind of it once."""
    made = found["provenance"]
    written: dict[str, list[str]] = {}
    for model, files in made.get("predictions", {}).items():
        for condition, of in files.items():
            by = json.dumps({key: value for key, value in of.items() if key != "file"}, sort_keys=True)
            written.setdefault(by, []).append(f"{model}, {condition}")
    stage1 = (cache or {}).get("provenance", {}).get("command")
    return {
        "command": made.get("command"),
        "cache_command": ["python", "-m", *stage1] if isinstance(stage1, list) else None,
        "cache_fingerprint": made.get("cache_fingerprint"),
        "recipe": made.get("recipe"),
        "scored_by": made.get("scored_by"),
        "trained_with": made.get("trained_with"),
        "answers_written_by": [{"by": json.loads(by), "answers": of} for by, of in written.items()],
    }


def _versions() -> Iterable[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
