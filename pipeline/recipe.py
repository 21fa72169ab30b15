"""Recipes: the YAML of one experiment, checked whole before anything is spent.

Every key is typed, ranged and documented here; an unknown one is an error that names the nearest known one.
`load_recipe("pocket", ["train.lr=1e-4"])` reads `pipeline/recipes/pocket.yaml` (or any file given by path), applies the
overrides through the same check and returns a frozen `Recipe`. Every stage calls it first.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pipeline.errors import RecipeError, unknown_name

RECIPES_DIR = Path(__file__).parent / "recipes"
CONDITIONS = (
    "zero_shot",
    "few_shot",
)  # rows of the results that are the untouched student; no arm may take these names

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Frozen, strict, and closed: no coercion of types, no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class TaskData(Section):
    """How much of one task is used, and its options."""

    train: int | None = Field(None, ge=1, description="training examples, sampled with data.seed; null: all")
    eval: int | None = Field(None, ge=1, description="examples of each scored split, the first ones; null: all")
    options: dict[str, Any] = Field({}, description="options of the task file (hashed)")


class Data(Section):
    """The task collection."""

    tasks: dict[Name, TaskData] = Field(description="task name -> how much of it")
    dir: str | None = Field(None, description="a folder of <task>/{train,test}.jsonl instead of the Hub")
    train_limit: int | None = Field(None, ge=1, description="at most so many training examples over all tasks")
    eval_limit: int | None = Field(None, ge=1, description="at most so many examples of a scored split over all tasks")
    held_out: int = Field(0, ge=0, description="training rows kept out of the cache, to choose a checkpoint on")
    seed: int = Field(0, ge=0, description="seeds the samples and the held-out rows")

    @model_validator(mode="after")
    def _some_task(self) -> "Data":
        if not self.tasks:
            raise ValueError("at least one task is needed, for example {gsm8k: {}}")
        return self


class Teacher(Section):
    """What is cached: all of it is part of the cache's identity."""

    model: str = Field(description="a Hub name, a folder, or embedded:<name>")
    revision: str | None = Field(
        None, description="the Hub commit; null: the one the local Hub cache or the Hub resolves to"
    )
    kind: Literal["causal"] = Field("causal", description="the architecture family")
    engine: Literal["hf"] = Field("hf", description="what runs it: transformers")
    quantization: Literal["none", "nf4"] = Field(
        "none", description="nf4: 4-bit with double quantisation, by bitsandbytes"
    )
    dtype: Dtype = Field("bfloat16", description="of the weights and the body's arithmetic; the head runs in float32")
    shots: int = Field(8, ge=0, description="worked examples before the prompt")
    shot_seed: int = Field(0, ge=0, description="seeds their choice from the training rows")
    shot_policy: Literal["shared", "per_example"] = Field(
        "shared",
        description="shared: the same shots for all, taken out of the training rows; per_example: others for each",
    )
    thinking: bool | None = Field(
        None,
        description="the chat template's enable_thinking switch; null: not passed. Refused where no template reads it",
    )


class Cache(Section):
    """How the teacher's logits are stored: hashed, but for `dir`."""

    dir: str | None = Field(None, description="null: caches/<recipe name>-<fingerprint>")
    selector: Literal["topk"] = Field("topk", description="which logits of a position are kept")
    top_k: int = Field(256, ge=1, description="how many")
    temperatures: list[Annotated[float, Field(gt=0)]] = Field([1.0], description="those with exact normalisers")
    step: float = Field(0.015625, gt=0, description="quantisation step of a logit, a power of two")
    codec: Literal["fine"] = Field("fine", description="fine: every rank to step/2")
    store_ids: bool = Field(True, description="false: only for rank-ordered losses")
    shard_examples: int = Field(256, ge=1, description="examples in a shard: the unit of work and of loss when stopped")

    @model_validator(mode="after")
    def _sane(self) -> "Cache":
        mantissa = self.step.hex().split("p")[0]
        if mantissa != "0x1.0000000000000":
            raise ValueError(f"step {self.step} is not a power of two (0.015625 is 2**-6)")
        if not self.temperatures or len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures {self.temperatures} must be one or more different numbers")
        return self


