"""Whatever decides what a cached number means is changed in turn, at its source; no stage reads the cache after that.

The cache is real, and so is what is changed: the weights in the folder, the tokenizer's file, a row of the data. Where
a field is a constant of the code, the constant is changed. What an arm was trained with is treated likewise.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import promised
import pytest
import toys

from cache_schema.errors import FingerprintMismatch
from pipeline.__main__ import main as pipeline
from pipeline.errors import RunError
from pipeline.fingerprint import Experiment
from pipeline.recipe import load_recipe
from pipeline.run_dir import RunDir
from pipeline.tasks import gsm8k
from stage1_teacher.__main__ import main as stage1
from stage2_student.__main__ import main as stage2

TASKS = "gsm8k", "pocket_math", "pocket_yesno", "pocket_qa", "pocket_summary"
SFT = "arms={sft: {ce: 1.0}}"  # needs nothing of a cache but its text, so that no other check comes first


@dataclass(frozen=True)
class Change:
    """One thing that is another one than when the cache was made.

    fields: what must be named. sets: overrides of the recipe. edit: changes the folder of the recipe. patch: changes a
    constant, (where, value). of: the cache that it is tried on.
    """

    fields: frozenset[str]
    sets: tuple[str, ...] = ()
    edit: Callable[[Path], Any] = lambda folder: None
    patch: tuple[str, Any] | None = None
    of: str = "chat"


def _sets(field: str, *sets: str, of: str = "chat") -> Change:
    return Change(frozenset({field}), sets, of=of)


def _edit(fields: str, edit: Callable[[Path], Any], of: str = "chat") -> Change:
    return Change(frozenset(fields.split()), edit=edit, of=of)


def _patch(field: str, where: str, value: Any) -> Change:
    return Change(frozenset({field}), patch=(where, value))


def _rows(change: Callable[[list[Any]], Any]) -> Callable[[Path], Any]:
    """Change the training rows in place."""

    def edit(folder: Path) -> None:
        path = folder / "data" / "gsm8k" / "train.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows)
        toys.write_jsonl(path, rows)

    return edit


def _json(name: str, **values: Any) -> Callable[[Path], Any]:
    """Change values of a JSON file in the model's folder."""

    def edit(folder: Path) -> None:
        path = folder / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def _shots(folder: Path) -> set[str]:
    recipe = load_recipe(str(folder / "recipe.yaml"), [f"data.dir={folder / 'data'}"])
    return {shot.prompt for shot in Experiment(recipe).training_set.shots.pool["gsm8k"]}


def _other_shot(folder: Path) -> None:
    """Another answer of a worked example, which is itself no cached row."""
    wanted = _shots(folder)
    _rows(lambda rows: [row.update(answer=row["answer"] + "!") for row in rows if row["question"] in wanted])(folder)


