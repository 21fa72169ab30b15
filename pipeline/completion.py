"""What could come next on a command line: sub-commands, options, recipes, keys of a recipe and their values.

`pipeline.commands.completion` gives shells a few lines that ask here at each press of the key, through the interpreter
that stands on the line. Everything is read off the parsers and the recipe: nothing has to be kept in step.
"""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Literal, get_args, get_origin

from pipeline.errors import RecipeError

MODULES = ("cache_schema", "pipeline", "pipeline.pocket", "stage1_teacher", "stage2_student", "stage3_eval")
KEYED = ("--set", "--over")  # options that take KEY=VALUE


def completions(line: str) -> list[str]:
    """The words that could stand in the place of the last one of `line`, `interpreter -m module ...`; none where the
    shell's own completion (of files) is as good. line: the command line up to the cursor."""
    words = _split(line)
    if "-m" not in words[:-1]:
        return []
    module, *rest = words[words.index("-m") + 1 :]
    if not rest:
        return _matching(MODULES, module)
    if module not in MODULES:
        return []
    parser = import_module(f"{module}.__main__").parser()
    *before, word = rest
    while before and (sub := _sub_commands(parser).get(before[0])):
        parser, before = sub, before[1:]
    return _matching(_candidates(parser, before, word), word)


def _candidates(parser: argparse.ArgumentParser, before: Sequence[str], word: str) -> Sequence[str]:
    """What the parser takes after `before`, in no way filtered but for the keys, whose values need the key."""
    last = parser._option_string_actions.get(before[-1]) if before else None
    if last is not None and last.nargs != 0:
        if last.option_strings[0] == "--recipe":
            from pipeline.recipe import recipe_names

            return recipe_names()
        if last.option_strings[0] in KEYED:
            return _keys_or_values(_recipe_on(before), word)
        if last.option_strings[0] == "--field":
            return list(_keys(_recipe_on(before)))
        return [str(choice) for choice in last.choices or ()]
    positional = [a for a in parser._actions if not a.option_strings and a.choices]
    choices = [str(choice) for action in positional for choice in action.choices or ()]
    return choices if choices and not word.startswith("-") else [*choices, *parser._option_string_actions]


def _sub_commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def _split(line: str) -> list[str]:
    """The words of a line; the last is empty where the cursor stands behind a space. An open quote is closed."""
    for end in ("", '"', "'"):
        try:
            words = shlex.split(line + end)
        except ValueError:
            continue
        return [*words, ""] if not end and (not line or line[-1].isspace()) else words
    return line.split()


def _matching(candidates: Sequence[str], word: str) -> list[str]:
    return sorted({candidate for candidate in candidates if candidate.startswith(word)})


def _recipe_on(words: Sequence[str]) -> str:
    at = [i for i, word in enumerate(words[:-1]) if word == "--recipe"]
    return words[at[-1] + 1] if at else "pocket"


def _keys_or_values(recipe: str, word: str) -> list[str]:
    """`train.lr=` and the like, or, behind the sign, the values that a key of few values takes."""
    keys = _keys(recipe)
    key, sign, _ = word.partition("=")
    return [f"{key}={value}" for value in keys.get(key, ())] if sign else [f"{key}=" for key in keys]


def _keys(name_or_file: str) -> dict[str, tuple[str, ...]]:
    """Every key of a recipe as it is typed, the names of its own tasks, students and arms in it, with the values of
    those that have few. Keys under names are left out where the recipe cannot be read."""
    from pydantic import BaseModel

    from pipeline.recipe import Recipe, load_recipe

    try:
        recipe: BaseModel | None = load_recipe(name_or_file)
    except RecipeError:
        recipe = None
    return dict(_leaves(Recipe, recipe, ""))


def _leaves(model: Any, values: Any, prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(key, values it may have) below one section. values: the section itself, or None."""
    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        key, found = prefix + name, getattr(values, name, None)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, found, key + ".")
        elif isinstance(found, dict) and found and all(isinstance(value, BaseModel) for value in found.values()):
            for own, section in found.items():
                yield from _leaves(type(section), section, f"{key}.{own}.")
        else:
            yield key, _few(field.annotation)


def _few(annotation: Any) -> tuple[str, ...]:
    """The values of a type that has few, as they are typed."""
    if annotation is bool:
        return ("false", "true")
    if annotation is type(None):
        return ("null",)
    if get_origin(annotation) is Literal:
        return tuple(str(value) for value in get_args(annotation))
    if get_origin(annotation) in (None, list, dict, tuple):
        return ()
    return tuple(value for part in get_args(annotation) for value in _few(part))
