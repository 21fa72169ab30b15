"""The answers of one model: those that are there are found, those that are missing are generated. Called by `evaluate`.

An error in one condition (an adapter that cannot be loaded, memory that runs out) is its reason to be left out, and the
others go on. Nothing that exists is generated again: a condition is looked up by its identity (weights, adapter,
prompts, engine), an example by its prompt, so a checkpoint scored on the first n examples is extended, not repeated. A
model is loaded only where an answer is missing.

A prompt that does not fit into the model's window together with eval.max_new_tokens is an error in a recipe of one
task, where a setting is wrong. In a mixture it would stop everything for one long document, so there such an example
is not asked: it is kept as too long, counts as wrong, and is counted in the tables. Every condition of a student reads
the same prompts of a block (but the few_shot baseline, whose prompts are longer), so all of them miss the same ones.
A prompt that the tokenizer or the chat template fails on is set aside likewise, in every recipe.
"""

import hashlib
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import stopping
from pipeline.errors import ModelError, RunError, UserError
from pipeline.handout import Handout, Outcome, Unit, failed
from pipeline.progress import progress
from pipeline.recipe import Recipe
from pipeline.run_dir import RunDir
from pipeline.tasks import Example
from stage3_eval import predictions
from stage3_eval.blocks import HELD_OUT, Block, Blocks
from stage3_eval.conditions import ZERO_SHOT, Condition, asked, baselines, check_not_stale
from stage3_eval.generate import ADAPTER_FILE, Engine
from stage3_eval.predictions import Prediction, PredictionFile, prompt_digest
from stage3_eval.subject import Subject

_SAVE_EVERY_S = 20.0


class CannotSave(RunError):
    """The run folder cannot be written: of no use to try the next condition."""


class Job(NamedTuple):
    """Answers that are wanted: of one condition, to some examples of a block."""

    condition: Condition
    block: Block
    examples: tuple[Example, ...]


