"""A training step from the cache, against the same step without a teacher and with one that reads along.

    python benchmarks/stage2_cost.py [--model pocket pocket-uld mid] [--device cpu] [--data FOLDER] [--rounds 5]

`distill` and `sft` are the recipe's arms, run by the trainer's own steps, prefetch included. The online step is the
same step on the same student, batch and losses, but for where the teacher's numbers come from:

    as published   the teacher reads worked examples, prompt and answer in every step; full logits, then its top K
    best           the worked examples' KV cache is kept, and the head runs on answer rows only

Before anything is timed, all three must give the same losses. Peak memory counts weights, adapter, optimizer and
batches: torch.cuda.max_memory_allocated on a GPU, torch's own record of every allocation on a processor.
"""

import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import stand_ins
import torch
from harness import Row, side_by_side
from torch import Tensor

from cache_schema.reader import CacheReader
from pipeline.alignment import NONE, align
from pipeline.models import head_scale
from pipeline.prompts import PromptBuilder
from pipeline.sections import Arm
from stage1_teacher.__main__ import fill
from stage1_teacher.teacher import CausalTeacher, FullLogitsTeacher, TeacherInput, load_teacher
from stage1_teacher.topk import select_top_k
from stage2_student.arms import alignment_of, plan
from stage2_student.batches import Batch, Collator, Teacher
from stage2_student.group import Group
from stage2_student.order import batch_indices
from stage2_student.student import Student
from stage2_student.train import flat_gradients, prefetched, take_step
from stage2_student.usable import lengths, usable_rows

Step = Callable[[], dict[str, float]]
SHAPES = {"mid": (4, 2), "pocket": (32, 32), "pocket-uld": (16, 16)}  # examples of a step, and of a micro-batch


class Training:
    """One student with a freshly made cache, and steps of its arms on it. All share the adapter and the optimizer."""

    def __init__(self, name: str, args: Namespace) -> None:
        self.batch_size, micro = SHAPES.get(name, (32, 8))
        settings = [f"train.batch_size={self.batch_size}", f"train.micro_batch_size={micro}", "train.repeats=1"]
        self.experiment = stand_ins.experiment(name, args, 8 * self.batch_size, settings=settings)
        self.recipe = self.experiment.recipe
        shutil.rmtree(self.experiment.cache_dir, ignore_errors=True)
        fill(self.experiment, ["benchmarks"])
        self.reader = CacheReader.open(self.experiment.cache_dir, expect=self.experiment.identity)
        self.arms = {arm.run.arm: arm for arm in plan(self.experiment)}
        first = self.arms["sft"].student
        self.group = Group.join(cpu=args.device == "cpu")
        self.device = self.group.accelerator.device
        self.student = Student(first.source, self.recipe.students[first.name], 0, self.device)
        self.prompts = first.prompts
        found = lengths(self.reader, self.prompts, range(len(self.reader)))
        self.usable = usable_rows(found, self.prompts, self.student.window)
        self.parameters = list(self.student.parameters.values())
        self.gradients = flat_gradients(self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.recipe.train.lr, weight_decay=0.0)

    def collator(self, arm: str) -> Collator:
        """The trainer's, for an arm of the recipe."""
        losses = self.recipe.arms[arm]
        alignment = alignment_of(losses, self.recipe.train)
        return Collator(self.reader, self.prompts, self.student.vocab_size, losses, alignment)

    def rows_of(self, step: int) -> list[int]:
        """The rows of a step, by the trainer's own order."""
        chosen = batch_indices(step, self.batch_size, len(self.usable.rows), 0)
        return [self.usable.rows[i] for i in chosen]

    def step(self, arm: str, collator: Collator, student: Any = None) -> Step:
        """A call is the next step of that arm, as the trainer takes it; `student` may wrap the real one."""
        settings = self.recipe.train

        def load(step: int) -> list[Batch]:
            return collator.read(self.rows_of(step), settings.micro_batch_size)

        loaded = prefetched(load, range(1_000_000))

        def one() -> dict[str, float]:
            step, batches = next(loaded)
            assert not isinstance(batches, Exception), batches
            who = student or self.student
            losses, plan = self.recipe.arms[arm], self.arms[arm]
            taken = take_step(self.group, who, self.optimizer, self.gradients, plan, losses, settings, step, batches)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return taken

        return one

    def steps(self) -> dict[str, Step]:
        """distill, sft and the online steps by name."""
        steps = {arm: self.step(arm, self.collator(arm)) for arm in ("distill", "sft")}
        teacher: Any = load_teacher(self.recipe, lambda: 0)
        for name, read in readers(
            teacher, self.context(), self.recipe.cache.top_k, self.recipe.arms["distill"]
        ).items():
            collator = OnlineCollator(self)
            steps[name] = self.step("distill", collator, Online(self.student, collator, read))
        return steps

    def context(self) -> list[int]:
        """The ids of the worked examples."""
        return stand_ins.context_of(self.experiment) if self.recipe.teacher.kind == "causal" else []


