"""Looks inside a run for the report's token viewer: `<run>/report/viewer.json`. Called by `__main__`.

Of some cached examples the student reads the reference answer, untouched and with each arm's checkpoint, and what it
expects at each token is kept beside what the teacher expected. Also what the cache took. The file is computed again
when other checkpoints or another cache stand behind the report; `--rescore` only reads it. What cannot be had is left
out with its reason, and the report is written without it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schema.atomic import publish
from cache_schema.schema import ALIGNMENT, TEXT
from pipeline.handout import failed
from pipeline.progress import progress
from pipeline.recipe import Recipe
from pipeline.run_dir import RunDir
from stage3_eval.blocks import Block
from stage3_eval.conditions import ZERO_SHOT, Condition
from stage3_eval.evaluate import Evaluated
from stage3_eval.report.rows import pair_of
from stage3_eval.score import score
from stage3_eval.subject import Subject

if TYPE_CHECKING:
    from cache_schema.reader import CacheReader
    from stage3_eval.viewer_rows import Answer

FORMAT, FILE = "logitbank viewer 2", "viewer.json"
EXAMPLES = 8  # of a student
POOL = 24  # read to find the ones where training changed the student most
_LONG_S = 1e9  # more than a shard can have taken: records may be a stranger's
_SCANNED = 20_000  # rows of a cache looked through for an example that was scored


def look_inside(
    recipe: Recipe, blocks: Sequence[Block], evaluated: Sequence[Evaluated], rescore: bool = False
) -> dict[str, Any]:
    """{"cache": what it took, or None, "students": name -> its examples, "missing": what is not there -> why}."""
    path = RunDir.of(recipe).report / FILE
    students = [model for model in evaluated if model.name in recipe.students and model.files]
    wanted = {model.name: _identity(model) for model in students}
    kept = _kept(path)
    if kept is not None and kept["identity"] == wanted:
        return dict(kept["content"])
    if rescore:
        why = "it was made of other checkpoints" if kept is not None else f"there is no {path.name} of this run"
        return _nothing({"token viewer": f"{why}; run python -m stage3_eval without --rescore to look inside"})
    try:
        from pipeline.fingerprint import Experiment

        reader = Experiment(recipe).open_cache()
    except Exception as error:  # a report is of use without its cache, which may lie on another machine
        return _nothing({"token viewer": f"the cache cannot be opened: {failed('', error).reason}"})
    content: dict[str, Any] = {"cache": cache_facts(reader), "students": {}, "missing": {}}
    for model in students:
        try:
            content["students"][model.name] = _of_student(recipe, blocks, model, reader)
        except Exception as error:  # memory, a checkpoint that is gone: the tables do not depend on it
            content["missing"][f"token viewer of {model.name}"] = failed("", error).reason
    if not content["missing"]:
        found = {"format": FORMAT, "identity": wanted, "content": content}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            publish(path, json.dumps(found, ensure_ascii=True, allow_nan=False).encode())
        except OSError as error:  # the report shows it all the same, and says itself what is wrong with its folder
            print(f"{path}: cannot be kept: {error.strerror or error}; it is computed again next time", flush=True)
    return content


def cache_facts(reader: "CacheReader") -> dict[str, Any]:
    """What a cache holds and what it took, as far as its records say. seconds: None where they do not."""
    manifest, totals = reader.manifest, reader.totals()
    seconds = [record.provenance.get("seconds") for record in reader.records]
    known = [float(value) for value in seconds if isinstance(value, int | float) and 0 <= value < _LONG_S]
    return {
        "fingerprint": manifest.fingerprint,
        "location": reader.location,
        "bytes": totals.bytes,
        "rows": totals.examples.written,
        "examples": {"planned": totals.examples.input, "quarantined": totals.examples.quarantined},
        "positions": {"planned": totals.positions.input, "quarantined": totals.positions.quarantined},
        "usable": totals.positions.written,
        "shards": len(reader.records),
        "codec_error_max": totals.codec_error_max,
        "seconds": sum(known) if seconds and len(known) == len(seconds) else None,
        **{key: getattr(manifest, key) for key in ("selector", "top_k", "vocab_size", "step", "codec", "store_ids")},
        "temperatures": list(manifest.temperatures),
        "identity": manifest.identity,
        "provenance": manifest.provenance,
    }


def _nothing(missing: Mapping[str, str]) -> dict[str, Any]:
    return {"cache": None, "students": {}, "missing": dict(missing)}


def _identity(model: Evaluated) -> dict[str, Any]:
    """What its answers were written by, which the viewer's logits must be of too."""
    identities = {name: file.identity for (name, _), file in model.files.items()}
    conditions = {condition.name: identities.get(condition.name, {}) for condition in _conditions(model)}
    trained = {run.name: run.trained_with.get("cache") for run in model.runs}
    return {"caches": trained, **{name: [of.get("student"), of.get("adapter")] for name, of in conditions.items()}}


def _conditions(model: Evaluated) -> list[Condition]:
    """The untouched student, and the checkpoint that stands for the first seed of each arm."""
    return [Condition(ZERO_SHOT), *(run.checkpoints[model.headline[run.name]] for run in model.runs if run.is_first)]


