"""Recipes: the YAML of one experiment, checked whole before anything is spent.

Every key is typed, ranged and documented in `pipeline.sections`; an unknown one is an error that names the nearest
known one.
`load_recipe("pocket", ["train.lr=1e-4"])` reads `pipeline/recipes/pocket.yaml` (or any file given by path), applies the
overrides through the same check and returns a frozen `Recipe`. Every stage calls it first.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from pipeline.errors import RecipeError, unknown_name
from pipeline.sections import Arm, Cache, Data, Eval, Name, Runtime, Section, Student, Teacher, Train

RECIPES_DIR = Path(__file__).parent / "recipes"
CONDITIONS = (
    "zero_shot",
    "few_shot",
)  # rows of the results that are the untouched student; no arm may take these names


class ArmRun(NamedTuple):
    """One training of an arm. name: of its folder and its rows: `distill`, and `distill~1`, ... for its repeats."""

    name: str
    arm: str
    seed: int


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

    @model_validator(mode="before")
    @classmethod
    def _ids_are_for_decoders(cls, tree: Any) -> Any:
        """`cache.store_ids` where it is not given: false for an encoder-decoder, whose ids no loss here reads."""
        if isinstance(tree, dict) and isinstance(tree.get("teacher"), dict):
            cache = tree.get("cache") if "cache" in tree else {}
            if tree["teacher"].get("kind") == "seq2seq" and isinstance(cache, dict):
                return {**tree, "cache": {"store_ids": False, **cache}}
        return tree

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        for name, arm in self.arms.items():
            if name in CONDITIONS:
                raise ValueError(f"arms.{name}: this name is a baseline's; choose another")
            self._check_losses(name, arm)
        self._check_engine()
        if self.eval.select == "held_out" and self.data.held_out == 0:
            raise ValueError("eval.select is held_out, but data.held_out is 0; set data.held_out to some 100")
        if "few_shot" in self.eval.baselines and self.teacher.shots == 0:
            raise ValueError("eval.baselines has few_shot, but teacher.shots is 0; remove one or the other")
        for name in self.eval.references:
            if name in self.students or name in self.arms or name in CONDITIONS:
                raise ValueError(f"eval.references.{name}: this name is taken by a student, an arm or a baseline")
        return self

    def _check_losses(self, name: str, arm: Arm) -> None:
        if arm.has_temperature and arm.temperature not in self.cache.temperatures:
            raise ValueError(
                f"arms.{name}.temperature is {arm.temperature}, but the cache holds exact normalisers for "
                f"{self.cache.temperatures} only, and they cannot be derived from the top K; add it to "
                "cache.temperatures (which makes another cache)"
            )
        if arm.needs_ids and self.teacher.kind == "seq2seq":
            raise ValueError(
                f"arms.{name}: logit_mse and kl need a student with the teacher's tokenizer, and no student here is an "
                "encoder-decoder; use uld"
            )
        for loss in arm.need_largest:
            if self.cache.selector == "sampled":
                raise ValueError(
                    f"arms.{name}: {loss} needs the teacher's largest logits, but cache.selector is sampled, which "
                    "keeps drawn ones; use kl, or set cache.selector=topk (which makes another cache)"
                )
        drawn_at = self.cache.temperatures[0]
        if arm.kl > 0 and self.cache.selector == "sampled" and arm.temperature > drawn_at:
            raise ValueError(
                f"arms.{name}.temperature is {arm.temperature}, but ids are drawn at {drawn_at}, the first of "
                "cache.temperatures: what a flatter distribution needs is hardly ever drawn; put the largest first"
            )
        if arm.needs_ids and not self.cache.store_ids:
            raise ValueError(f"arms.{name}: logit_mse and kl need token ids; set cache.store_ids=true")

    def _check_engine(self) -> None:
        """What the teacher's engine can run, and where."""
        teacher, runtime = self.teacher, self.runtime
        if teacher.engine == "hf" and runtime.tensor_parallel > 1:
            raise ValueError(
                f"runtime.tensor_parallel is {runtime.tensor_parallel}, but teacher.engine is hf, which splits no "
                "layer; --set teacher.engine=vllm, or spread whole layers: --set runtime.device_map=auto"
            )
        if runtime.device_map and runtime.device == "cpu":
            raise ValueError(
                f"runtime.device_map is {runtime.device_map}, which takes every GPU, but runtime.device is cpu; "
                "set one or the other to its default"
            )
        if teacher.engine == "vllm":
            for key, found, served in (
                ("teacher.kind", teacher.kind, "causal"),
                ("teacher.quantization", teacher.quantization, "none"),
                ("cache.selector", self.cache.selector, "topk"),
                ("runtime.device_map", runtime.device_map, None),
            ):
                if found != served:
                    raise ValueError(
                        f"teacher.engine is vllm, which serves {key}={served or 'null'} only, found {found}; "
                        f"--set teacher.engine=hf or --set {key}={served or 'null'}"
                    )

    @property
    def arm_runs(self) -> list[ArmRun]:
        """Every training of every arm: `train.repeats` of each, the first under the arm's own name."""
        return [
            ArmRun(arm if repeat == 0 else f"{arm}~{repeat}", arm, self.train.seed + repeat)
            for arm in self.arms
            for repeat in range(self.train.repeats)
        ]

    @property
    def trained_tasks(self) -> list[str]:
        """Tasks that are cached and trained on."""
        return [name for name, task in self.data.tasks.items() if task.train != 0]

    @property
    def unseen_tasks(self) -> list[str]:
        """Tasks that are only scored (`train: 0`)."""
        return [name for name, task in self.data.tasks.items() if task.train == 0]


