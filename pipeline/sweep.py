"""The points of a sweep: which recipes `--over` stands for, where each lies, and what one may take from another.

    --over train.lr=1e-4,2e-4 --over arms.distill.logit_mse=0.25,0.5,1      six points, each a run folder of its own

Pure but for reading the recipe. Called by `commands.sweep` and by stage 3's comparison.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe, load_recipe, parse_yaml
from pipeline.run_dir import RunDir
from pipeline.sections import KEPT_APART

_NAME_CHARACTERS = 60
_CLOSED_BY = {"[": "]", "{": "}", '"': '"', "'": "'"}
# Sections that all points share, and why.
_SHARED = {
    **dict.fromkeys(("teacher", "cache", "data"), "is about the cache and the examples, and a sweep has one cache"),
    "name": "names the cache and the sweep's folder",
    "run_dir": "is each point's own, below the sweep's folder",
    "eval.splits": "decides what is scored, and points are compared on the same examples",
}


@dataclass(frozen=True)
class Point:
    """One recipe of a sweep. settings: swept key -> its value. arguments: the `--recipe` and `--set` that mean it."""

    settings: Mapping[str, Any]
    recipe: Recipe
    arguments: tuple[str, ...]

    @property
    def label(self) -> str:
        """For people: `train.lr=0.0001 arms.distill.logit_mse=0.5`."""
        return " ".join(f"{key}={_text(value)}" for key, value in self.settings.items())

    @property
    def name(self) -> str:
        """Of its folder."""
        return point_name(self.settings)

    @property
    def run_dir(self) -> RunDir:
        return RunDir.of(self.recipe)


def points(name_or_file: str, overrides: Sequence[str], over: Sequence[str]) -> list[Point]:
    """Every combination, the last `--over` changing fastest; all of them are checked as recipes.

    Raises RecipeError, for a value that a recipe does not take as for a key that a sweep cannot have.
    """
    axes = [_axis(text) for text in over]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise RecipeError(f"--over {key}: given twice; give all its values at once: --over {key}=A,B,C")
        _check_key(key)
    root = sweep_dir(load_recipe(name_or_file, overrides))
    found = []
    for values in product(*(values for _, values in axes)):
        chosen = [f"{key}={text}" for key, text in zip(keys, values, strict=True)]
        settings = dict(zip(keys, map(_parsed, values), strict=True))
        chosen.append(f"run_dir={json.dumps(str(root / point_name(settings)))}")
        given = [*overrides, *chosen]
        try:
            recipe = load_recipe(name_or_file, given)
        except RecipeError as error:
            raise RecipeError(f"--over {' '.join(chosen[:-1])}: {error}") from None
        arguments = ("--recipe", name_or_file, *(part for override in given for part in ("--set", override)))
        found.append(Point(settings, recipe, arguments))
    names = [point.name for point in found]
    twice = next((point for point in found if names.count(point.name) > 1), None)
    if twice is not None:
        raise RecipeError(f"--over {twice.label}: given twice; each value once")
    return found


def sweep_dir(recipe: Recipe) -> Path:
    """Where a recipe's sweeps lie: beside its run folder."""
    root = RunDir.of(recipe).root
    return root.with_name(f"{root.name}-sweep")


def point_name(settings: Mapping[str, Any]) -> str:
    """A short name that depends on keys and values alone, in whatever order and spelling they were given."""
    ordered = dict(sorted(settings.items()))
    shown = "_".join(f"{key.rpartition('.')[2]}-{_text(value)}" for key, value in ordered.items())
    shown = re.sub(r"[^A-Za-z0-9_.-]+", "-", shown)[:_NAME_CHARACTERS].strip("-._")
    digest = hashlib.sha256(json.dumps(ordered, sort_keys=True, default=str).encode()).hexdigest()
    return f"{shown}-{digest[:8]}"