Read = Callable[[Sequence[TeacherInput]], Teacher]


def readers(teacher: FullLogitsTeacher, context: list[int], k: int, arm: Arm) -> dict[str, Read]:
    """Ways to read a micro-batch's answer rows. The head runs in the model's dtype, as an online trainer's would."""
    head = teacher.model.get_output_embeddings()
    teacher.head = lambda hidden_NH: head(hidden_NH * head_scale(teacher.model)).float()  # type: ignore[attr-defined]

    def kept(chunks_NV: Any) -> Teacher:
        """Only what the arm's losses use."""
        if arm.needs_ids and not arm.kl:
            found = [logits_NV.topk(k, dim=1) for logits_NV in chunks_NV]
            values, ids = torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
            return Teacher(values, ids, values[:, 0], None, ids[:, 0] >= 0)
        parts = [select_top_k(logits_NV, k, [arm.temperature]) for logits_NV in chunks_NV]
        logits, ids, sums, tails, finite = (
            torch.cat([getattr(part, field.name) for part in parts]) for field in fields(parts[0])[:5]
        )
        return Teacher(logits, ids, sums[:, 0], tails[:, 0], finite)

    @torch.no_grad()
    def published(batch: Sequence[TeacherInput]) -> Teacher:
        device, longest = teacher.model.device, max(len(item.input_ids) - 1 for item in batch)
        ids_BL = torch.tensor([[*item.input_ids[:-1], *[0] * (longest + 1 - len(item.input_ids))] for item in batch])
        lengths_B = torch.tensor([len(item.input_ids) - 1 for item in batch])
        mask_BL = (torch.arange(longest) < lengths_B[:, None]).long()
        logits_BLV = teacher.model(
            input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), use_cache=False
        ).logits
        return kept([logits_BLV[b, item.first_row : len(item.input_ids) - 1].float() for b, item in enumerate(batch)])

    def best(batch: Sequence[TeacherInput]) -> Teacher:
        return kept(teacher.answer_logits(batch, context))

    if isinstance(teacher, CausalTeacher):
        return {"online, as published": published, "online, best": best}
    return {"online": best}  # an encoder reads each prompt as a whole: there is nothing to share


class OnlineCollator(Collator):
    """Batches of text, and what the teacher is to read for them. `read` is called by the prefetch thread."""

    def __init__(self, training: Training) -> None:
        losses = training.recipe.arms["distill"]
        super().__init__(
            training.reader, training.prompts, training.student.vocab_size, Arm(ce=1.0), training.recipe.train.alignment
        )
        self.mode = alignment_of(losses, training.recipe.train)
        experiment = training.experiment
        self.theirs: PromptBuilder = experiment.teacher_prompts
        self.shots = experiment.training_set.shots
        self.examples = {example.id: example for example in experiment.training_set.cached}
        self.inputs: dict[str, TeacherInput] = {}

    def collate(self, rows: Any, padding: Any = "right") -> Batch:
        """The text batch; `teacher.ids_NK` says at which of the teacher's rows each position looks, one column."""
        batch = super().collate(rows, padding)
        at, before = [], 0
        for row in rows:
            example = self.examples[row.example_id]
            theirs = self.theirs.encode(example.prompt, example.answer, self.shots.of(example))
            ours = self.prompts.encode(row.prompt, row.answer)
            item = TeacherInput(theirs.input_ids, theirs.answer_start - 1, theirs.encoder_ids)
            self.inputs[row.example_id] = item
            offsets = [torch.tensor(e.answer_offsets).numpy() for e in (theirs, ours)]
            found = align(self.mode, *offsets, self.same_tokenizer and theirs.answer_ids == ours.answer_ids)
            at.append(torch.from_numpy(found.copy()) + (torch.from_numpy(found.copy()) != NONE) * before)
            before += item.rows
        at_N = torch.cat(at)
        nothing = torch.empty(len(at_N), 0)
        return replace(batch, teacher=Teacher(nothing, at_N[:, None], at_N.float(), None, at_N != NONE))


