"""One model of a run, from what is wanted to its predictions. Called by `__main__`.

A student answers with its untouched weights and with every checkpoint of its arms, a reference as it is. `answers`
finds and generates; here it is decided what is asked, and which checkpoint stands for an arm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import RunError
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
    -> its answers, where they lie and what wrote them.
    """

    name: str
    runs: tuple[TrainedRun, ...]
    headline: Mapping[str, int]
    held_out: Mapping[str, Mapping[int, float]]
    files: Mapping[tuple[str, str], PredictionFile]

    def answers(self, condition: str, block: str) -> Mapping[str, Prediction]:
        """id -> prediction."""
        return self.files[condition, block].predictions


class ModelRun:
    """One model, by its name among the recipe's students or references. arguments: the `--recipe` and `--set` of this
    run, for hints. rescore: see `Answers`. Raises ModelError where its model is not there, RunError where an arm is
    not the recipe's or, when rescoring, nothing was kept.
    """

    def __init__(
        self, recipe: Recipe, name: str, blocks: Blocks, arguments: Sequence[str] = (), rescore: bool = False
    ) -> None:
        self.recipe, self.name, self.rescore = recipe, name, rescore
        self.is_student = name in recipe.students
        self.runs: list[TrainedRun] = []
        self.notes: list[str] = []
        self._run_dir, self._blocks = RunDir.of(recipe), blocks
        if self.is_student and rescore:
            self.runs = kept_runs(recipe, self._run_dir, name)
        elif self.is_student:
            self.runs, self.notes = find_runs(recipe, self._run_dir, name, arguments)
        self._subject = Subject(recipe, name)
        if not rescore:
            self._subject.look_for()  # now, so that a model that is not there is no surprise after hours
        self._answers = Answers(recipe, self._subject, blocks, rescore)
        if rescore and not self.runs and not self._untouched():
            raise RunError(
                f"--rescore: {name} has no predictions under {self._run_dir.root}; run python -m stage3_eval "
                "without --rescore to generate them"
            )

    def evaluate(self) -> Evaluated:
        """Generate what is missing and hand everything over. Raises UserError; what was generated is kept."""
        if not self.rescore:
            self._check_weights()
        try:
            headline, held_out = self._headline()
            self._answers.make(self._jobs(headline))
        finally:
            self._answers.close()
        return Evaluated(self.name, tuple(self.runs), headline, held_out, self._answers.files)

    def complete(self) -> bool:
        """Whether every prediction is there already. Generates nothing."""
        if any(self._answers.missing(job) for job in self._selection_jobs()):
            return False
        return not any(self._answers.missing(job) for job in self._jobs(self._headline()[0]))

    def _untouched(self) -> list[Condition]:
        """What the model answers without an adapter; when rescoring, that of it which was kept."""
        wanted = baselines(self.recipe) if self.is_student else [Condition(ZERO_SHOT)]
        kept = predictions.kept_conditions(self._run_dir, self.name) if self.rescore else None
        return [condition for condition in wanted if kept is None or condition.name in kept]

    def _selection_jobs(self) -> list[Job]:
        """Every checkpoint on the held-out rows, where one is to be chosen there. Never a row of a scored block."""
        if self.recipe.eval.select != HELD_OUT:
            return []
        block = self._blocks.held_out
        return [Job(c, block, block.examples) for run in self.runs for c in run.checkpoints.values()]

    def _headline(self) -> tuple[dict[str, int], dict[str, dict[int, float]]]:
        """run -> the step of its headline answers, and what the choice was made on. Of equals the earliest wins."""
        jobs = self._selection_jobs()
        if not jobs:
            return {run.name: run.last for run in self.runs}, {}
        self._answers.make(jobs, "on held-out rows ")
        found: dict[str, dict[int, float]] = {}
        for condition, block, _ in jobs:
            assert condition.run is not None and condition.step is not None
            value = first_metric_mean(self.recipe, block, self._answers.of(condition, block), condition.name)
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
