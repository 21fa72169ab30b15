"""Hand a trained student over: an adapter in peft's layout or a merged model, with a model card. EXPORT.md has more.

    python -m stage2_student.export --recipe pocket --to DIR [--checkpoint STUDENT/ARM@STEP] [--merge]
                                    [--base NAME] [--push OWNER/NAME] [--private]

Started by `python -m pipeline export`, or by hand. DIR is written whole or not at all, and never over anything.
"""

import hashlib
import json
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli import guarded, parsed, recipe_arguments, recipe_of, recipe_parser
from pipeline.commands.export import EXAMPLES, add_export_arguments
from pipeline.errors import RecipeError, RunError, UserError, first_line, unknown_name
from pipeline.output import result

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.fingerprint import Experiment
    from pipeline.recipe import Recipe
    from stage2_student.arms import ArmPlan
    from stage2_student.model_card import Reported

MERGE_BOUND = 1e-4  # of the largest logit: how far merged logits in float32 may lie from the adapter's
_PROBES = 4  # examples on which both are computed


@dataclass(frozen=True)
class Merged:
    """How far a merged model's logits lie from those of base and adapter, at the answer positions of some examples.

    All against float32: exact is the merge itself, written is after rounding to the dtype that is written. agree: the
    share of positions where the written model's first choice is the adapter's.
    """

    dtype: str
    positions: int
    exact: float
    written: float
    largest: float
    agree: float


def main(argv: Sequence[str] | None = None) -> int:
    """Find the checkpoint, write the folder, upload it if asked to."""
    parser = recipe_parser("stage2_student.export", "Hand a trained student over.", EXAMPLES[:3])
    add_export_arguments(parser)
    args = parsed(parser, argv)
    recipe = recipe_of(args)
    from pipeline.fingerprint import Experiment
    from pipeline.handover import check_empty, push
    from pipeline.run_dir import RunDir
    from stage2_student.model_card import Reported

    to = Path(args.to).expanduser().absolute()
    check_empty(to)
    experiment, run_dir = Experiment(recipe), RunDir.of(recipe)
    report = Reported.of(run_dir)
    arm, step = chosen(experiment, report, args.checkpoint, recipe_arguments(args))
    base = args.base or recipe.students[arm.student.name].model
    if arm.student.source.is_folder and args.base is None:
        base = str(Path(arm.student.source.location).absolute())
        if args.push and not args.merge:
            raise RecipeError(
                f"--push {args.push}: this adapter's base model is a folder of this machine ({base}), which nobody "
                "else can load; add --merge, or --base OWNER/NAME if the Hub has it"
            )
    write(experiment, report, arm, step, to, base, recipe_arguments(args), merge=args.merge, load_from=args.push)
    kind = "model" if args.merge else "adapter"
    result(f"{kind}  {arm.label}@{step}: {to}", kind=kind, checkpoint=f"{arm.label}@{step}", folder=str(to))
    if not args.merge and Path(base).is_absolute():
        print(f"         its base model is {base}, a folder of this machine; for others: --merge, or --base OWNER/NAME")
    if args.push:
        uploaded = push(to, args.push, private=args.private)
        result(f"uploaded {uploaded}", uploaded=uploaded)
    return 0


def chosen(
    experiment: "Experiment", report: "Reported", wanted: str | None, arguments: Sequence[str]
) -> "tuple[ArmPlan, int]":
    """The training and the step that `STUDENT/ARM@STEP` names; without a step the report's headline, else the last.

    None: the only student's first arm that reads the teacher, else its only arm. Raises RecipeError listing what there
    is, and as `arms.plan` does where an arm was trained with other settings than the recipe's.
    """
    from stage2_student.arms import plan
    from stage2_student.checkpoint import complete_steps

    arms = {arm.label: arm for arm in plan(experiment) if arm.done}
    if not arms:
        train = shlex.join(["python", "-m", "stage2_student", *arguments])
        raise RunError(f"there is no checkpoint yet of {experiment.recipe.name}; to train: {train}")
    steps = {label: complete_steps(arm.folder.checkpoints) for label, arm in arms.items()}
    there = "There are: " + ", ".join(f"{label}@{step}" for label, found in steps.items() for step in found)
    label, at, number = (wanted or _default(experiment.recipe, arms, there)).partition("@")
    if label not in arms:
        raise RecipeError(f"--checkpoint {wanted}: {unknown_name('checkpoint', label, list(arms))} {there}")
    arm = arms[label]
    if not at:
        headline = report.headline(arm.student.name, arm.run.name)
        return arm, headline if headline in steps[label] else steps[label][-1]
    if not number.isdecimal() or int(number) not in steps[label]:
        raise RecipeError(f"--checkpoint {wanted}: found no complete checkpoint of step {number}. {there}")
    return arm, int(number)


def _default(recipe: "Recipe", arms: "dict[str, ArmPlan]", there: str) -> str:
    """The label of what is exported where nothing was asked for."""
    distilled = [label for label, arm in arms.items() if recipe.arms[arm.run.arm].needs_teacher]
    if len(recipe.students) > 1 or not (distilled or len(arms) == 1):
        raise RecipeError(f"--checkpoint STUDENT/ARM@STEP is needed: it is not plain which to hand over. {there}")
    return (distilled or list(arms))[0]