TEMPLATE = "chat_template.jinja"
CHANGES = {
    "weights": _edit("teacher.weights", lambda f: toys.tiny_qwen3(f / "model", seed=1)),
    "config": _edit("teacher.weights", _json("config.json", rms_norm_eps=1e-5)),
    "kind": Change(
        frozenset(["teacher.kind", "tokenizer.layout", "tokenizer.chat_template", "tokenizer.thinking"]),
        (SFT, "teacher.kind=seq2seq", "teacher.thinking=null", "cache.store_ids=true"),
    ),
    "engine": _sets("teacher.engine", "teacher.engine=vllm"),
    "quantization": _sets("teacher.quantization", "teacher.quantization=nf4"),
    "dtype": _sets("teacher.dtype", "teacher.dtype=bfloat16"),
    "head dtype": Change(frozenset({"teacher.head_dtype"}), of="other head"),
    "tokenizer": _edit("tokenizer.sha256", lambda f: _retrained(f / "model")),
    "template": _edit("tokenizer.chat_template", lambda f: _text(f, lambda t: t.replace("role }}\n", "role }}:\n"))),
    "no template": replace(
        _edit(
            "tokenizer.chat_template tokenizer.layout tokenizer.end_of_sequence tokenizer.thinking",
            lambda f: (f / "model" / TEMPLATE).unlink(),
        ),
        sets=("teacher.thinking=null",),  # a template that is gone cannot read the switch
    ),
    "end of turn": _edit(
        "tokenizer.chat_template tokenizer.end_of_sequence",
        lambda f: _text(f, lambda t: t.replace("<|end|>", "<|pad|>")),
    ),
    "thinking": _sets("tokenizer.thinking", "teacher.thinking=true"),
    "decoder start": _edit(
        "tokenizer.decoder_start", _json("tokenizer_config.json", pad_token="<|start|>"), of="seq2seq"
    ),
    "offsets": _patch("tokenizer.offsets", "pipeline.prompts.OFFSETS", 3),
    "shots": _sets("shots.count", "teacher.shots=3"),
    "shot seed": _sets("shots.seed", "teacher.shot_seed=1"),
    "shot policy": _sets("shots.policy", "teacher.shot_policy=per_example"),
    "shot": _edit("data.sha256", _other_shot),
    "task version": _patch("tasks.gsm8k.version", "pipeline.tasks.gsm8k.TASK", replace(gsm8k.TASK, version=2)),
    "task option": _sets(
        "tasks.gsm8k.options.strip_calculator_marks", "data.tasks.gsm8k.options={strip_calculator_marks: true}"
    ),
    "question": _edit("data.sha256", _rows(lambda rows: rows[20].update(question=rows[20]["question"] + " "))),
    "answer": _edit("data.sha256", _rows(lambda rows: rows[20].update(answer=rows[20]["answer"] + "\n"))),
    "order of rows": _edit("data.sha256", _rows(lambda rows: rows.reverse())),
    "a row more": _edit("data.examples data.sha256", _rows(lambda rows: rows.append(toys.rows(1, start=50)[0]))),
    "a row less": _sets("data.examples", "data.train_limit=20"),
    "held out": _sets("data.examples", "data.held_out=2"),
    "a bad row": _edit("data.sha256", _rows(lambda rows: rows[20].pop("answer"))),
    "answers": Change(frozenset({"answers"}), of="other head"),
    "schema": _patch("schema_version", "pipeline.fingerprint.SCHEMA_VERSION", 99),
    "selector": _sets("cache.selector", SFT, "cache.selector=sampled"),
    "sample seed": _sets("cache.sample_seed", "cache.sample_seed=1", of="sampled"),
    "K": _sets("cache.top_k", "cache.top_k=8"),
    "temperature": _sets("cache.temperatures", "cache.temperatures=[1.0, 3.0]"),
    "step": _sets("cache.step", "cache.step=0.03125"),
    "codec": _sets("cache.codec", "cache.codec=small"),
    "ids": _sets("cache.store_ids", SFT, "cache.store_ids=false"),
}
NO_CHANGE = [
    "runtime.device=auto",
    "runtime.batch_tokens=99",
    "runtime.processes=1",
    "data.eval_limit=2",
    "eval.max_new_tokens=7",
    "eval.batch_size=1",
    "cache.sample_seed=5",
    "train.lr=1.0",
    "students.toy.lora.r=2",
    "name=another",
]


def _retrained(folder: Path) -> None:
    """Another tokenizer.json, the rest as it was."""
    toys.tiny_tokenizer(folder.parent / "retrained", vocab_size=300, chat=True)
    shutil.copy(folder.parent / "retrained" / "tokenizer.json", folder / "tokenizer.json")


