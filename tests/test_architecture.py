"""The house keeps its shape: who may import whom, nested imports included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {"stage1_teacher", "stage2_student", "stage3_eval"}
PACKAGES = {"cache_schema", "pipeline"} | STAGES
MAY_IMPORT = {
    "cache_schema": set(),
    "pipeline": {"cache_schema"},
    **{stage: {"cache_schema", "pipeline"} for stage in STAGES},
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "vllm", "bitsandbytes", "scipy", "matplotlib"}


def modules():
    for package in sorted(PACKAGES):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield pytest.param(package, path, id=str(path.relative_to(ROOT)))


def imports(path, top_level_only=False):
    """The roots of every module imported in a file, wherever the import stands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(child) for child in ast.walk(node)}
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            skipped |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped and top_level_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            yield ast.unparse(node.args[0]).strip("f'\"").split(".")[0]


@pytest.mark.parametrize(("package", "path"), list(modules()))
def test_packages_import_only_what_lies_below_them(package, path):
    ours = {name for name in imports(path) if name in PACKAGES} - {package}
    assert ours <= MAY_IMPORT[package]


@pytest.mark.parametrize(("package", "path"), list(modules()))
def test_a_cache_can_be_read_without_torch(package, path):
    if package == "cache_schema":
        others = set(imports(path)) - set(sys.stdlib_module_names) - {"cache_schema"}
        assert others <= {"numpy", "pyarrow"} | ({"fsspec"} if path.stem == "objects" else set())  # only for a URL


@pytest.mark.parametrize(("package", "path"), list(modules()))
def test_torch_in_the_spine_has_its_rooms(package, path):
    if package == "pipeline" and path.name != "models.py" and "pocket" not in path.parts:
        assert "torch" not in set(imports(path))


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_command_lines_answer_before_anything_heavy_is_imported(package):
    assert not HEAVY & set(imports(ROOT / package / "__main__.py", top_level_only=True))


@pytest.mark.parametrize(
    "command",
    [
        *sorted(PACKAGES),
        "pipeline run",
        "pipeline plan",
        "pipeline sweep",
        "pipeline export",
        "cache_schema verify",
        "cache_schema show",
    ],
)
def test_help_needs_nothing_but_python(command):
    """Without site-packages (-S) there is no torch, pydantic, pyarrow or numpy to wait for."""
    bare = [sys.executable, "-S", "-m"]
    ran = subprocess.run([*bare, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout.startswith("usage: python -m ")


def test_without_site_packages_nothing_can_be_done():
    """The control of the test above."""
    bare = [sys.executable, "-S", "-m", "pipeline", "show"]
    assert "ModuleNotFoundError" in subprocess.run(bare, cwd=ROOT, capture_output=True, text=True, check=False).stderr


def test_the_top_level_is_the_architecture():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    temporary = {"runs", "caches", "build", "dist", "__pycache__"}
    assert {name for name in folders - temporary if not name.endswith(".egg-info")} == PACKAGES | {
        "tests",
        "benchmarks",
    }