def chosen(found: Sequence[Point], against: Sequence[str]) -> Point:
    """The one point that has all of these `KEY=VALUE`; the first where there are none. Raises RecipeError."""
    wanted = dict(_setting(text) for text in against)
    fitting = [p for p in found if all(k in p.settings and p.settings[k] == v for k, v in wanted.items())]
    if not wanted or len(fitting) == 1:
        return fitting[0]
    lines = "\n  ".join(point.label for point in fitting or found)
    raise RecipeError(
        f"--against {' '.join(against)}: expected what one point alone has, found {len(fitting)} such points; "
        f"{'these' if fitting else 'the points'} are:\n  {lines}"
    )


def sources(found: Sequence[Point]) -> list[dict[tuple[str, ...], int]]:
    """Of each point: what it would make just as an earlier one does -> the earliest of those.

    ("arm", student, arm): its training. ("answers", student, arm): those of its checkpoints. ("baselines", student),
    ("reference", name): the answers of what is not trained.
    """
    first: dict[str, int] = {}
    taken = []
    for number, point in enumerate(found):
        made = {item: json.dumps([item, decided_by], sort_keys=True) for item, decided_by in _made_by(point.recipe)}
        earliest = {item: first.setdefault(key, number) for item, key in made.items()}
        taken.append({item: index for item, index in earliest.items() if index < number})
    return taken


def _made_by(recipe: Recipe) -> list[tuple[tuple[str, ...], Any]]:
    """What a point trains and generates, each with the part of the recipe that decides it; data and cache aside."""
    tree = recipe.model_dump(mode="json")
    train = {key: value for key, value in tree["train"].items() if key not in KEPT_APART}
    asked = {key: tree["eval"][key] for key in ("engine", "max_new_tokens", "shots")}
    scored = [asked, *(tree["eval"][key] for key in ("select", "curve_limit"))]
    made: list[tuple[tuple[str, ...], Any]] = []
    for student, of_student in tree["students"].items():
        weights = {key: value for key, value in of_student.items() if key != "lora"}
        made.append((("baselines", student), [weights, asked]))
        for arm, losses in tree["arms"].items():
            trained = [of_student, train, losses]
            made.append((("arm", student, arm), trained))
            made.append((("answers", student, arm), [trained, scored]))
    made += [(("reference", name), [model, asked]) for name, model in tree["eval"]["references"].items()]
    return made


def _axis(text: str) -> tuple[str, list[str]]:
    """One `--over`: the key and its values, as they were written."""
    key, equals, rest = text.partition("=")
    values = [value.strip() for value in _split(rest)]
    if not equals or not key or not all(values):
        raise RecipeError(f"--over {text}: expected key=value,value,..., for example --over train.lr=1e-4,2e-4")
    return key, values


def _check_key(key: str) -> None:
    for shared, why in _SHARED.items():
        if key == shared or key.startswith(f"{shared}.") or shared.startswith(f"{key}."):
            raise RecipeError(
                f"--over {key}: {shared} {why}. One cache, many students: sweep a key of students, train or arms, and "
                f"make a sweep of its own for each other value (--set {key}=...)"
            )


def _split(text: str) -> list[str]:
    """At commas that stand in no bracket and no quotes."""
    parts, open_ = [""], [""]
    for character in text:
        quoted = open_[-1] in ("'", '"')
        if character == open_[-1] and open_[-1]:
            open_.pop()
        elif character in _CLOSED_BY and not quoted:
            open_.append(_CLOSED_BY[character])
        elif character == "," and len(open_) == 1:
            parts.append("")
            continue
        parts[-1] += character
    return parts


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--against {text}: expected key=value, as in --over")
    return key, _parsed(value)


def _parsed(text: str) -> Any:
    """A value as a recipe reads it; numbers that are equal are one value, however they are written."""
    value = parse_yaml(text, f"the value {text}")
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _text(value: Any) -> str:
    """A value for people and for names."""
    if isinstance(value, float):
        return f"{value:.12g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