class Online:
    """The student, whose teacher reads each micro-batch when it is its turn."""

    def __init__(self, student: Student, collator: OnlineCollator, read: Read) -> None:
        self.student, self.collator, self.read = student, collator, read

    def backward(self, batch: Batch, *settings: Any) -> Tensor:
        """See Student."""
        assert batch.teacher is not None and batch.teacher.ids_NK is not None
        read, usable_N = self.read([self.collator.inputs[i] for i in batch.example_ids]), batch.teacher.usable_N
        at_N = batch.teacher.ids_NK[:, 0].clamp(min=0)
        rows = {f.name: v.index_select(0, at_N) for f in fields(read) if (v := getattr(read, f.name)) is not None}
        return self.student.backward(
            replace(batch, teacher=replace(read, **rows | {"usable_N": usable_N & rows["usable_N"]})), *settings
        )


def check_losses(training: Training, steps: dict[str, Step], tolerance: float) -> None:
    """Take each one's first step, undoing its update: the batch and the adapter are the same, so the losses must be."""
    adapter = [parameter.detach().clone() for parameter in training.parameters]
    losses = {}
    for name, step in steps.items():
        losses[name] = step()["loss"]
        with torch.no_grad():
            for parameter, before in zip(training.parameters, adapter, strict=True):
                parameter.copy_(before)
    losses.pop("sft")
    expected = losses["distill"]
    for name, loss in losses.items():
        assert abs(loss - expected) <= tolerance * abs(expected), f"{name}: loss {loss}, from the cache {expected}"
    print("losses of the first step", losses)


def peak_bytes(training: Training, arm: str) -> tuple[int, int]:
    """(what lies there all the time, the most that a step adds to it), in bytes; of the second batch in order."""
    collator, model = training.collator(arm), training.student.model
    step = training.step(arm, collator)
    tensors = [*model.parameters(), *model.buffers(), training.gradients]
    tensors += [moment for state in training.optimizer.state.values() for moment in state.values()]
    if training.device.type == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        step()
        return resident, torch.cuda.max_memory_allocated() - resident
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    live = most = 0
    changes = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for change in sorted(changes, key=lambda e: e.start_ns()):
        live += change.nbytes()
        most = max(most, live)
    batches = collator.read(training.rows_of(1), training.recipe.train.micro_batch_size)
    parts = [part for batch in batches for part in (batch, batch.teacher) if part is not None]
    loaded = [value for part in parts for value in vars(part).values()]
    tensors += [v for v in loaded if isinstance(v, Tensor)] * 2  # this step's and the next one's
    return sum(t.numel() * t.element_size() for t in tensors), most


def measure(name: str, args: Namespace) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one model, and its conditions."""
    training = Training(name, args)
    steps = training.steps()
    check_losses(training, steps, 1e-3 if args.device == "cpu" else 0.05)
    online = [step for step in steps if step.startswith("online")]
    pair = side_by_side({arm: steps[arm] for arm in ("distill", "sft")}, 3 * args.rounds, warmup=2)
    again = training.step("distill", training.collator("distill"))
    again()  # now at the same batch as the online ones: lengths differ, and a step of few examples with them
    times = side_by_side({"distill": again} | {name: steps[name] for name in online}, args.rounds)
    what = f"stage 2 step, `distill` from the cache ({name})"
    rows = [Row.of_times(what, "the same step, `sft`", pair["distill"], pair["sft"], "<= 1.05")]
    for other in online:
        goal = "<= 0.60" if other.endswith("as published") else "< 1"
        rows.append(Row.of_times(what, f"the same step, {other}", times["distill"], times[other], goal))
    (resident, most), (resident_sft, most_sft) = (peak_bytes(training, arm) for arm in ("distill", "sft"))
    ratio = (resident + most) / (resident_sft + most_sft)
    mib = f"{(resident + most) / 2**20:,.0f} MiB, of which a step adds {most / 2**20:,.0f}; sft {most_sft / 2**20:,.0f}"
    rows.append(Row.single(f"stage 2 peak memory, `distill` ({name})", "`sft`", ratio, "<= 1.10", note=mib))
    seconds = {step: sorted(found)[len(found) // 2] for step, found in (times | {"sft": pair["sft"]}).items()}
    return rows, stand_ins.describe(training.experiment) | {
        "batch": training.batch_size,
        "micro_batch": training.recipe.train.micro_batch_size,
        "step_s": {step: round(found, 4) for step, found in seconds.items()},
    }


if __name__ == "__main__":
    raise SystemExit(stand_ins.run("stage2_cost", __doc__, measure, stand_ins.MEASURED, rounds=5))
