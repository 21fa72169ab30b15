"""Tiny trained runs for the tests of stage 3: real models and real adapters, random, on disk."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest
import toys
from toy_adapters import write_checkpoint

from pipeline.recipe import Recipe, load_recipe
from pipeline.run_dir import RunDir
from stage3_eval.__main__ import main

FEW_RESAMPLES = 200  # of the bootstrap, where no test looks at its intervals


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with a tiny recipe, its rows, and two checkpoints of each arm. Do not write to it: copy it."""
    root = tmp_path_factory.mktemp("trained")
    recipe = load_recipe(str(toys.tiny_recipe(root)))
    for arm, seed in (("sft", 10), ("distill", 20)):
        for step in (2, 4):
            write_checkpoint(RunDir.of(recipe), arm, step, root / "model", seed + step)
    return root


@pytest.fixture(scope="session")
def trained_mixture(tmp_path_factory) -> Path:
    """A folder with a recipe of two trained tasks and an unseen one, two students of two arms and two seeds, and two
    references. Do not write to it: copy it.

    The passage of test question 1 of boolq is too long for the students, whose window is 512 tokens.
    """
    root = tmp_path_factory.mktemp("mixture")
    for name, make in (("gpt2", toys.tiny_gpt2), ("llama", toys.tiny_llama)):
        toys.tiny_tokenizer(root / name)
        make(root / name)
    toys.tiny_tokenizer(root / "t5")
    toys.tiny_t5(root / "t5", pad_token_id=1, eos_token_id=0, decoder_start_token_id=1, initializer_factor=3.0)
    mixture_rows(root / "data")
    lora = {"r": 4, "alpha": 8}
    recipe = load_recipe(
        str(
            toys.tiny_recipe(
                root,
                data={"tasks": {"gsm8k": None, "boolq": {}, "squad": {}, "eng_spa": {"train": 0}}},
                teacher={"shots": 0},
                students={
                    "toy": None,
                    "gpt2": {"model": str(root / "gpt2"), "dtype": "float32", "lora": lora},
                    "llama": {"model": str(root / "llama"), "dtype": "float32", "lora": lora},
                },
                train={"repeats": 2},
                arms={"distill": None, "uld": {"ce": 1.0, "uld": 0.5}},
                eval={
                    "splits": ["train", "test"],
                    "baselines": ["zero_shot"],
                    "references": {
                        "small-t5": {"model": str(root / "t5"), "dtype": "float32"},
                        "other-gpt2": {"model": str(root / "gpt2"), "dtype": "float32"},
                    },
                    "shots": 2,
                    "max_new_tokens": 6,
                    "batch_size": 8,
                },
            )
        )
    )
    for student in recipe.students:
        for seed, run in enumerate(recipe.arm_runs):
            for step in (4,) if run.name != run.arm else (2, 4):
                model = Path(recipe.students[student].model)
                write_checkpoint(RunDir.of(recipe), run.name, step, model, 10 * seed + step, student)
    return root


def mixture_rows(data: Path) -> None:
    """Rows of boolq, squad and eng_spa with the fields they have on the Hub."""
    for split, start, count in (("train", 0, 6), ("test", 50, 4)):
        boolq, squad, eng_spa = [], [], []
        for i, row in enumerate(toys.rows(count, start)):
            long = 60 if (split, i) == ("test", 1) else 1
            boolq.append({"passage": row["answer"] * long, "question": "is it more", "answer": i % 2 == 0})
            answers = {"text": [row["answer"].split()[-1], row["answer"].split()[1]], "answer_start": [0, 0]}
            squad.append(
                {"title": "A_day", "context": row["answer"], "question": row["question"][-20:], "answers": answers}
            )
            eng_spa.append({"translation": {"en": row["question"][:20], "es": f"Son {start + i} monedas."}})
        for task, lines in (("boolq", boolq), ("squad", squad), ("eng_spa", eng_spa)):
            toys.write_jsonl(data / task / f"{split}.jsonl", lines)


@pytest.fixture(scope="session")
def scored_mixture(trained_mixture, tmp_path_factory) -> "tuple[TinyRun, str]":
    """The mixture scored once through the command line, and what was printed. Do not write to it."""
    folder, out = tmp_path_factory.mktemp("scored") / "run", io.StringIO()
    shutil.copytree(trained_mixture / "run", folder)
    run = TinyRun(trained_mixture, folder)
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr("stage3_eval.compare._RESAMPLES", FEW_RESAMPLES)
        assert main(run.arguments) == 0
    return run, out.getvalue()


@pytest.fixture
def mixture(trained_mixture, scored_mixture, tmp_path) -> "TinyRun":
    """A copy of the scored mixture's run that a test may change; its recipe reads the shared models and rows."""
    shutil.copytree(scored_mixture[0].folder, tmp_path / "run")
    return TinyRun(trained_mixture, tmp_path / "run")


@pytest.fixture
def run(trained, tmp_path) -> "TinyRun":
    """A copy of the trained run that a test may change; its recipe reads the shared model and rows."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return TinyRun(trained, tmp_path / "run")


class TinyRun:
    """The recipe file of the shared run with a run folder of its own."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.model, self.folder = root / "model", folder
        self.arguments = ["--recipe", str(root / "recipe.yaml"), "--set", f"run_dir={folder}"]

    def sets(self, *overrides: str) -> list[str]:
        """The command line's arguments with some more overrides."""
        return [*self.arguments, *(part for override in overrides for part in ("--set", override))]

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(self.arguments[1], [f"run_dir={self.folder}", *overrides])
