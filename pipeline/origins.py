"""Where each value of a recipe came from: its line in the file, a `--set`, or a default. Called by `show`."""

from collections.abc import Sequence
from typing import Any

import yaml

from pipeline.recipe import Recipe, recipe_path

_Tree = dict[str, Any]  # key -> a tree, or where the value at this key came from
_COLUMN = 56  # of the comments


def origins(name_or_file: str, overrides: Sequence[str], recipe: Recipe) -> dict[tuple[str, ...], str]:
    """The path of every value -> "pocket.yaml:4", "--set" or what else decides it. The recipe is the checked one."""
    path = recipe_path(name_or_file)
    given = _marked(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), f"{path.name}:{{line}}")
    assert isinstance(given, dict), "the recipe is loaded, so its file is a mapping"
    for override in overrides:
        key, _, text = override.partition("=")
        *parents, last = key.split(".")
        node = given
        for parent in parents:
            child = node.get(parent)
            node[parent] = node = child if isinstance(child, dict) else {}
        node[last] = _marked(yaml.compose(text, Loader=yaml.SafeLoader), "--set")
    tree = recipe.model_dump(mode="json")
    return {leaf: _origin(leaf, given, recipe) for leaf in _leaves(tree)}


def _marked(node: Any, label: str) -> Any:
    """A YAML node as a tree of labels."""
    if isinstance(node, yaml.MappingNode) and node.value:
        return {
            key.value: _marked(value, label)
            if isinstance(value, yaml.MappingNode) and value.value
            else label.format(line=key.start_mark.line + 1)
            for key, value in node.value
        }
    return label


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all values that are no section with something in it."""
    if isinstance(tree, dict) and tree:
        return [leaf for key, value in tree.items() for leaf in _leaves(value, (*path, key))]
    return [path]


def _origin(leaf: tuple[str, ...], given: Any, recipe: Recipe) -> str:
    for key in leaf:
        if not isinstance(given, dict) or key not in given:
            return _without(leaf, recipe)
        given = given[key]
    return _without(leaf, recipe) if isinstance(given, dict) else str(given)


def _without(leaf: tuple[str, ...], recipe: Recipe) -> str:
    """What decides a value that nobody gave."""
    if leaf == ("cache", "store_ids") and recipe.teacher.kind == "seq2seq":
        return "derived: teacher.kind is seq2seq, whose ids no loss reads"
    if leaf == ("run_dir",):
        return f"default: runs/{recipe.name}"
    if leaf == ("cache", "dir"):
        return f"default: caches/{recipe.name}-<fingerprint>; --field cache.dir says which"
    return "default"


def commented(recipe: Recipe, where: dict[tuple[str, ...], str]) -> str:
    """The recipe as YAML that can be run again, the origin of each value behind it."""
    lines: list[str] = []

    def write(tree: _Tree, path: tuple[str, ...]) -> None:
        """Append a section."""
        indent = "  " * len(path)
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                lines.append(indent + yaml.safe_dump({key: None}, default_flow_style=False).removesuffix(" null\n"))
                write(value, (*path, key))
                continue
            flow = True if isinstance(value, list | dict) else None  # of the value alone, behind its key
            text = yaml.safe_dump(value, default_flow_style=flow, width=10**9, allow_unicode=True)
            name = yaml.safe_dump({key: None}, default_flow_style=False).removesuffix("null\n")
            text = name + text.removesuffix("\n").removesuffix("\n...")
            comment = f"# {where[(*path, key)]}"
            lines.append(f"{indent + text:<{_COLUMN}} {comment}")

    write(recipe.model_dump(mode="json"), ())
    return "\n".join(lines)
