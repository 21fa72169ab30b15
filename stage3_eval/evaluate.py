"""One student from prompts to predictions: what is there is found, what is missing is generated. Called by `__main__`.

Nothing that exists is generated again: a condition is looked up by its identity (weights, adapter, prompts, engine),
an example by its prompt, so a checkpoint scored on the first n examples is extended, not repeated. A model is loaded
only where an answer is missing.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data import TrainingSet, eval_examples, training_set
from pipeline.errors import RunError
from pipeline.progress import progress
from pipeline.recipe import Recipe
from pipeline.run_dir import RunDir
from pipeline.tasks import Example
from stage3_eval import predictions
from stage3_eval.conditions import Arm, Condition, baselines, check_not_stale, find_arms, kept_arms
from stage3_eval.generate import ADAPTER_FILE, Engine, load_engine
from stage3_eval.predictions import Prediction, PredictionFile, prompt_digest
from stage3_eval.score import mean, score

if TYPE_CHECKING:
    from pipeline.models import ModelSource
    from pipeline.prompts import PromptBuilder

HELD_OUT = "held_out"  # a split of its own: rows of the training set that the cache does not hold
_SAVE_EVERY_S = 20.0


class Job(NamedTuple):
    """Answers that are wanted: of one condition, to some examples of a split."""

    condition: Condition
    split: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Evaluated:
    """A student with everything a report needs.

    headline: arm -> the step whose row stands for it. held_out: arm -> step -> accuracy on the held-out rows, where a
    checkpoint was chosen there. answers: (condition, split) -> id -> prediction. curve: split -> the examples that all
    checkpoints answered. files: (condition, split) -> where the answers lie and what wrote them.
    """

    student: str
    arms: tuple[Arm, ...]
    headline: Mapping[str, int]
    held_out: Mapping[str, Mapping[int, float]]
    examples: Mapping[str, tuple[Example, ...]]
    curve: Mapping[str, tuple[Example, ...]]
    answers: Mapping[tuple[str, str], Mapping[str, Prediction]]
    files: Mapping[tuple[str, str], PredictionFile]


class StudentRun:
    """One student of a run. arguments: the `--recipe` and `--set` of this run, for hints.

    rescore: never generate; take the predictions that were written last, whatever model wrote them, so that neither
    the model nor its checkpoints are needed.
    """

    def __init__(self, recipe: Recipe, student: str, arguments: Sequence[str], rescore: bool = False) -> None:
        self.recipe, self.student, self.rescore = recipe, student, rescore
        self.run_dir = RunDir.of(recipe)
        self.notes: list[str] = []
        if rescore:
            self.arms = kept_arms(recipe, self.run_dir, student)
            if not self.arms and not self._baselines():
                raise RunError(
                    f"--rescore: {student} has no predictions under {self.run_dir.root}; run python -m stage3_eval "
                    "without --rescore to generate them"
                )
        else:
            self.arms, self.notes = find_arms(recipe, self.run_dir, student, arguments)
        self._files: dict[tuple[str, str], PredictionFile] = {}
        self._ids: dict[tuple[bool, str], list[int]] = {}
        self._splits: dict[str, tuple[Example, ...]] = {}
        self._engine: Engine | None = None

    def evaluate(self) -> Evaluated:
        """Generate what is missing and hand everything over. Raises UserError; what was generated is kept."""
        try:
            headline, held_out = self._headline()
            self._answer(self._jobs(headline))
        finally:
            if self._engine is not None:
                self._engine.close()
        return Evaluated(
            student=self.student,
            arms=tuple(self.arms),
            headline=headline,
            held_out=held_out,
            examples={split: self.examples(split) for split in self.recipe.eval.splits},
            curve={split: self.curve_examples(split) for split in self.recipe.eval.splits},
            answers={key: file.predictions for key, file in self._files.items()},
            files=self._files,
        )

    def complete(self) -> bool:
        """Whether every prediction is there already. Generates nothing."""
        held_out = [self._missing(job) for job in self._selection_jobs()]
        if any(held_out):
            return False
        return not any(self._missing(job) for job in self._jobs(self._headline()[0]))

    def examples(self, split: str) -> tuple[Example, ...]:
        """All examples of a split."""
        if split not in self._splits:
            self._splits[split] = (
                self._training_set.held_out if split == HELD_OUT else eval_examples(self.recipe, split)
            )
        return self._splits[split]

    def curve_examples(self, split: str) -> tuple[Example, ...]:
        """The examples that every checkpoint answers: the first eval.curve_limit, each task keeping its share."""
        examples, limit = self.examples(split), self.recipe.eval.curve_limit
        if limit is None or limit >= len(examples):
            return examples
        share = dict.fromkeys((e.task for e in examples), 0)
        sizes = {task: sum(e.task == task for e in examples) for task in share}
        chosen = []
        for example in examples:
            if share[example.task] < max(1, limit * sizes[example.task] // len(examples)):
                share[example.task] += 1
                chosen.append(example)
        return tuple(chosen)

    # -- what is wanted

    def _baselines(self) -> list[Condition]:
        """The recipe's baselines; when rescoring, those whose predictions were kept."""
        kept = set(predictions.kept_conditions(self.run_dir, self.student)) if self.rescore else None
        return [condition for condition in baselines(self.recipe) if kept is None or condition.name in kept]

    def _selection_jobs(self) -> list[Job]:
        """Every checkpoint on the held-out rows, where one is to be chosen there. Never a row of a scored split."""
        if self.recipe.eval.select != HELD_OUT:
            return []
        held_out = self.examples(HELD_OUT)
        return [Job(c, HELD_OUT, held_out) for arm in self.arms for c in arm.checkpoints.values()]

    def _headline(self) -> tuple[dict[str, int], dict[str, dict[int, float]]]:
        """arm -> the step of its headline row, and what the choice was made on. Of equals the earliest wins."""
        jobs = self._selection_jobs()
        if not jobs:
            return {arm.name: arm.last for arm in self.arms}, {}
        self._answer(jobs)
        accuracy: dict[str, dict[int, float]] = {}
        for condition, split, examples in jobs:
            assert condition.arm is not None and condition.step is not None
            answers = self._files[condition.name, split].predictions
            accuracy.setdefault(condition.arm, {})[condition.step] = _headline_mean(examples, answers, condition.name)
        return {arm: max(sorted(steps), key=steps.__getitem__) for arm, steps in accuracy.items()}, accuracy

    def _jobs(self, headline: Mapping[str, int]) -> list[Job]:
        """Baselines and headline checkpoints on all examples first, then the other checkpoints on the curve's."""
        first = self._baselines()
        first += [arm.checkpoints[headline[arm.name]] for arm in self.arms]
        rest = [c for arm in self.arms for c in arm.checkpoints.values() if c.step != headline[arm.name]]
        splits = self.recipe.eval.splits
        return [Job(c, s, self.examples(s)) for c in first for s in splits] + [
            Job(c, s, self.curve_examples(s)) for c in rest for s in splits
        ]

    # -- what is there

    def _file(self, condition: Condition, split: str) -> PredictionFile:
        key = condition.name, split
        if key not in self._files:
            if self.rescore:
                found = predictions.newest(self.run_dir, self.student, condition.name, split)
                if found is None:
                    raise RunError(
                        f"--rescore: {self.student}/{condition.name} has no predictions on {split}; run "
                        "python -m stage3_eval without --rescore to generate them"
                    )
                check_not_stale(condition, found.identity, self.run_dir, self.student)
                self._files[key] = found
            else:
                identity = self._identity(condition)
                path = predictions.path_of(self.run_dir, self.student, condition.name, split, identity)
                self._files[key] = predictions.load(path, identity)
        return self._files[key]

    def _missing(self, job: Job) -> list[Example]:
        file = self._file(job.condition, job.split)
        return [e for e in job.examples if file.of(e, prompt_digest(e, self._shots(job.condition, e))) is None]

    def _identity(self, condition: Condition) -> dict[str, Any]:
        """Everything that decides what is written, but for the prompt texts, which each line vouches for itself."""
        from pipeline.models import tokenizer_digest

        teacher, student = self.recipe.teacher, self.recipe.students[self.student]
        shots = {"count": teacher.shots, "seed": teacher.shot_seed, "policy": teacher.shot_policy}
        return {
            "student": {"weights": self._weights, "dtype": student.dtype},
            "adapter": condition.adapter_sha256,
            "tokenizer": {"sha256": tokenizer_digest(self._prompts.tokenizer), **self._prompts.describe()},
            "shots": shots if condition.few_shot else None,
            "engine": self.recipe.eval.engine,
            "decoding": {"kind": "greedy", "max_new_tokens": self.recipe.eval.max_new_tokens},
        }

    def _shots(self, condition: Condition, example: Example) -> tuple[Example, ...]:
        return self._training_set.shots.of(example) if condition.few_shot else ()

    # -- generating

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Make every job's answers be there, saying what was there already."""
        missing = [(job, self._missing(job)) for job in jobs]
        todo = sum(len(examples) for _, examples in missing)
        wanted = sum(len(job.examples) for job in jobs)
        what = "on held-out rows " if jobs and jobs[0].split == HELD_OUT else ""
        if not todo:
            if jobs:
                print(f"{self.student}: all {wanted:,} answers {what}are there; no model is loaded", flush=True)
            return
        if self.rescore:
            job, lacking = next((job, examples) for job, examples in missing if examples)
            raise RunError(
                f"--rescore: {self.student}/{job.condition.name} lacks {len(lacking)} of {len(job.examples)} "
                f"predictions on {job.split} (or their prompts have changed); run python -m stage3_eval without "
                "--rescore to generate them"
            )
        print(
            f"{self.student}: {wanted - todo:,} of {wanted:,} answers {what}are there; the other {todo:,} are "
            f"generated by {self.recipe.eval.engine}",
            flush=True,
        )
        if self._engine is None:
            self._load()  # before the progress starts, or the time it takes would spoil the ETA
        with progress(f"stage 3, {self.student}", wanted, "answers", done=wanted - todo) as bar:
            for job, examples in missing:
                if examples:
                    self._generate(job, examples, bar)

    def _generate(self, job: Job, examples: list[Example], bar: Any) -> None:
        """Generate in chunks of similar length, the longest first, saving every so often and at the end."""
        from pipeline.models import provenance

        condition = job.condition
        engine = self._engine
        end_id = self._prompts.end_id
        assert engine is not None
        assert end_id is not None  # PromptBuilder refuses a tokenizer without one
        _check_adapter(condition)
        written_by = {**provenance(), **engine.provenance}
        ids = {example.id: self._prompt_ids(condition, example) for example in examples}
        ordered = sorted(examples, key=lambda e: len(ids[e.id]), reverse=True)
        fresh: list[Prediction] = []
        saved = time.monotonic()
        for start in range(0, len(ordered), engine.chunk):
            chunk = ordered[start : start + engine.chunk]
            answers = engine.generate(
                [ids[example.id] for example in chunk],
                condition.adapter,
                self.recipe.eval.max_new_tokens,
                end_id,
            )
            for example, answer in zip(chunk, answers, strict=True):
                digest = prompt_digest(example, self._shots(condition, example))
                text = self._prompts.text(answer.ids)
                fresh.append(Prediction(example.id, example.task, digest, text, len(answer.ids), answer.finished))
            bar.advance(len(chunk), note=f"{condition.name} on {job.split}")
            if time.monotonic() - saved > _SAVE_EVERY_S or start + len(chunk) == len(ordered):
                key = condition.name, job.split
                self._files[key] = predictions.save(self._files[key], fresh, written_by)
                fresh, saved = [], time.monotonic()

    def _load(self) -> None:
        """The engine, loaded once. Its window must hold the longest prompt of this student."""
        splits = [*self.recipe.eval.splits, *([HELD_OUT] if self._selection_jobs() else [])]
        conditions = {condition.few_shot: condition for condition in baselines(self.recipe)}
        conditions.setdefault(False, Condition("zero_shot"))
        longest = max(
            len(self._prompt_ids(condition, example))
            for condition in conditions.values()
            for split in splits
            for example in self.examples(split)
        )
        self._engine = load_engine(self.recipe, self.student, self._source, longest + self.recipe.eval.max_new_tokens)

    def _prompt_ids(self, condition: Condition, example: Example) -> list[int]:
        key = condition.few_shot, example.id
        if key not in self._ids:
            self._ids[key] = self._prompts.prompt_ids(example.prompt, self._shots(condition, example))
        return self._ids[key]

    # -- what is read once

    @cached_property
    def _training_set(self) -> TrainingSet:
        return training_set(self.recipe)

    @cached_property
    def _source(self) -> "ModelSource":
        from pipeline.models import locate

        settings = self.recipe.students[self.student]
        return locate(settings.model, settings.revision)

    @cached_property
    def _weights(self) -> str:
        """The student's identity, which its arms must have been trained on."""
        weights = self._source.identity()
        for arm in self.arms:
            trained = arm.trained_with.get("student", {}).get("weights", weights)
            if trained != weights:
                raise RunError(
                    f"{self.student}/{arm.name} was trained on other weights ({trained}) than the recipe's student has "
                    f"now ({weights}); score it with that model, or train again with --set run_dir=<folder>"
                )
        return weights

    @cached_property
    def _prompts(self) -> "PromptBuilder":
        from pipeline.models import load_tokenizer
        from pipeline.prompts import PromptBuilder

        return PromptBuilder(load_tokenizer(self._source), self.recipe.teacher.thinking, require_switch=False)


def by_task(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """The examples of each task."""
    tasks: dict[str, list[Example]] = {}
    for example in examples:
        tasks.setdefault(example.task, []).append(example)
    return tasks


def _headline_mean(examples: Sequence[Example], answers: Mapping[str, Prediction], where: str) -> float:
    """Mean of each task's first metric over all examples."""
    values = [
        value
        for members in by_task(examples).values()
        for value in next(iter(score(members, answers, where).values.values()))
    ]
    return mean(values)


def _check_adapter(condition: Condition) -> None:
    """Raise RunError where the adapter's file is not the one its checkpoint recorded."""
    if condition.adapter is None:
        return
    path: Path = condition.adapter / ADAPTER_FILE
    if not path.is_file():
        raise RunError(f"checkpoint {condition.adapter}: found no {ADAPTER_FILE}; remove it and train again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != condition.adapter_sha256:
        raise RunError(
            f"{path}: it is not what was written (SHA-256 {found[:12]}..., state.json says "
            f"{str(condition.adapter_sha256)[:12]}...); remove the checkpoint (rm -r {condition.adapter}), train again"
        )
