"""What a shell is told to offer, from the parsers and the recipe; and the shells' own lines, run in the shells."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.commands.completion import SHELLS
from pipeline.completion import completions

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("python -m stage", ["stage1_teacher", "stage2_student", "stage3_eval"]),
        ("python -m pipeline r", ["recipes", "run"]),
        ("python -m cache_schema ver", ["verify"]),
        ("python -m pipeline run --rec", ["--recipe"]),
        ("python -m pipeline run --recipe pocket-", ["pocket-uld"]),
        ("python -m stage3_eval --rescore --recipe ", ["flan-uld", "gsm8k-qwen3", "pocket", "pocket-uld"]),
        ("python -m stage2_student --set train.sc", ["train.schedule="]),
        ("python -m stage2_student --set train.schedule=co", ["train.schedule=constant", "train.schedule=cosine"]),
        ("python -m stage2_student --set 'train.schedule=li", ["train.schedule=linear"]),
        ("python -m pipeline show --set cache.store_ids=", ["cache.store_ids=false", "cache.store_ids=true"]),
        ("python -m pipeline run --recipe pocket-uld --set arms.distill_index.u", ["arms.distill_index.uld="]),
        ("python -m pipeline run --recipe pocket --set arms.distill_index.u", []),
        ("python -m pipeline show --field run_d", ["run_dir"]),
        ("python -m pipeline run --recipe no-such.yaml --set train.wa", ["train.warmup_steps="]),
        ("python -m pipeline run --set train.lr=", []),
        ("python -m json.tool --so", []),
        ("python script.py --re", []),
        ("", []),
    ],
)
def test_what_could_come_next(line, found):
    assert completions(line) == found


def test_a_recipe_of_ones_own_is_completed_with_its_own_names(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((ROOT / "pipeline/recipes/pocket.yaml").read_text().replace("distill:", "mild:"), encoding="utf-8")
    line = f"python -m pipeline run --recipe {path} --set arms.mi"
    assert "arms.mild.ce=" in completions(line)


def test_every_key_that_is_offered_is_one_that_can_be_set():
    """Held against the recipe's own check, with the values that are offered."""
    from pipeline.recipe import load_recipe

    start = "python -m pipeline run --set "
    offered = [word for key in completions(start) for word in completions(start + key)]
    assert len(offered) > 20
    for word in offered:
        try:
            load_recipe("pocket", [word])
        except Exception as error:  # a value may not go with others; the key and its type must be right
            assert "unknown" not in str(error).lower() and "Input should" not in str(error), (word, error)


def test_no_shell_named_is_an_error_that_says_which_there_are(capsys):
    from pipeline.errors import UserError

    with pytest.raises(UserError, match="bash, zsh, fish"):
        main(["completion"])


def asked_of(shell, script):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    ran = subprocess.run([shell, *script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


def bash(line):
    script = f"""
{SHELLS["bash"]}
COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}
_logitbank {sys.executable}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    return asked_of("bash", ["--norc", "-c", script])


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("python -m pipeline re", ["recipes"]),
        ("python -m pipeline run --set train.sc", ["train.schedule="]),
        ("python -m pipeline run --set train.schedule=co", ["constant", "cosine"]),  # `=` ends a word of bash
        ("python script.py re", []),
    ],
)
def test_bash(line, found):
    assert bash(line) == found


def test_fish():
    script = f"{SHELLS['fish']}\nalias python '{sys.executable}'\ncomplete -C 'python -m pipeline re'"
    assert set(asked_of("fish", ["--no-config", "-c", script])) == {"recipes", "README.md"}  # files stay on offer


def test_zsh():
    """In a terminal of its own, since zsh completes in an interactive shell only."""
    if shutil.which("zsh") is None:
        pytest.skip("no zsh here")
    script = f"""
zmodload zsh/zpty
zpty z 'PATH={Path(sys.executable).parent}:$PATH zsh -fi'
zpty -w z "PS1=; cd {ROOT}; autoload -U compinit; compinit -D -u"
zpty -w z "eval \\"\\$(python -m pipeline completion zsh)\\"; echo re''ady"
zpty -r -m z out '*ready*'
zpty -n -w z $'\\x15python -m pipeline re\\t\\x01echo \\n'
zpty -r -m z out '*recipes*' && print recipes
"""
    assert asked_of("zsh", ["-f", "-c", script]) == ["recipes"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_lines_are_good_syntax(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    ran = subprocess.run([shell, "-n", "-c", SHELLS[shell]], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