class Answers:
    """The prediction files of one subject, and the engine that fills them.

    rescore: never generate; take the predictions that were written last, whatever weights wrote them, so that neither
    the model nor its checkpoints are needed. What the recipe itself says of how they are written must agree.
    """

    def __init__(self, recipe: Recipe, subject: Subject, blocks: Blocks, rescore: bool = False) -> None:
        self.recipe, self.subject, self.rescore = recipe, subject, rescore
        self.files: dict[tuple[str, str], PredictionFile] = {}
        self._blocks, self._run_dir = blocks, RunDir.of(recipe)
        self._ids: dict[tuple[str, str], list[int]] = {}
        self._labels: dict[str, list[int]] = {}
        self._engine: Engine | None = None
        self._not_loaded = ""  # why the model could not be

    def of(self, condition: Condition, block: Block) -> PredictionFile:
        """The answers that are there to the examples of a block, and to these very prompts: an id alone may be that of
        another row, where a file was written from other data."""
        file, job = self._file(condition, block), Job(condition, block, block.examples)
        found = [file.of(example, self._digest(job, example)) for example in block.examples]
        return replace(file, predictions={prediction.id: prediction for prediction in found if prediction})

    @property
    def folder(self) -> Path:
        """Where the predictions lie."""
        return self._run_dir.predictions(self.subject.name, ZERO_SHOT).parent

    def missing(self, job: Job) -> list[Example]:
        """The examples of a job that have no answer yet."""
        file = self._file(job.condition, job.block)
        return [e for e in job.examples if file.of(e, self._digest(job, e)) is None]

    def make(self, jobs: Sequence[Job], what: str = "") -> dict[Unit, str]:
        """Make every job's answers be there, saying what was there already; condition -> why it could not be done.

        Raises UserError for what concerns all conditions; what was made is kept.
        """
        lacking = self.lacking(jobs, what)
        if not lacking:
            return {}
        handout = Handout(dict.fromkeys(job.condition.name for job, _ in lacking))
        try:
            self.load([job.condition for job, _ in lacking])  # before the progress starts, or it would spoil the ETA
        except RunError:
            raise
        except Exception as error:  # a model that cannot be loaded leaves the others to be scored
            return dict.fromkeys(handout.waiting, failed("", error).reason)
        wanted, todo = (sum(len(of) for of in each) for each in ([j.examples for j in jobs], [e for _, e in lacking]))
        shown = progress(f"stage 3, {self.subject.name}", wanted, "answers", done=wanted - todo)
        with stopping.deferred("the batch in work is kept"), shown as bar:
            while not stopping.requested() and (name := handout.next(0)) is not None:
                mine = [(job, examples) for job, examples in lacking if job.condition.name == name]
                handout.settle(0, self.answer(name, mine, bar.advance))
        return handout.failures | dict.fromkeys(handout.untried, f"not tried, since {handout.given_up.get(0)}")

    def lacking(self, jobs: Sequence[Job], what: str = "") -> list[tuple[Job, list[Example]]]:
        """The jobs with the examples that are to be generated for them, and a line that says how many.

        Prompts that are too long are kept as such. Raises RunError where there are any and the recipe has one task, and
        for anything to be generated when rescoring.
        """
        lacking = [(job, self.missing(job)) for job in jobs]
        todo = sum(len(examples) for _, examples in lacking)
        wanted = sum(len(job.examples) for job in jobs)
        name = self.subject.name
        if not todo:
            if jobs:
                print(f"{name}: all {wanted:,} answers {what}are there; no model is loaded", flush=True)
            return []
        if self.rescore:
            job, examples = next((job, examples) for job, examples in lacking if examples)
            raise RunError(
                f"--rescore: {name}/{job.condition.name} lacks {len(examples)} of {len(job.examples)} predictions on "
                f"{job.block.name} (or their prompts have changed); run python -m stage3_eval without --rescore to "
                "generate them"
            )
        print(
            f"{name}: {wanted - todo:,} of {wanted:,} answers {what}are there; the other {todo:,} are generated by "
            f"{self.subject.engine}",
            flush=True,
        )
        lacking = [(job, self._set_aside(job, examples)) for job, examples in lacking if examples]
        return [(job, examples) for job, examples in lacking if examples]

    def answer(
        self, name: Unit, lacking: Sequence[tuple[Job, list[Example]]], advance: Callable[[int, str], object]
    ) -> Outcome:
        """Generate what some jobs of one condition lack, and say what became of it: the same on a cluster.

        advance: called with the number of answers made, and for what. Raises CannotSave.
        """
        try:
            for job, examples in lacking:
                if not stopping.requested():
                    self._generate(job, examples, advance)
        except CannotSave:
            raise
        except Exception as error:
            return failed(name, error)
        return Outcome(name, "done")

    def load(self, conditions: Sequence[Condition]) -> None:
        """The engine, loaded once, with room for every prompt of the run that fits at all, and for these adapters.

        Raises what loading raises, and ModelError for a model that could not be loaded before: it is not tried again
        for every checkpoint that steps in for another.
        """
        if self._engine is not None:
            return
        if self._not_loaded:
            raise ModelError(self._not_loaded)
        select = [self._blocks.held_out] if self.recipe.eval.select == HELD_OUT else []
        kinds = [Condition(ZERO_SHOT), *(c for c in baselines(self.recipe) if c.few_shot)]
        jobs = [Job(kind, block, block.examples) for kind in kinds for block in [*self._blocks.scored, *select]]
        needed = [self._tokens_needed(job, e) for job in jobs if asked(*job[:2]) for e in job.examples]
        room = self.subject.window or math.inf
        longest = int(max(tokens for tokens in needed if tokens <= room and tokens < math.inf))
        try:
            self._engine = self.subject.load(longest, sorted({c.adapter for c in conditions if c.adapter}))
        except Exception as error:
            self._not_loaded = failed("", error).reason
            raise

    def forget(self, jobs: Sequence[Job]) -> None:
        """Read these jobs' files again when they are asked for: another process has written them."""
        for job in jobs:
            self.files.pop((job.condition.name, job.block.name), None)

    def close(self) -> None:
        """Free the model's memory, and that of its prompts."""
        self._ids.clear()
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    # -- what is there

    def _file(self, condition: Condition, block: Block) -> PredictionFile:
        key, name = (condition.name, block.name), self.subject.name
        if key in self.files:
            return self.files[key]
        if self.rescore:
            found = predictions.newest(self._run_dir, name, *key)
            if found is None:
                raise RunError(
                    f"--rescore: {name}/{condition.name} has no predictions on {block.name}; run python -m stage3_eval "
                    "without --rescore to generate them"
                )
            check_not_stale(condition, found.identity, self._run_dir, name)
            self._check_settings(found)
            self.files[key] = found
        else:
            identity = self._identity(condition, block)
            self.files[key] = predictions.load(predictions.path_of(self._run_dir, name, *key, identity), identity)
        return self.files[key]

    def _identity(self, condition: Condition, block: Block) -> dict[str, Any]:
        """Everything that decides what is written, but for the prompt texts, which each line vouches for itself."""
        shots = self._blocks.training_set.shots if condition.few_shot else block.shots
        return {
            **self.subject.identity(),
            "adapter": condition.adapter_sha256,
            "shots": {"count": shots.count, "seed": shots.seed, "policy": shots.policy} if shots else None,
            **self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        """The part of an identity that the recipe alone knows."""
        return {
            "engine": self.subject.engine,
            "decoding": {"kind": "greedy", "max_new_tokens": self.recipe.eval.max_new_tokens},
        }

    def _check_settings(self, found: PredictionFile) -> None:
        """Raise RunError where kept predictions were made with other settings than the recipe's."""
        made = {**found.identity, **found.identity.get(self.subject.kind, {})}
        asked = {**self.subject.arithmetic, **self._settings()}
        differing = [
            f"  {key}: made with {made.get(key)}, the recipe says {value}"
            for key, value in asked.items()
            if made.get(key) != value
        ]
        if differing:
            raise RunError(
                "\n".join([f"--rescore: {found.path} was made with other settings:", *differing])
                + "\nTwo ways out: rescore with the recipe and the --set it was made with, or run python -m "
                "stage3_eval without --rescore"
            )

    def _shots(self, job: Job, example: Example) -> tuple[Example, ...]:
        shots = self._blocks.training_set.shots if job.condition.few_shot else job.block.shots
        return shots.of(example) if shots else ()

    def _digest(self, job: Job, example: Example) -> str:
        return prompt_digest(example, self._shots(job, example))

    # -- generating

    def _set_aside(self, job: Job, examples: Sequence[Example]) -> list[Example]:
        """The examples whose prompts fit; of a mixture the others are kept as too long (see the module's text)."""
        window = self.subject.window or math.inf
        needed = {e.id: self._tokens_needed(job, e) for e in examples}
        unreadable = [e for e in examples if math.isinf(needed[e.id])]
        too_long = [e for e in examples if window < needed[e.id] < math.inf]
        if too_long and len(self.recipe.data.tasks) == 1:
            longest = max(needed[e.id] for e in too_long)
            raise RunError(
                f"the longest prompt and eval.max_new_tokens are {longest} tokens together, but the model "
                f"reads {window} at most; lower eval.max_new_tokens, or teacher.shots for the few_shot baseline"
            )
        aside = [
            (too_long, f"leave no room for an answer in a window of {window} tokens"),
            (unreadable, "are nothing that its tokenizer or chat template can read"),
        ]
        written_by = self._file(job.condition, job.block).provenance or {"engine": self.subject.engine}
        for lost, why in aside:
            if lost:
                self._save(job, [Prediction.unanswered(e, self._digest(job, e)) for e in lost], written_by)
                print(
                    f"{self.subject.name}: {len(lost)} of {len(examples)} prompts of {job.condition.name} on "
                    f"{job.block.name} {why}; they count as wrong",
                    flush=True,
                )
        ids = {example.id for lost, _ in aside for example in lost}
        return [example for example in examples if example.id not in ids]

    def _generate(self, job: Job, examples: list[Example], advance: Callable[[int, str], object]) -> None:
        """Generate in chunks of similar length, the longest first, saving every so often and at the end."""
        from pipeline.models import provenance

        assert self._engine is not None
        _check_adapter(job.condition)
        written_by = {**provenance(), **self._engine.provenance}
        ordered = sorted(examples, key=lambda e: len(self._prompt_ids(job, e)), reverse=True)
        fresh: list[Prediction] = []
        saved = time.monotonic()
        for start in range(0, len(ordered), self._engine.chunk):
            chunk = ordered[start : start + self._engine.chunk]
            fresh += self._answered(job, chunk, self._engine)
            advance(len(chunk), f"{job.condition.name} on {job.block.name}")
            stop = stopping.requested()
            if stop or time.monotonic() - saved > _SAVE_EVERY_S or start + len(chunk) == len(ordered):
                self._save(job, fresh, written_by)
                fresh, saved = [], time.monotonic()
            if stop:
                return

    def _answered(self, job: Job, chunk: Sequence[Example], engine: Engine) -> list[Prediction]:
        """What the engine says of some examples: its answer and, where there are labels, how likely each of them is."""
        builder, adapter = self.subject.prompts, job.condition.adapter
        assert builder.end_id is not None  # PromptBuilder refuses a tokenizer without one
        ids = {e.id: self._prompt_ids(job, e) for e in chunk}
        answers = engine.generate(list(ids.values()), adapter, self.recipe.eval.max_new_tokens, builder.end_id)
        labelled = [e for e in chunk if e.labels]
        logprobs: dict[str, tuple[float, ...]] = {}
        if labelled:
            labels = [[self._label_ids(label) for label in e.labels] for e in labelled]
            found = engine.label_logprobs([ids[e.id] for e in labelled], labels, adapter)
            logprobs = {e.id: tuple(values) for e, values in zip(labelled, found, strict=True)}
        return [
            Prediction(
                id=e.id,
                task=e.task,
                prompt=self._digest(job, e),
                prediction=builder.text(answer.ids),
                tokens=len(answer.ids),
                finished=answer.finished,
                label_logprobs=logprobs.get(e.id),
            )
            for e, answer in zip(chunk, answers, strict=True)
        ]

    def _save(self, job: Job, fresh: Sequence[Prediction], written_by: Mapping[str, Any]) -> None:
        key = job.condition.name, job.block.name
        try:
            self.files[key] = predictions.save(self.files[key], fresh, written_by)
        except RunError as error:
            raise CannotSave(str(error)) from None

    def _prompt_ids(self, job: Job, example: Example) -> list[int]:
        key = (job.condition.name if job.condition.few_shot else job.block.name, example.id)
        if key not in self._ids:
            self._ids[key] = self.subject.prompts.prompt_ids(example.prompt, self._shots(job, example))
        return self._ids[key]

    def _label_ids(self, label: str) -> list[int]:
        """A label as a whole answer, end-of-sequence included; it has the same ids after any prompt."""
        if label not in self._labels:
            self._labels[label] = self.subject.prompts.encode("", label).answer_ids
        return self._labels[label]

    def _tokens_needed(self, job: Job, example: Example) -> float:
        """Of the model's window, for a prompt and what may follow it; vLLM generates one token more after a label.
        Infinite where the prompt cannot be built."""
        try:
            prompt_ids = self._prompt_ids(job, example)
        except (UserError, MemoryError):
            raise
        except Exception:  # whatever a tokenizer or a chat template raises at one text
            return math.inf
        labels = [len(self._label_ids(label)) + 1 for label in example.labels]
        return self.subject.tokens_needed(len(prompt_ids), max([self.recipe.eval.max_new_tokens, *labels]))


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
            f"{str(condition.adapter_sha256)[:12]}...); remove the checkpoint "
            f"(rm -r {shlex.quote(str(condition.adapter))}), train again"
        )
