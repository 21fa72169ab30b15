"""Stage 3 on a Ray cluster: a checkpoint or a baseline of a model is a unit of work. Called by `__main__`.

A worker keeps a model's engine and swaps adapters, and writes predictions by the same code as the local executor, into
the run folder that all machines must share. The driver decides what is asked, chooses headline checkpoints, and makes
the report, from those predictions. See stage1_teacher/RAY.md.
"""

import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.cluster import Cluster, started
from pipeline.handout import Handout, Outcome, Unit, failed
from pipeline.progress import progress
from pipeline.recipe import Recipe
from stage3_eval.answers import Answers, CannotSave, Job

if TYPE_CHECKING:
    from stage3_eval.blocks import Blocks
    from stage3_eval.evaluate import ModelRun


class RemoteAnswers:
    """A `pipeline.cluster.Worker`. recipe: as JSON. folder: where relative paths begin.

    What it is told of a unit beside its name: the model, and (condition, block, whether the curve's examples alone).
    """

    def __init__(self, recipe: str, folder: str) -> None:
        self._made_of = recipe, folder
        self._recipe: Recipe | None = None
        self._blocks: Blocks | None = None
        self._run: ModelRun | None = None
        self._made: dict[Unit, int] = {}

    def start(self) -> str:
        """Read the recipe and its examples; "" or what is wrong."""
        recipe, folder = self._made_of

        def load() -> None:
            from stage3_eval.blocks import Blocks

            self._recipe = Recipe.model_validate_json(recipe)
            self._blocks = Blocks(self._recipe)
            _ = self._blocks.scored

        return started(folder, load)

    def work(self, unit: Unit, ours: bool, extra: tuple[str, list[tuple[str, str, bool]]]) -> list[Outcome]:
        """Generate what a condition lacks, loading its model where it is another than the last one's."""
        model, wanted = extra
        self._made = {unit: 0}

        def advance(count: int, what: str) -> None:
            self._made[unit] += count

        try:
            run = self._run_of(model)
            jobs = run.jobs_of(wanted)
            run.answers.forget(jobs)
            lacking = [(job, examples) for job in jobs if (examples := run.answers.missing(job))]
            run.answers.load([c for found in run.runs for c in found.checkpoints.values()])
            return [run.answers.answer(unit, lacking, advance)]
        except CannotSave as error:
            return [Outcome(unit, "stop", f"on {socket.gethostname()}: {error}")]
        except Exception as error:
            error.add_note(f"on {socket.gethostname()}")
            return [failed(unit, error)]

    def finish(self) -> list[Outcome]:
        """Nothing is ever pending."""
        return []

    def progress(self) -> dict[Unit, int]:
        """Answers made of the unit in work."""
        return dict(self._made)

    def _run_of(self, model: str) -> "ModelRun":
        from stage3_eval.evaluate import ModelRun

        if self._run is None or self._run.name != model:
            if self._run is not None:
                self._run.answers.close()
            assert self._recipe is not None and self._blocks is not None, "it was started"
            self._run = None
            self._run = ModelRun(self._recipe, model, self._blocks)
        return self._run


class Crew:
    """The workers of the recipe's cluster, started when the first answer is missing. A context."""

    def __init__(self, recipe: Recipe, worker: type = RemoteAnswers) -> None:
        self._recipe, self._worker = recipe, worker
        self._cluster: Cluster | None = None

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cluster is not None:
            self._cluster.__exit__(kind, error, trace)

    def make(self, answers: Answers, jobs: Sequence[Job], what: str = "") -> dict[Unit, str]:
        """`Answers.make`, by the workers. Raises UserError for what concerns all conditions."""
        lacking = answers.lacking(jobs, what)
        if not lacking:
            return {}
        if self._cluster is None:
            cluster = Cluster(self._recipe, self._worker, (self._recipe.model_dump_json(), str(Path.cwd())))
            self._cluster = cluster.__enter__()
        todo: dict[Unit, list[Job]] = {}
        for job, _ in lacking:
            todo.setdefault(job.condition.name, []).append(job)
        sizes = {unit: sum(len(e) for job, e in lacking if job.condition.name == unit) for unit in todo}
        handout, model = Handout(todo), answers.subject.name

        def missing() -> list[Unit]:
            answers.forget(jobs)
            return [unit for unit, of in todo.items() if any(answers.missing(job) for job in of)]

        def extra(unit: Unit) -> Any:
            return model, [(unit, job.block.name, job.examples != job.block.examples) for job in todo[unit]]

        wanted = sum(len(job.examples) for job in jobs)
        there = wanted - sum(sizes.values())
        with progress(f"stage 3, {model}", wanted, "answers", done=there) as bar:
            self._cluster.run(handout, missing, sizes.__getitem__, lambda done: bar.show(there + done), extra)
        given_up = "; ".join(handout.given_up.values())
        reasons = handout.failures | dict.fromkeys(handout.untried, f"not tried, since {given_up}")
        return reasons | {unit: self._not_seen(answers) for unit in missing() if unit not in reasons}

    def _not_seen(self, answers: Answers) -> str:
        """Why a condition is missing of which a worker said that it is done."""
        return (
            f"its worker says that it is done, but answers to these questions are not in {answers.folder}: does every "
            f"machine see this folder, and the same rows in data.dir ({self._recipe.data.dir or 'from the Hub'})?"
        )