def _taught(recipe: Recipe, conditions: Sequence[Condition]) -> Condition:
    """The one that was trained from the cache; the last one where none was."""
    pair = pair_of(recipe)
    return next((c for c in conditions if pair is not None and c.run == pair[1]), conditions[-1])


def _kept(path: Path) -> dict[str, Any] | None:
    """The file as it was written; None where it is not there, or not ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["format"] == FORMAT and found["content"]["students"] is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_student(recipe: Recipe, blocks: Sequence[Block], model: Evaluated, reader: "CacheReader") -> dict[str, Any]:
    """The chosen examples of one student, with every condition's expectations."""
    from stage3_eval.viewer_model import Reading

    subject = Subject(recipe, model.name)
    conditions = _conditions(model)
    reading = Reading(recipe, subject, reader)
    try:
        chosen = reading.fitting(_scored(recipe, blocks, model, reader), 3) + reading.fitting(_quarantined(reader), 2)
        pool = reading.fitting([(i, "") for i in _spread(len(reader), POOL)], POOL)
        taken = {index for index, _ in chosen}
        pool = [(index, "") for index, _ in pool if index not in taken]
        total = len(conditions) * EXAMPLES + 2 * len(pool)
        with progress(f"token viewer, {model.name}", total, "answers") as bar:
            changes: dict[int, list[float | None]] = {}
            for condition in (conditions[0], _taught(recipe, conditions)):
                for index, _ in pool:
                    changes.setdefault(index, []).append(reading.mean_disagreement(index, condition))
                    bar.advance(note=condition.name)
            chosen += _most_changed(changes, EXAMPLES - len(chosen))
            answers: dict[int, Answer] = {index: reading.answer(index) for index, _ in chosen}
            expected: dict[int, dict[str, Any]] = {index: {} for index in answers}
            for condition in conditions:
                for index, answer in answers.items():
                    expected[index][condition.name] = reading.expectation(index, answer, condition)
                    bar.advance(note=condition.name)
    finally:
        reading.close()
    return {
        "conditions": [c.name for c in conditions],
        "same_tokenizer": reading.same_tokenizer,
        "temperature": reading.temperature,
        "examples": [
            {"why": why, **reading.described(index, answers[index]), "student": expected[index]}
            for index, why in chosen
        ],
    }


def _scored(recipe: Recipe, blocks: Sequence[Block], model: Evaluated, reader: "CacheReader") -> list[tuple[int, str]]:
    """Cached rows that were scored too (of a block of training rows), and that distillation fixed or broke; in turn."""
    pair, verdicts = pair_of(recipe), {}
    runs = {run.name: run for run in model.runs}
    if pair is None or not all(arm in runs for arm in pair):
        return []
    names = [runs[arm].checkpoints[model.headline[arm]].name for arm in pair]
    for block in blocks:
        if block.name != "train" or not all((name, block.name) in model.files for name in names):
            continue
        for examples in block.tasks.values():
            both = [score(examples, model.answers(n, block.name), n, recipe.eval.metrics).measured for n in names]
            first = next(iter(both[0]))
            for example, plain, taught in zip(examples, both[0][first].values, both[1][first].values, strict=True):
                if plain != taught:
                    verdicts[example.id, example.prompt] = "fixed" if taught > plain else "broken"
    if not verdicts:
        return []
    found: dict[str, list[int]] = {"fixed": [], "broken": []}
    for index in range(min(len(reader), _SCANNED)):
        row = reader.read([index], TEXT)[0]
        if (why := verdicts.get((row.example_id, row.prompt))) is not None:
            found[why].append(index)
    turns = max(map(len, found.values()))
    return [(of[i], why) for i in range(turns) for why, of in found.items() if i < len(of)]


def _quarantined(reader: "CacheReader") -> list[tuple[int, str]]:
    """Rows that have positions which cannot be used."""
    found, start = [], 0
    for record in reader.records:
        if record.quarantined_positions:
            rows = range(start, start + record.rows)
            found += [i for i in rows if reader.read([i], ALIGNMENT)[0].status.any()]
        start += record.rows
        if len(found) >= POOL:
            break
    return [(index, "quarantined positions") for index in found]


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` row numbers evenly over a cache."""
    return sorted({i * count // wanted for i in range(min(wanted, count))}) if count >= wanted else list(range(count))


def _most_changed(changes: Mapping[int, Sequence[float | None]], wanted: int) -> list[tuple[int, str]]:
    """Rows that training brought nearest to the teacher and, a third of all, those it took furthest away."""
    known = {index: of[1] - of[0] for index, of in changes.items() if of[0] is not None and of[1] is not None}
    ordered = sorted(known, key=known.__getitem__)
    away = ordered[::-1][: wanted // 3]
    nearer = [index for index in ordered if index not in away][: wanted - len(away)]
    said = [(index, "nearer to the teacher" if known[index] < 0 else "not nearer") for index in nearer]
    return said + [(i, "further from the teacher" if known[i] > 0 else "least changed") for i in away]
