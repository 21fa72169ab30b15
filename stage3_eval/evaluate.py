"""One model of a run, from what is wanted to its predictions. Called by `__main__`.

A student answers with its untouched weights and with every checkpoint of its arms, a reference as it is. `answers`
finds and generates; here it is decided what is asked, and which checkpoint stands for an arm.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.errors import RunError
from pipeline.handout import Unit
from pipeline.recipe import Recipe
from pipeline.run_dir import RunDir
from pipeline.tasks import get_task
from stage3_eval import predictions
from stage3_eval.answers import Answers, Job
from stage3_eval.blocks import HELD_OUT, Block, Blocks, by_task
from stage3_eval.conditions import ZERO_SHOT, Condition, TrainedRun, asked, baselines, find_runs, kept_runs
from stage3_eval.predictions import Prediction, PredictionFile
from stage3_eval.score import mean, score
from stage3_eval.subject import Subject


@dataclass(frozen=True)
class Evaluated:
    """A model with everything a report needs.

    runs: the trainings of its arms, none of a reference. headline: run -> the step whose answers stand for it.
    held_out: run -> step -> score on the held-out rows, where a checkpoint was chosen there. files: (condition, block)
    -> its answers, where they lie and what wrote them. missing: condition -> why it was left out of all of these.
    """

    name: str
    runs: tuple[TrainedRun, ...]
    headline: Mapping[str, int]
    held_out: Mapping[str, Mapping[int, float]]
    files: Mapping[tuple[str, str], PredictionFile]
    missing: Mapping[Unit, str] = field(default_factory=dict)

    def answers(self, condition: str, block: str) -> Mapping[str, Prediction]:
        """id -> prediction."""
        return self.files[condition, block].predictions


class ModelRun:
    """One model, by its name among the recipe's students or references. arguments: the `--recipe` and `--set` of this
    run, for hints. rescore: see `Answers`. make: what has the answers of jobs made, condition -> why not; by default
    this process (`Answers.make`). Raises ModelError where its model is not there, RunError where an arm is not the
    recipe's or, when rescoring, nothing was kept.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        blocks: Blocks,
        arguments: Sequence[str] = (),
        rescore: bool = False,
        make: Callable[[Answers, Sequence[Job], str], dict[Unit, str]] = Answers.make,
    ) -> None:
        self.recipe, self.name, self.rescore = recipe, name, rescore
        self.is_student = name in recipe.students
        self.runs: list[TrainedRun] = []
        self._run_dir, self._blocks = RunDir.of(recipe), blocks
        self.missing: dict[Unit, str] = {}
        if self.is_student and rescore:
            self.runs = kept_runs(recipe, self._run_dir, name)
        elif self.is_student:
            self.runs, lacking = find_runs(recipe, self._run_dir, name, arguments)
            self.missing.update(lacking.items())
        self._subject = Subject(recipe, name)
        if not rescore:
            self._subject.look_for()  # now, so that a model that is not there is no surprise after hours
        self.answers, self._make = Answers(recipe, self._subject, blocks, rescore), make
        if rescore and not self.runs and not self._untouched():
            raise RunError(
                f"--rescore: {name} has no predictions under {self._run_dir.root}; run python -m stage3_eval "
                "without --rescore to generate them"
            )

    def evaluate(self) -> Evaluated:
        """Generate what is missing and hand over what could be; a condition that fails is left out with its reason.

        Raises UserError for what concerns all conditions; what was generated is kept.
        """
        if not self.rescore:
            self._check_weights()
        try:
            headline, held_out = self._headline()
            while failures := self._make(self.answers, self._jobs(headline), ""):
                self._leave_out(failures)
                headline, held_out = self._headline()  # where a headline checkpoint is lost, another stands for its arm
        finally:
            self.answers.close()
        jobs = [*self._selection_jobs(), *self._jobs(headline)]
        files = {(c.name, block.name): self.answers.of(c, block) for c, block, _ in jobs}
        return Evaluated(self.name, tuple(self.runs), headline, held_out, files, self.missing)

    def jobs_of(self, wanted: Sequence[tuple[str, str, bool]]) -> list[Job]:
        """Jobs by the names of condition and block, and whether the curve's examples alone are wanted."""
        checkpoints = [c for run in self.runs for c in run.checkpoints.values()]
        conditions = {c.name: c for c in [*self._untouched(), *checkpoints]}
        blocks = {block.name: block for block in [*self._blocks.scored, self._blocks.held_out]}
        if unseen := sorted({condition for condition, _, _ in wanted} - conditions.keys()):
            raise RunError(
                f"{self.name}/{unseen[0]}: expected its checkpoint under {self._run_dir.root}, found "
                f"{', '.join(c.name for c in checkpoints) or 'none'}; does every machine see this folder?"
            )
        return [
            Job(conditions[condition], blocks[block], blocks[block].curve if curve else blocks[block].examples)
            for condition, block, curve in wanted
        ]

    def _leave_out(self, failures: Mapping[Unit, str]) -> None:
        """Go on without these conditions; an arm of which nothing is left is no arm of this report."""
        self.missing |= failures
        kept = []
        for run in self.runs:
            checkpoints = {s: c for s, c in run.checkpoints.items() if c.name not in self.missing}
            if checkpoints:
                kept.append(replace(run, checkpoints=checkpoints))
        self.runs = kept

    def complete(self) -> bool:
        """Whether every prediction is there already. Generates nothing."""
        if any(self.answers.missing(job) for job in self._selection_jobs()):
            return False
        return not any(self.answers.missing(job) for job in self._jobs(self._headline()[0]))

    def _untouched(self) -> list[Condition]:
        """What the model answers without an adapter; when rescoring, that of it which was kept."""
        wanted = baselines(self.recipe) if self.is_student else [Condition(ZERO_SHOT)]
        kept = predictions.kept_conditions(self._run_dir, self.name) if self.rescore else None
        wanted = [condition for condition in wanted if condition.name not in self.missing]
        return [condition for condition in wanted if kept is None or condition.name in kept]

    def _selection_jobs(self) -> list[Job]:
        """Every checkpoint on the held-out rows, where one is to be chosen there. Never a row of a scored block."""
        if self.recipe.eval.select != HELD_OUT:
            return []
        block = self._blocks.held_out
        return [Job(c, block, block.examples) for run in self.runs for c in run.checkpoints.values()]

    def _headline(self) -> tuple[dict[str, int], dict[str, dict[int, float]]]:
        """run -> the step of its headline answers, and what the choice was made on. Of equals the earliest wins."""
        while failures := self._make(self.answers, self._selection_jobs(), "on held-out rows "):
            self._leave_out(failures)
        jobs = self._selection_jobs()
        if not jobs:
            return {run.name: run.last for run in self.runs}, {}
        found: dict[str, dict[int, float]] = {}
        for condition, block, _ in jobs:
            assert condition.run is not None and condition.step is not None
            value = first_metric_mean(self.recipe, block, self.answers.of(condition, block).predictions, condition.name)
            found.setdefault(condition.run, {})[condition.step] = value
        return {run: max(sorted(steps), key=steps.__getitem__) for run, steps in found.items()}, found

    def _jobs(self, headline: Mapping[str, int]) -> list[Job]:
        """The untouched model and headline checkpoints on all examples, then the first seed's others on the curve's."""
        first = [*self._untouched(), *(run.checkpoints[headline[run.name]] for run in self.runs)]
        rest = [
            checkpoint
            for run in self.runs
            if run.is_first
            for checkpoint in run.checkpoints.values()
            if checkpoint.step != headline[run.name]
        ]
        blocks = self._blocks.scored
        jobs = [Job(c, block, block.examples) for c in first for block in blocks if asked(c, block)]
        return jobs + [Job(c, block, block.curve) for c in rest for block in blocks if block.curve]

    def _check_weights(self) -> None:
        """Raise RunError where an arm was trained on other weights than the student's."""
        for run in self.runs:
            trained = run.trained_with.get("student", {}).get("weights")
            if trained is not None and trained != self._subject.weights:
                raise RunError(
                    f"{self.name}/{run.name} was trained on other weights ({trained}) than the recipe's student has "
                    f"now ({self._subject.weights}); score it with that model, or train again with "
                    "--set run_dir=<folder>"
                )


def first_metric_mean(recipe: Recipe, block: Block, answers: Mapping[str, Prediction], where: str) -> float:
    """Mean of each task's first metric over all examples of a block."""
    values: list[float] = []
    for task, members in by_task(block.examples).items():
        first = get_task(task).metrics[0]
        values += score(members, answers, where, recipe.eval.metrics, [first]).measured[first].values
    return mean(values)