def recipe_names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def recipe_path(name_or_file: str) -> Path:
    """The file of a recipe by name or path. Raises RecipeError where there is none."""
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
    return path


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path and apply `key.path=value` overrides (values are YAML).

    Raises RecipeError naming the file, the key, what was found and what was expected.
    """
    path = recipe_path(name_or_file)
    tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
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


def parse_yaml(text: str, where: str) -> Any:
    """A text as recipes are read: 1e-4 is a number. Raises RecipeError that begins with `where`."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from None


_NAMED = {"arms": "arm", "students": "student", "data.tasks": "task of the recipe", "eval.references": "reference"}


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in the raw tree; the check that follows names a wrong key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: expected key=value, for example --set train.lr=1e-4")
    *parents, last = key.split(".")
    node = tree
    for depth, parent in enumerate(parents, 1):
        kind = _NAMED.get(".".join(parents[: depth - 1]))
        if kind and parent not in node:  # a name of one's own is no typo only where all of it is given
            whole = f"--set '{'.'.join(parents[:depth])}={{...}}'"
            unknown = unknown_name(kind, parent, node)
            raise RecipeError(f"--set {override}: {unknown} To add one, give it whole: {whole}")
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: '{'.'.join(parents[:depth])}' is a value, not a section")
        node = child
    node[last] = parse_yaml(text, f"--set {override}")


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
        """Append the rows of one section, and of those inside it."""
        for name, info in model.model_fields.items():
            key, annotation = prefix + name, info.annotation
            values = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, Section)]
            if isinstance(annotation, type) and issubclass(annotation, Section):
                walk(annotation, key + ".")
            elif values:
                walk(values[0], f"{key}.<name>.")
            else:
                kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
                kind = re.sub(r"FieldInfo\(.*?metadata=\[(?:Gt|Ge)\(\w+=(\S+?)\)\]\)", r"above \1", kind)
                kind = re.sub(r"Annotated\[(\w+), [^\[\]]*(?:\([^()]*\))?[^\[\]]*\]", r"\1", kind)
                default = "required" if info.is_required() else repr(info.default)
                rows.append((key, kind, default, info.description or ""))

    walk(Recipe, "")
    return rows