class Lora(Section):
    """The adapter (Hu et al. 2021, arXiv 2106.09685), by peft."""

    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, ge=1, description="the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: str | list[str] = Field("all-linear", description="module names, or all-linear (never the head)")


class Student(Section):
    """A model to train."""

    model: str = Field(description="a Hub name, a folder, or embedded:<name>")
    revision: str | None = Field(None, description="the Hub commit")
    dtype: Dtype = Field("bfloat16", description="of the frozen weights; the adapter is float32")
    lora: Lora = Field(Lora())


class Train(Section):
    """Stage 2. A step is an optimizer step on `batch_size` examples, whatever the number of processes."""

    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(32, ge=1, description="examples in a step, over all processes")
    micro_batch_size: int = Field(8, ge=1, description="examples in one forward pass of one process")
    lr: float = Field(2.0e-4, gt=0, description="peak learning rate")
    warmup_steps: int = Field(50, ge=0, description="linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="after the warm-up, to zero at the last step"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    save_every: int = Field(200, ge=1, description="steps between checkpoints; the last step is always one")
    seed: int = Field(0, ge=0, description="seeds the adapter, the order and the dropout")


class Arm(Section):
    """One way to train the student: weights of the loss components; those left out are zero."""

    ce: float = Field(0.0, ge=0, description="cross-entropy with the answer")
    logit_mse: float = Field(0.0, ge=0, description="squared error to the teacher's logits at its top-K ids")
    kl: float = Field(0.0, ge=0, description="forward KL on the top K and one tail bucket")
    temperature: float = Field(1.0, gt=0, description="of kl; must be one of cache.temperatures")

    @model_validator(mode="after")
    def _some_loss(self) -> "Arm":
        if not self.ce + self.logit_mse + self.kl > 0:
            raise ValueError("an arm needs a loss with a weight above zero, for example {ce: 1.0}")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the cache's numbers are read, or its text alone."""
        return self.logit_mse > 0 or self.kl > 0


class Eval(Section):
    """Stage 3. Changes no cached number and no adapter."""

    engine: Literal["hf", "vllm"] = Field("hf", description="what generates")
    splits: list[Literal["train", "validation", "test"]] = Field(["test"], min_length=1, description="what is scored")
    baselines: list[Literal["zero_shot", "few_shot"]] = Field(
        ["zero_shot", "few_shot"], description="the untouched student, without and with the worked examples"
    )
    max_new_tokens: int = Field(400, ge=1, description="where a generation is cut; such answers are counted")
    batch_size: int = Field(64, ge=1, description="prompts generated together (hf)")
    curve_limit: int | None = Field(
        None,
        ge=1,
        description="score all but the headline checkpoints on the first so many examples; null: on all",
    )
    select: Literal["last", "held_out"] = Field(
        "last",
        description="the checkpoint in an arm's headline row: the last, or the best on data.held_out rows",
    )


class Runtime(Section):
    """Where and how it runs: provenance, never identity."""

    python: dict[Literal["stage1_teacher", "stage2_student", "stage3_eval"], str] = Field(
        {}, description="another interpreter for a stage (vLLM in an environment of its own)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    batch_tokens: int = Field(
        16384, ge=1, description="stage 1: padded tokens in a batch, the shared context not counted"
    )
    processes: int = Field(1, ge=1, description="stage 2: processes (one a GPU), started through torchrun when above 1")


class Recipe(Section):
    """One experiment."""

    name: Name = Field(description="names the run folder and the cache")
    data: Data
    teacher: Teacher
    cache: Cache = Cache()
    students: dict[Name, Student] = Field(min_length=1)
    train: Train = Train()
    arms: dict[Name, Arm] = Field(min_length=1)
    eval: Eval = Eval()
    runtime: Runtime = Runtime()
    run_dir: str | None = Field(None, description="null: runs/<name>")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        for name, arm in self.arms.items():
            if name in CONDITIONS:
                raise ValueError(f"arms.{name}: this name is a baseline's; choose another")
            if arm.kl > 0 and arm.temperature not in self.cache.temperatures:
                raise ValueError(
                    f"arms.{name}.temperature is {arm.temperature}, but the cache holds exact normalisers for "
                    f"{self.cache.temperatures} only; add it to cache.temperatures"
                )
            if (arm.logit_mse > 0 or arm.kl > 0) and not self.cache.store_ids:
                raise ValueError(f"arms.{name}: logit_mse and kl need token ids; set cache.store_ids=true")
        if self.eval.select == "held_out" and self.data.held_out == 0:
            raise ValueError("eval.select is held_out, but data.held_out is 0; set data.held_out to some 100")
        if "few_shot" in self.eval.baselines and self.teacher.shots == 0:
            raise ValueError("eval.baselines has few_shot, but teacher.shots is 0; remove one or the other")
        return self


def recipe_names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path and apply `key.path=value` overrides (values are YAML).

    Raises RecipeError naming the file, the key, what was found and what was expected.
    """
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES_DIR / f"{name_or_file}.yaml"
        if name_or_file not in recipe_names():
            raise RecipeError(
                unknown_name("recipe", name_or_file, recipe_names()) + " A file of your own must end in .yaml."
            )
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RecipeError(f"recipe {path}: the file {what}. The built-in ones: python -m pipeline recipes")
    tree = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path}: expected a mapping of sections, found {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = "\n".join(f"  {_describe(problem)}" for problem in error.errors())
        raise RecipeError(
            f"recipe {path}:\n{problems}\nEvery key with its meaning: python -m pipeline show --keys"
        ) from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number and refuses a key given twice (YAML 1.1 does neither)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, unless one of its keys stands there twice."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key_node.value}' is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in the raw tree; the check that follows names a wrong key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: expected key=value, for example --set train.lr=1e-4")
    *parents, last = key.split(".")
    node = tree
    for depth, parent in enumerate(parents, 1):
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: '{'.'.join(parents[:depth])}' is a value, not a section")
        node = child
    node[last] = _parse(text, f"--set {override}")


def _describe(problem: Any) -> str:
    """One line for one pydantic problem: key, found, expected."""
    where = ".".join(str(part) for part in problem["loc"]) or "the recipe"
    if problem["type"] == "extra_forbidden":
        *parents, last = problem["loc"]
        section = ".".join(map(str, parents))
        known = _fields_at(Recipe, list(parents))
        return f"{section + ': ' if section else ''}{unknown_name('key', str(last), known)}"
    if problem["type"] == "missing":
        return f"{where}: required, but not given"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message}; found {problem['input']!r}"


def _fields_at(model: type[BaseModel], loc: list[Any]) -> list[str]:
    """The known keys of the section at `loc`, descending through mappings such as `arms.<name>`."""
    if not loc:
        return list(model.model_fields)
    annotation = model.model_fields[loc[0]].annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _fields_at(annotation, loc[1:])
    values = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
    return _fields_at(values[0], loc[2:]) if values else []


def describe_keys() -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key, for `python -m pipeline show --keys`."""
    rows: list[tuple[str, str, str, str]] = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, info in model.model_fields.items():
            key, annotation = prefix + name, info.annotation
            values = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, Section)]
            if isinstance(annotation, type) and issubclass(annotation, Section):
                walk(annotation, key + ".")
            elif values:
                walk(values[0], f"{key}.<name>.")
            else:
                kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
                kind = re.sub(r"Annotated\[(\w+), [^\[\]]*(?:\([^()]*\))?[^\[\]]*\]", r"\1", kind)
                default = "required" if info.is_required() else repr(info.default)
                rows.append((key, kind, default, info.description or ""))

    walk(Recipe, "")
    return rows
