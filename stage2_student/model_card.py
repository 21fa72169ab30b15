"""The model card of an exported student, in the Hub's format, with the numbers of the report. Called by `export`.

A number is shown only if it is of this very adapter: the report is of the same cache, and the predictions that it
scored, which lie in the run folder, name the adapter's SHA-256.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cache_card import hub_source
from pipeline.fingerprint import Experiment
from pipeline.run_dir import RunDir
from stage2_student.arms import ArmPlan

if TYPE_CHECKING:
    from stage2_student.export import Merged

_RESULTS = "logitbank results 2"  # the format that is read here; stage 3 writes it
# Our metrics by the names that the Hub has for them; others keep theirs.
_HUB_METRICS = {
    "strict": "exact_match",
    "flexible": "exact_match",
    "rouge_l": "rouge",
    "bert_score": "bertscore",
    "label_likelihood": "accuracy",
}


@dataclass(frozen=True)
class Number:
    """One score of the exported checkpoint: of a task's metric in a block (a split, or an unseen task's)."""

    task: str
    block: str
    metric: str
    n: int
    mean: float
    low: float
    high: float
    difference: Mapping[str, Any] | None  # to plain fine-tuning, where the report has it


class Reported:
    """results.json of a run, or nothing where there is none yet."""

    def __init__(self, run_dir: RunDir, results: Mapping[str, Any]) -> None:
        self._run_dir, self._results = run_dir, results

    @classmethod
    def of(cls, run_dir: RunDir) -> "Reported":
        """The run's report; one that is absent, damaged or of another format has no numbers."""
        try:
            results = json.loads((run_dir.report / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            results = {}
        known = isinstance(results, dict) and results.get("format") == _RESULTS
        return cls(run_dir, results if known else {})

    def headline(self, student: str, run: str) -> int | None:
        """The step of the checkpoint that the report's table shows."""
        shown = self._results.get("students", {}).get(student, {}).get("headline", {}).get(run)
        return shown["step"] if shown else None

    def of_checkpoint(self, student: str, run: str, step: int, adapter_sha256: str, cache: str) -> list[Number]:
        """The numbers of one checkpoint, those of this adapter and cache alone: over all examples where it is the
        headline, else over those of the curve."""
        if self._results.get("provenance", {}).get("cache_fingerprint") != cache:
            return []
        arm, _, _ = run.partition("~")
        of_student = self._results.get("students", {}).get(student, {})
        siblings = [name for name in of_student.get("headline", {}) if name.partition("~")[0] == arm]
        numbers = []
        for block, tasks in of_student.get("blocks", {}).items():
            if not self._scored(student, f"{run}@{step}", block, adapter_sha256):
                continue
            for task, metrics in tasks.items():
                for metric, table in metrics.items():
                    row = table.get("rows", {}).get(arm, {})
                    cell = _cell_of(row, siblings.index(run) if run in siblings else None, step)
                    if cell is None and run == arm:
                        curve = table.get("curve", {}).get(arm, [])
                        cell = next((point for point in curve if point["step"] == step), None)
                    if cell is not None:
                        low, high = cell["interval"]
                        difference = cell.get("difference")
                        numbers.append(Number(task, block, metric, cell["n"], cell["mean"], low, high, difference))
        return numbers

    def _scored(self, student: str, condition: str, block: str, adapter_sha256: str) -> bool:
        """Whether the predictions that the report scored of this condition and block are of this adapter."""
        scored = self._results.get("provenance", {}).get("predictions", {}).get(student, {})
        name = Path(scored.get(f"{condition} on {block}", {}).get("file", "")).name
        return bool(name) and _adapter_of(self._run_dir.predictions(student, condition) / name) == adapter_sha256


def _cell_of(row: Mapping[str, Any], index: int | None, step: int) -> Mapping[str, Any] | None:
    """The cell of one seed in a row, if it is of this step; of several seeds the row itself is a mean."""
    if not row or index is None:
        return None
    cell = row["runs"][index] if "runs" in row else row
    return cell if cell.get("checkpoint") == step else None


def _adapter_of(predictions: Path) -> str | None:
    """The adapter that a file of predictions names in its first line."""
    import zstandard

    try:
        with predictions.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            head = b""
            while b"\n" not in head and (part := stream.read(1 << 16)):
                head += part
        adapter = json.loads(head.partition(b"\n")[0])["identity"]["adapter"]
    except (OSError, zstandard.ZstdError, ValueError, KeyError, TypeError):
        return None
    return adapter if isinstance(adapter, str) else None


def model_card(
    experiment: Experiment,
    arm: ArmPlan,
    step: int,
    base: str,
    load_from: str,
    merged: "Merged | None",
    numbers: Sequence[Number],
    arguments: Sequence[str],
) -> str:
    """The text of README.md. load_from: what its example loads. arguments: the recipe's, for the command."""
    recipe = experiment.recipe
    losses = ", ".join(f"{name} {value}" for name, value in arm.identity["losses"].items() if value)
    lora = arm.identity["student"]["lora"]
    teacher = recipe.teacher
    licence = licence_of(arm)
    title = f"{recipe.name}-{arm.student.name}-{arm.run.name}-{step}".replace("~", "-seed")
    trained = ", ".join(f"`{task}`" for task in recipe.trained_tasks)
    reads = recipe.arms[arm.run.arm].needs_teacher
    how = (
        f"distilled from {teacher.model}, which read {teacher.shots} worked examples before each prompt"
        if reads
        else "plain fine-tuning, without a teacher"
    )
    parts = [
        f"# {title}",
        f"{f'`{base}` with a LoRA adapter merged into it' if merged else f'A LoRA adapter for `{base}`'}, {how}; "
        f"trained on {trained}. "
        f"Arm `{arm.run.name}`, step {step} of {recipe.train.steps}.",
        "## Load it",
        f"```python\n{example(experiment, arm, base, load_from, merged is not None)}```",
        "## Numbers",
        _table(numbers, recipe.name),
        "## How it was trained",
        f"```\n{shlex.join(['python', '-m', 'pipeline', 'run', *arguments])}\n```",
        f"- recipe `{recipe.name}`; losses and weights: {losses}\n"
        f"- {recipe.train.steps} steps of {recipe.train.batch_size} examples, learning rate {recipe.train.lr:g}, seed "
        f"{arm.run.seed}; LoRA r {lora['r']}, alpha {lora['alpha']}\n"
        f"- base weights: `{arm.identity['student']['weights']}`\n"
        f"- teacher: {teacher.model}{f' at {teacher.revision}' if teacher.revision else ''}; its cached logits have "
        f"the fingerprint `{arm.identity['cache']}`\n"
        f"- data: {len(experiment.training_set.cached):,} examples of {trained}",
        "## Limits",
        "Trained on one task collection, in one prompt layout, the one of the example above; nothing is known of other "
        f"uses. {_merge_limit(merged)}The base model's limits are this one's. "
        f"Licence of the base model: {licence or 'not stated beside its weights; look it up where it comes from'}.",
        f"<details><summary>The whole recipe</summary>\n\n```yaml\n{_yaml(recipe)}```\n\n</details>",
    ]
    return f"---\n{_metadata(experiment, title, base, licence, merged is not None, numbers)}\n---\n\n" + (
        "\n\n".join(part for part in parts if part) + "\n"
    )


def example(experiment: Experiment, arm: ArmPlan, base: str, load_from: str, merged: bool) -> str:
    """Python that loads the export and answers one prompt, in the layout that was trained."""
    recipe, prompts = experiment.recipe, arm.student.prompts
    prompt = experiment.training_set.cached[0].prompt
    dtype = recipe.students[arm.student.name].dtype
    revision = arm.student.source.revision if base == arm.student.source.location else None
    if merged:
        load = [f'model = AutoModelForCausalLM.from_pretrained({load_from!r}, dtype="{dtype}")']
    else:
        at = f", revision={revision!r}" if revision else ""
        load = [
            f'base = AutoModelForCausalLM.from_pretrained({base!r}{at}, dtype="{dtype}")',
            f"model = PeftModel.from_pretrained(base, {load_from!r})",
        ]
    if prompts.chat:
        thinking = f", enable_thinking={prompts.thinking}" if prompts.thinking is not None else ""
        turn = 'turns = [{"role": "user", "content": prompt}]'
        ids = [
            turn,
            f"text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True{thinking})",
            'ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]',
        ]
    else:
        bare = prompts.tokenizer(prompt, add_special_tokens=False)["input_ids"] == prompts.prompt_ids(prompt)
        ids = [f'ids = tokenizer(prompt, add_special_tokens={not bare}, return_tensors="pt")["input_ids"]']
    lines = [
        "import torch",
        *([] if merged else ["from peft import PeftModel"]),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({load_from!r})",
        *load,
        f"prompt = {prompt!r}",
        *ids,
        "with torch.no_grad():",
        "    out = model.generate(",
        "        input_ids=ids,",
        "        attention_mask=torch.ones_like(ids),",
        f"        max_new_tokens={recipe.eval.max_new_tokens},",
        "        do_sample=False,",
        f"        eos_token_id={prompts.end_id},",
        f"        pad_token_id={prompts.end_id},",
        "    )",
        "print(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))",
    ]
    return "\n".join(lines) + "\n"


def licence_of(arm: ArmPlan) -> str | None:
    """What the base model's own card says its licence is; None where it has no card, or the Hub does not answer."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.repocard import metadata_load

    source = arm.student.source
    try:
        path = Path(source.location) / "README.md"
        if not source.is_folder:
            path = Path(hf_hub_download(source.location, "README.md", revision=source.revision))
        found = (metadata_load(path) or {}).get("license")
    except Exception:  # of the network, the Hub or somebody's card: then it is not known
        return None
    return found if isinstance(found, str) else None


def _metadata(
    experiment: Experiment, title: str, base: str, licence: str | None, merged: bool, numbers: Sequence[Number]
) -> str:
    """The YAML block, made by huggingface_hub. A folder of this machine is no base model that the Hub could link."""
    from huggingface_hub import EvalResult, ModelCardData

    recipe = experiment.recipe
    on_hub = None if Path(base).is_absolute() else base
    datasets = {source.path for task in recipe.trained_tasks if (source := hub_source(recipe, task))}
    evaluations = []
    for number in numbers:
        source = hub_source(recipe, number.task)
        evaluations.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=source.path if source else number.task,
                dataset_name=number.task,
                dataset_config=source.config if source else None,
                dataset_split=number.block,
                metric_type=_HUB_METRICS.get(number.metric, number.metric),
                metric_name=number.metric,
                metric_value=number.mean,
            )
        )
    data = ModelCardData(
        base_model=on_hub,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        license=licence,
        tags=["logitbank", "distillation", "lora"],
        datasets=sorted(datasets) or None,
        metrics=sorted({_HUB_METRICS.get(number.metric, number.metric) for number in numbers}) or None,
        model_name=title,
        eval_results=evaluations or None,
    )
    return data.to_yaml()


def _table(numbers: Sequence[Number], recipe: str) -> str:
    if not numbers:
        return f"None: this checkpoint has not been scored (`python -m stage3_eval --recipe {recipe}`)."

    def rows() -> Iterator[str]:
        yield "| task | split | metric | n | score | 95 % interval | difference to plain fine-tuning |"
        yield "| --- | --- | --- | ---: | ---: | --- | --- |"
        for of in numbers:
            difference = ""
            if of.difference:
                low, high = (100 * bound for bound in of.difference["interval"])
                difference = (
                    f"{100 * of.difference['mean']:+.2f} [{low:+.2f}, {high:+.2f}] to {of.difference['to']}, "
                    f"p {of.difference['p']:.2g}"
                )
            yield (
                f"| {of.task} | {of.block} | {of.metric} | {of.n:,} | {100 * of.mean:.2f} % | "
                f"{100 * of.low:.2f} to {100 * of.high:.2f} | {difference} |"
            )

    shown = ", but for the split `unseen_few_shot`" if any(of.block == "unseen_few_shot" for of in numbers) else ""
    return "\n".join(rows()) + f"\n\nOf this checkpoint alone, greedy decoding, prompts without worked examples{shown}."


def _merge_limit(merged: "Merged | None") -> str:
    if merged is None:
        return ""
    return (
        f"Merged in float32, written in {merged.dtype}: on {merged.positions} answer positions its logits lie up to "
        f"{merged.written:.2g} from those of base and adapter in float32 (of which {merged.exact:.2g} is the merge; "
        f"the largest logit is {merged.largest:.3g}), and {100 * merged.agree:.1f} % of first choices are the same. "
    )


def _yaml(recipe: Any) -> str:
    import yaml

    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