def _text(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "model" / TEMPLATE
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a recipe with its sealed cache: a chat model, an encoder-decoder, drawn ids, and one whose manifest
    says that the head ran in bfloat16 and the answers were the teacher's own, which no recipe can ask for yet."""
    root: Path = tmp_path_factory.mktemp("bases")
    distill = {"ce": 1.0, "logit_mse": 0.5, "kl": 0.5, "uld": 0.5}
    sections: dict[str, dict[str, Any]] = {
        "chat": {"teacher": {"thinking": False}, "arms": {"distill": distill}, "cache": {"temperatures": [1.0, 2.0]}},
        "seq2seq": {"teacher": {"kind": "seq2seq"}, "arms": {"distill": {"logit_mse": 0.0, "uld": 1.0}}},
        "sampled": {"cache": {"selector": "sampled"}, "arms": {"distill": {"logit_mse": 0.0, "kl": 1.0}}},
        "other head": {"teacher": {"thinking": False}, "arms": {"distill": distill}},
    }
    for name, overrides in sections.items():
        folder = root / name
        toys.tiny_tokenizer(folder / "model", chat=name in ("chat", "other head"))
        (toys.tiny_t5 if name == "seq2seq" else toys.tiny_qwen3)(folder / "model")
        recipe = load_recipe(str(toys.tiny_recipe(folder, **overrides)))
        with pytest.MonkeyPatch.context() as patched:
            if name == "other head":
                made = Experiment(recipe).identity
                made |= {"answers": "teacher", "teacher": made["teacher"] | {"head_dtype": "bfloat16"}}
                patched.setattr("pipeline.fingerprint.Experiment.identity", made)
            toys.fill_cache(recipe)
    return {name: root / name for name in sections}


def moved(bases: dict[str, Path], name: str, to: Path) -> list[str]:
    """A copy of a recipe's models and data; the arguments that read the old cache with them."""
    to.mkdir(parents=True, exist_ok=True)
    for part in ("model", "data"):
        shutil.copytree(bases[name] / part, to / part)
    shutil.copy(bases[name] / "recipe.yaml", to / "recipe.yaml")
    sets = [f"teacher.model={to / 'model'}", f"data.dir={to / 'data'}", f"run_dir={to / 'run'}"]
    sets.append(f"students.toy.model={bases['chat' if name == 'seq2seq' else name] / 'model'}")
    return ["--recipe", str(to / "recipe.yaml"), *(part for s in sets for part in ("--set", s))]


def refusals(arguments: list[str]) -> Iterator[FingerprintMismatch]:
    """What stage 1, stage 2 and `status` say to a cache that must not be read."""
    for main, before in ((stage1, []), (stage2, []), (pipeline, ["status"])):
        with pytest.raises(FingerprintMismatch) as refused:
            main([*before, *arguments])
        yield refused.value


def differing(change: Change, arguments: list[str], folder: Path, patched: pytest.MonkeyPatch) -> set[str]:
    """The fields that all three commands name."""
    change.edit(folder)
    if change.patch:
        patched.setattr(*change.patch)
    arguments = [*arguments, *(part for s in change.sets for part in ("--set", s))]
    named = [{difference.field for difference in refusal.differences} for refusal in refusals(arguments)]
    assert named[0] == named[1] == named[2]
    return named[0]


def leaves(tree: Any, place: str = "") -> set[str]:
    """The dotted names of an identity's values, as a refusal names them."""
    if not isinstance(tree, dict):
        return {place}
    return {leaf for key, value in tree.items() for leaf in leaves(value, f"{place}.{key}" if place else key)}


MAY_DIFFER_TOO = {
    "data.sha256",
    "data.examples",
    "cache.sample_seed",
    "tokenizer.end_of_sequence",
    "tokenizer.decoder_start",
}


@pytest.mark.promise(promised.STALE)
def test_every_field_changed_in_turn_is_refused_and_named(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Any
) -> None:
    """And no other field is. A field that is added to the identity needs a change in the table, or this fails."""
    changed: set[str] = set()
    for number, (what, change) in enumerate(CHANGES.items()):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patched:
            fields = differing(change, moved(bases, change.of, folder), folder, patched)
        forged = {"answers", "teacher.head_dtype"} if change.of == "other head" else set()
        assert change.fields <= fields <= change.fields | forged | MAY_DIFFER_TOO, (what, fields)
        changed |= fields
    recipes = [str(bases[name] / "recipe.yaml") for name in ("chat", "seq2seq", "sampled")]
    for recipe in [*recipes, "pocket", "pocket-uld"]:
        known = leaves(Experiment(load_recipe(recipe)).identity)
        known = {re.sub(rf"^tasks\.({'|'.join(TASKS)})\.", "tasks.gsm8k.", leaf) for leaf in known}
        assert known <= changed, known - changed
    tried(3 * len(CHANGES), f"commands on caches of another identity, {len(changed)} fields changed")


@pytest.mark.parametrize("name", ["chat", "seq2seq", "sampled"])
def test_the_control_what_means_the_same_is_accepted(
    name: str, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same models and rows elsewhere, another device, batch, limit, student: none of it is refused."""
    sets = [s for s in NO_CHANGE if name != "sampled" or "sample_seed" not in s]
    arguments = [*moved(bases, name, tmp_path), *(part for s in [*sets, "train.steps=1"] for part in ("--set", s))]
    assert pipeline(["status", *arguments]) == 0
    assert stage1(arguments) == 0
    assert "complete" in capsys.readouterr().out
    assert stage2(arguments) == 0


def test_an_unfinished_cache_is_refused_too(bases: dict[str, Path], tmp_path: Path) -> None:
    """Stage 1 does not go on with it."""
    cache = bases["chat"].parent / "unfinished"
    shutil.copytree(bases["chat"] / "cache", cache)
    (cache / "sealed.json").unlink()
    (cache / "shards" / "00001.json").unlink()
    before = sorted(path.name for path in cache.rglob("*"))
    arguments = [*moved(bases, "chat", tmp_path), "--set", f"cache.dir={cache}", "--set", "cache.top_k=8"]
    with pytest.raises(FingerprintMismatch, match=r"cache\.top_k"):
        stage1(arguments)
    assert sorted(path.name for path in cache.rglob("*")) == before
    assert stage1(arguments[:-2]) == 0  # the control


ARM_CHANGES = {
    "cache": ("cache", ["cache.top_k=8"]),
    "student.weights": ("student.weights", ["students.toy.model={other}"]),
    "student.dtype": ("student.dtype", ["students.toy.dtype=bfloat16"]),
    "student.tokenizer.thinking": ("student.tokenizer.thinking", ["teacher.thinking=true"]),
    **{
        f"student.lora.{key}": (f"student.lora.{key}", [f"students.toy.lora.{key}={value}"])
        for key, value in (("r", 2), ("alpha", 9), ("dropout", 0.1), ("targets", "[q_proj]"))
    },
    **{
        f"train.{key}": (f"train.{key}", [f"train.{key}={value}"])
        for key, value in (
            ("steps", 9),
            ("batch_size", 3),
            ("lr", 0.5),
            ("warmup_steps", 3),
            ("schedule", "linear"),
            ("weight_decay", 0.5),
            ("max_grad_norm", 0.5),
            ("save_every", 3),
            ("seed", 3),
        )
    },
    **{
        f"losses.{key}": (f"losses.{key}", [f"arms.distill.{key}={value}"])
        for key, value in (
            ("ce", 0.5),
            ("logit_mse", 0.25),
            ("kl", 0.25),
            ("uld", 0.25),
            ("temperature", 2.0),
            ("alignment", "index"),
        )
    },
}
ARM_PATCHES = {
    "order.block": ("stage2_student.arms.BLOCK", 128),
    "order.window": ("stage2_student.arms.WINDOW", 4),
    "losses.alignment_version": ("stage2_student.arms.VERSION", 99),
    "student.tokenizer.offsets": ("pipeline.prompts.OFFSETS", 3),
}


def _named(arguments: list[str]) -> set[str]:
    with pytest.raises(RunError, match="holds an arm that was trained with other settings") as refused:
        stage2(arguments)
    return set(re.findall(r"^  (\S+): trained with ", str(refused.value), re.MULTILINE))


def test_what_an_arm_was_trained_with_is_refused_field_by_field(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field of arm.json; micro-batches and where the cache lies are none."""
    recipe = str(bases["chat"] / "recipe.yaml")
    model = tmp_path / "model"
    shutil.copytree(bases["chat"] / "model", model)
    run = ["--recipe", recipe, "--set", f"run_dir={tmp_path / 'run'}", "--set", f"students.toy.model={model}"]
    assert stage2([*run, "--set", "train.steps=2"]) == 0
    run += ["--set", "train.steps=2"]
    toys.tiny_tokenizer(tmp_path / "other", chat=True)
    toys.tiny_qwen3(tmp_path / "other", seed=1)
    seen: set[str] = set()
    for field, sets in ARM_CHANGES.values():
        named = _named([*run, *(part for s in sets for part in ("--set", s.format(other=tmp_path / "other")))])
        assert field in named and named <= {field, "cache"}, (field, named)
        seen |= named
    for field, patch in ARM_PATCHES.items():
        with monkeypatch.context() as patched:
            patched.setattr(*patch)
            named = _named(run)
        assert field in named and named <= {field, "cache"}, (field, named)
        seen |= named
    for edit, fields in (
        (lambda: _retrained(model), {"student.tokenizer.sha256"}),
        (lambda: _text(tmp_path, lambda t: t.replace("role }}\n", "role }}:\n")), {"student.tokenizer.chat_template"}),
        (lambda: _text(tmp_path, lambda t: t.replace("<|end|>", "<|pad|>")), {"student.tokenizer.end_of_sequence"}),
        (lambda: (model / TEMPLATE).unlink(), {"student.tokenizer.layout"}),
    ):
        edit()
        named = _named(run)
        assert fields <= named and all(name.startswith("student.tokenizer.") for name in named), named
        seen |= named
    folder = RunDir.of(load_recipe(recipe, [f"run_dir={tmp_path / 'run'}"])).arm("toy", "distill")
    assert leaves(json.loads(folder.identity.read_text())) <= seen
    shutil.rmtree(model)
    shutil.copytree(bases["chat"] / "model", model)
    assert stage2([*run, "--set", "train.micro_batch_size=1", "--set", "eval.batch_size=1"]) == 0  # the control
