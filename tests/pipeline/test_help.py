"""Every command line ends its --help with examples, and each of them is one that the command takes."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = ("cache_schema", "pipeline", "pipeline.pocket", "stage1_teacher", "stage2_student", "stage3_eval")
LINE = re.compile(r"(?:eval \"\$\()?(?:python|torchrun --standalone --nproc_per_node 8) -m (.*?)(?:\)\"| \| source)?$")


def line_of(module):
    return import_module(f"{module}.__main__").parser()


def leaves(parser):
    """The parsers that have no sub-commands of their own."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        return [parser]
    return [leaf for action in below for sub in action.choices.values() for leaf in leaves(sub)]


def examples(parser):
    title, *lines = (parser.epilog or "").splitlines()
    assert title == "examples:", parser.prog
    return [line.strip() for line in lines]


LEAVES = [pytest.param(module, leaf, id=leaf.prog) for module in MODULES for leaf in leaves(line_of(module))]


@pytest.mark.parametrize(("module", "leaf"), LEAVES)
def test_the_examples_of_a_help_page_are_taken(module, leaf):
    found = examples(leaf)
    assert found
    for line in found:
        named, *arguments = shlex.split(LINE.match(line).group(1))
        assert named == module
        assert leaf.prog.split()[3:] == arguments[: len(leaf.prog.split()) - 3], "an example of another sub-command"
        line_of(module).parse_args(arguments)


@pytest.mark.parametrize("wrong", ["pipeline run --recipes pocket", "cache_schema verify", "stage2_student --steps 3"])
def test_an_example_that_is_not_taken_would_be_noticed(wrong, capsys):
    module, *arguments = wrong.split()
    with pytest.raises(SystemExit):
        line_of(module).parse_args(arguments)


def test_the_recipes_named_in_examples_are_there():
    from pipeline.recipe import recipe_names

    named = set()
    for module in MODULES:
        for leaf in leaves(line_of(module)):
            for line in examples(leaf):
                words = shlex.split(line)
                named |= {words[i + 1] for i, word in enumerate(words) if word == "--recipe"}
    assert {name for name in named if not name.endswith(".yaml")} <= set(recipe_names())
    assert named


PAGES = [p for p in ROOT.rglob("*.md") if not {".venv", ".venv-vllm", "tests"} & set(p.relative_to(ROOT).parts)]
TYPED = re.compile(r"^(?: {4}|\$ )?((?:python|torchrun [^#]*?) -m .*?)(?:  +#.*|#.*)?$", re.MULTILINE)


def test_the_command_lines_on_the_pages_are_taken():
    """Those in blocks, alone on their lines. What stands in brackets may be typed; `$X` and the like are the page's."""
    taken = set()
    for page in PAGES:
        text = re.sub(r"\\\n *", "", page.read_text(encoding="utf-8"))
        for line in TYPED.findall(text):
            module, *arguments = shlex.split(line.partition(" -m ")[2].replace("[", "").replace("]", ""))
            if module in MODULES and "$" not in line and "|" not in line and "..." not in line:
                line_of(module).parse_args(arguments)
                taken.add(line)
    assert len(taken) > 15


def test_the_recipe_on_the_front_page_is_the_one_that_comes_with_it(tmp_path):
    from pipeline.recipe import load_recipe

    shown = (ROOT / "README.md").read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "shown.yaml").write_text(shown, encoding="utf-8")
    assert load_recipe(str(tmp_path / "shown.yaml")) == load_recipe("gsm8k-qwen3")