def write(
    experiment: "Experiment",
    report: "Reported",
    arm: "ArmPlan",
    step: int,
    to: Path,
    base: str,
    arguments: Sequence[str],
    *,
    merge: bool,
    load_from: str | None = None,
) -> None:
    """The folder `to`: weights, tokenizer and README.md. base: what others load as the base model.

    load_from: what the card's example loads, `to` itself unless given. Raises RunError where the checkpoint is not
    what was written, or the merge does not do what the adapter does.
    """
    from pipeline.handover import whole_folder
    from stage2_student.model_card import model_card

    checkpoint = arm.folder.checkpoint(step)
    sha256 = _sound(checkpoint)
    with whole_folder(to) as folder:
        merged = _merge(experiment, arm, checkpoint, folder) if merge else None
        if not merge:
            _adapter(arm, checkpoint, folder, base)
        _save_tokenizer(arm.student.prompts.tokenizer, folder)
        found = report.of_checkpoint(arm.student.name, arm.run.name, step, sha256, arm.identity["cache"])
        text = model_card(experiment, arm, step, base, load_from or str(to), merged, found, arguments)
        (folder / "README.md").write_text(text, encoding="utf-8")


def _sound(checkpoint: Path) -> str:
    """The SHA-256 of a checkpoint's adapter. Raises RunError where it is not the one that was written."""
    from stage2_student.checkpoint import ADAPTER, STATE

    try:
        expected = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["adapter_sha256"]
        with (checkpoint / ADAPTER).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"checkpoint {checkpoint} cannot be read: {error}; choose another: --checkpoint") from None
    if found != expected:
        raise RunError(
            f"checkpoint {checkpoint}: {ADAPTER} is not what was written (its SHA-256 is {found}, expected {expected})"
            "; choose another: --checkpoint, or remove it and train again"
        )
    return found


def _adapter(arm: "ArmPlan", checkpoint: Path, folder: Path, base: str) -> None:
    """peft's two files; the config names the base model that others load, at the commit that was trained on."""
    from pipeline.model_folder import ADAPTER_CONFIG, check_adapter
    from stage2_student.checkpoint import ADAPTER

    config = check_adapter(checkpoint)
    source = arm.student.source
    config |= {"base_model_name_or_path": base, "revision": source.revision if base == source.location else None}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(checkpoint / ADAPTER, folder / ADAPTER)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:  # a bare one is what `tokenizers` makes of a disk that refuses
        raise OSError(f"the tokenizer cannot be written: {first_line(error)}") from None


def _merge(experiment: "Experiment", arm: "ArmPlan", checkpoint: Path, folder: Path) -> Merged:
    """The whole model in the student's dtype; merged in float32, since in bfloat16 a small update rounds away."""
    from pipeline.model_folder import check_adapter
    from pipeline.models import DTYPES, device_of, load_causal_lm

    dtype = experiment.recipe.students[arm.student.name].dtype
    check_adapter(checkpoint)
    model: Any = load_causal_lm(arm.student.source, "float32", "none", device_of(experiment.recipe))
    from peft import PeftModel  # after transformers is loaded, and its talkative parts are quiet

    try:
        with warnings.catch_warnings():  # peft asks for what transformers has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = PeftModel.from_pretrained(model, str(checkpoint)).eval()
    except Exception as error:  # whatever peft makes of a file that does not fit
        raise RunError(f"checkpoint {checkpoint}: its adapter does not fit the student's model: {error}") from None
    adapter_NV = _probe(model, experiment, arm)
    model = model.merge_and_unload()
    merged_NV = _probe(model, experiment, arm)
    model = model.to(DTYPES[dtype])
    written_NV = _probe(model, experiment, arm)
    found = Merged(
        dtype,
        len(adapter_NV),
        exact=float((merged_NV - adapter_NV).abs().max()),
        written=float((written_NV - adapter_NV).abs().max()),
        largest=float(adapter_NV.abs().max()),
        agree=float((written_NV.argmax(1) == adapter_NV.argmax(1)).float().mean()),
    )
    if not found.exact <= MERGE_BOUND * max(1.0, found.largest):
        raise UserError(
            f"merging {arm.label}: merged logits differ from the adapter's by up to {found.exact:.3g}, expected at "
            f"most {MERGE_BOUND:g} of the largest, {found.largest:.3g}; hand the adapter over: leave --merge out"
        )
    model.generation_config.eos_token_id = arm.student.prompts.end_id  # so that it stops where it was taught to
    model.config.name_or_path = ""
    model.save_pretrained(str(folder))
    return found


def _probe(model: Any, experiment: "Experiment", arm: "ArmPlan") -> "Tensor":
    """logits_NV float32 at the answer positions of the first examples, each read alone: no padding, no KV cache."""
    import torch

    from pipeline.models import input_device, window_of

    rows = []
    with torch.no_grad():
        for example in experiment.training_set.cached[:_PROBES]:
            encoded = arm.student.prompts.encode(example.prompt, example.answer)
            ids = encoded.input_ids[: window_of(model.config)]
            start = min(encoded.answer_start, len(ids) - 1)  # an example that is cut has a row all the same
            ids_1L = torch.tensor([ids], device=input_device(model))
            out = model(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L), use_cache=False)
            rows.append(out.logits[0, start - 1 : -1].float().cpu())
    return torch.cat(rows)


if __name__ == "__main__":
    sys.exit(guarded(main))
