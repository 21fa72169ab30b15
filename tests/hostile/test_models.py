"""Folders with a model or an adapter that a stranger made: no code of theirs runs, and nothing beside them is read.

The payload of each makes a file. It must never be there, whether the folder is refused or loaded without it.
"""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import promised
import pytest
import torch
import toy_adapters
import toys
from safetensors import safe_open

from pipeline.errors import UserError
from pipeline.models import load_causal_lm, load_config, load_tokenizer, locate

ROOT = Path(__file__).parent.parent.parent
CODE = "open({mark!r}, 'w').close()\nfrom transformers import Qwen3ForCausalLM as M, Qwen3Config as C\n"
ESCAPES = (
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}",
    "{{{{ self.__init__.__globals__.__builtins__.open('{mark}', 'w') }}}}",
    "{{{{ namespace.__init__.__globals__['__builtins__']['open']('{mark}', 'w') }}}}",
    "{{{{ (messages|attr('__class__')).__base__.__subclasses__() }}}}",
    "{{{{ '{{0.__class__.__base__}}'.format(messages).__class__.__mro__[1].__subclasses__() }}}}",
    "{{{{ raise_exception.__globals__['__builtins__']['open']('{mark}', 'w') }}}}",
    "{{{{ strftime_now.__globals__.__builtins__.open('{mark}', 'w') }}}}",
    "{{{{ range(10 ** 9) | list }}}}",
    "{{{{ messages.append(1) }}}}",
)


class Payload:
    """What unpickling turns into an open file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def changed(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def config_code(folder, mark):
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    changed(folder / "config.json", auto_map=names)
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))


def unknown_type_code(folder, mark):
    config_code(folder, mark)
    changed(folder / "config.json", model_type="evil")


def tokenizer_code(folder, mark):
    changed(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}, tokenizer_class="evil.T"
    )
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))


def generation_code(folder, mark):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)))
    changed(folder / "generation_config.json", custom_generate=str(folder))


def pickled(name, alone):
    def change(folder, mark):
        if alone:
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))

    return change


def index_to(target):
    def change(folder, mark):
        outside = folder.parent / "outside.safetensors"
        shutil.move(folder / "model.safetensors", outside)
        with safe_open(outside, "pt") as file:
            weights = dict.fromkeys(file.keys(), target.format(outside=outside))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))

    return change


def weights_of(data):
    return lambda folder, mark: (folder / "model.safetensors").write_bytes(data)


def config_of(**changes):
    return lambda folder, mark: changed(folder / "config.json", **changes)


def written(name, text):
    return lambda folder, mark: (folder / name).write_text(text)


# How each folder must end: refused with these words, or loaded without what is hostile in it (None).
MODELS = {
    "code for config and model": (config_code, None),
    "code for a type of model that nobody knows": (unknown_type_code, "config.json cannot be read: .*custom code"),
    "code for the tokenizer": (tokenizer_code, None),
    "code for generation": (generation_code, None),
    "pickled weights": (pickled("pytorch_model.bin", True), "no file named model.safetensors"),
    "pickled weights beside others": (pickled("pytorch_model.bin", False), None),
    "a pickled optimizer": (pickled("optimizer.pt", False), None),
    "pickled arguments of training": (pickled("training_args.bin", False), None),
    "an index to the folder above": (index_to("../outside.safetensors"), r"names '\.\./outside.safetensors'"),
    "an index to an absolute path": (index_to("{outside}"), "names '/.*expected safetensors files of the same folder"),
    "an index to a pickle": (index_to("pytorch_model.bin"), "names 'pytorch_model.bin'"),
    "an index of numbers": (written("model.safetensors.index.json", '{"weight_map": {"a": 3}}'), "names 3"),
    "an index without a map": (written("model.safetensors.index.json", "[]"), "expected an object, found a list"),
    "a header of 2**62 bytes": (weights_of((2**62).to_bytes(8, "little") + bytes(99)), "header too large"),
    "a header that is no JSON": (weights_of((9).to_bytes(8, "little") + b"not json "), "header"),
    "a tensor beyond the file": (
        weights_of((59).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}    '),
        "cannot be loaded",
    ),
    "an empty file of weights": (weights_of(b""), "cannot be loaded"),
    "an adapter of another model": (
        written("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "evil/base"}'),
        "it is an adapter that names another model",
    ),
    "a kernel of the Hub": (config_of(_attn_implementation="evil/kernel"), "is 'evil/kernel', code of the Hub"),
    "kernels of the Hub for its experts": (
        config_of(text_config={"experts_implementation": "evil/kernel:x"}),
        "code of the Hub",
    ),
    "kernels of the Hub in a list": (config_of(parts=[{"_attn_implementation": "evil/k"}]), "code of the Hub"),
    "a kernel of the Hub by its inner name": (
        config_of(_attn_implementation_internal="evil/kernel"),
        "code of the Hub",
    ),
    "a kernel of a long name": (config_of(_attn_implementation="evil/" + "k" * 10**5), "code of the Hub"),
    "a config nested 900 deep": (written("config.json", '{"a":' * 900 + "1" + "}" * 900), "more than 64 deep"),
    "an index to a long name": (index_to("x" * 10**5), "weight_map names 'x"),
    "a vocabulary of 2**40": (config_of(vocab_size=2**40), "cannot be loaded"),
    "a config that is a list": (written("config.json", "[1]"), "expected an object, found a list"),
    "a config nested deep": (written("config.json", "[" * 10**5), "config.json: it cannot be read"),
    "a tokenizer that is empty": (written("tokenizer.json", "{}"), "its tokenizer cannot be loaded"),
    "a tokenizer that is no JSON": (written("tokenizer.json", "["), "its tokenizer cannot be loaded"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = toys.tiny_qwen3(tmp_path_factory.mktemp("plain") / "model")
    toys.tiny_tokenizer(folder, chat=True)
    return folder


def load(folder):
    """All that the stages take from a model folder."""
    source = locate(str(folder))
    load_config(source)
    load_tokenizer(source)
    return load_causal_lm(source, "float32", "none", torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")  # transformers has much to say about some of these folders
@pytest.mark.promise(promised.STRANGE_MODEL)
def test_model_folders(plain, tmp_path, tried):
    mark = tmp_path / "it ran"
    for name, (change, refused) in MODELS.items():
        folder = tmp_path / name / "model"
        shutil.copytree(plain, folder)
        change(folder, mark)
        if refused is None:
            load(folder)
        else:
            with pytest.raises(UserError, match=refused) as caught:
                load(folder)
            assert "model" in str(caught.value) and len(str(caught.value)) < 2000, name
        assert not mark.exists(), name
        shutil.rmtree(folder.parent)
    tried(len(MODELS), "model folders with code, pickles or paths to elsewhere")


def test_the_payloads_do_run_where_they_are_let(plain, tmp_path):
    """The control: the same folders, loaded by someone who trusts them."""
    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(plain, folder)
    config_code(folder, mark)
    trusting = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    )
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", trusting], env=env, capture_output=True, check=True)
    assert mark.exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "unpickled"))).close()
    assert (tmp_path / "unpickled").exists()


@pytest.mark.promise(promised.STRANGE_MODEL)
def test_chat_templates(plain, tmp_path, tried):
    mark = tmp_path / "ran"
    for template in ESCAPES:
        folder = tmp_path / "model"
        shutil.copytree(plain, folder)
        (folder / "chat_template.jinja").write_text(template.format(mark=mark))
        tokenizer = load_tokenizer(locate(str(folder)))
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        except Exception as error:
            text = type(error).__name__
        assert not mark.exists() and "<class" not in text, template
        shutil.rmtree(folder)
    tried(len(ESCAPES), "chat templates that reach for Python")


# -- adapters

ADAPTERS = {
    "an import": {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "evil"},
    "an import of another name": {"megatron_core": "evil"},
    "a class of another library": {"auto_mapping": {"base_model_class": "M", "parent_library": "evil"}},
    "another kind": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2},
    "a kind that loads another tokenizer": {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "evil/x"},
    "a kind that nobody knows": {"peft_type": "EVIL"},
    "a million layers": {"layer_replication": [[0, 1]] * 10**6},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "another start": {"init_lora_weights": "pissa"},
    "weights of its own": {"corda_config": {"cache_file": "/etc/passwd"}},
    "a pattern of names": {"target_modules": "(a+)+$"},
    "no names": {"target_modules": None},
    "numbers for names": {"target_modules": [1]},
    **{f"a rank of {rank}": {"r": rank} for rank in (0, -1, 4097, 10**12, 2.5, True, "8")},
    **{f"an alpha of {a}": {"lora_alpha": a} for a in (-1, 10**12, float("nan"), float("inf"), "1", None)},
    "a dropout of 2": {"lora_dropout": 2},
    "a name and a value of many characters": {"x" * 10**5: "y" * 10**5},
    "something that is yet to be invented": {"run_this": "evil.py"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.promise(promised.STRANGE_MODEL)
def test_adapter_folders(plain, tmp_path, tried, monkeypatch):
    from stage3_eval.generate.hf import HFEngine
    from stage3_eval.generate.vllm import _targets

    (tmp_path / "evil.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(tmp_path)
    honest = tmp_path / "honest"
    toy_adapters.write_adapter(honest, plain, seed=1)
    engine = HFEngine(load(plain), batch_size=2)
    ask = ([[5, 6, 7]], 2, 0)
    assert engine.generate(ask[0], honest, *ask[1:]) and _targets(honest)
    for name, changes in ADAPTERS.items():
        folder = tmp_path / name
        shutil.copytree(honest, folder)
        changed(folder / "adapter_config.json", **changes)
        for use in (lambda f: engine.generate(ask[0], f, *ask[1:]), _targets):
            with pytest.raises(UserError, match=r"adapter_config\.json") as caught:
                use(folder)
            assert len(str(caught.value)) < 1000 and "rm -r" not in str(caught.value), name
    for name, change in {"pickled": pickled("adapter_model.bin", False), "cut": weights_of(b"x")}.items():
        folder = tmp_path / name
        shutil.copytree(honest, folder)
        weights = folder / "adapter_model.safetensors"
        if name == "pickled":
            change(folder, tmp_path / "ran")
            weights.unlink()
        else:
            weights.write_bytes(b"x")
        with pytest.raises(UserError, match=r"adapter_model\.safetensors|does not fit"):
            engine.generate(ask[0], folder, *ask[1:])
    assert not (tmp_path / "ran").exists()
    assert engine.generate(ask[0], honest, *ask[1:])  # and goes on
    tried(len(ADAPTERS) + 2, "adapter folders that are more than plain LoRA")


@pytest.mark.promise(promised.STRANGE_MODEL)
def test_a_checkpoint_is_resumed_from_safetensors_alone(plain, tmp_path, tried):
    from pipeline.errors import RunError
    from stage2_student import checkpoint

    mark = tmp_path / "ran"
    toy_adapters.write_adapter(tmp_path / "c", plain, seed=1)
    folder = tmp_path / "c"
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Payload(mark)))

    def sha(name):
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()

    states = ["[]", "null", '{"step": []}', "[" * 10**5, "{}"]
    for content in (pickle.dumps(Payload(mark)), b"", b"x" * 100, (2**62).to_bytes(8, "little") + bytes(50)):
        (folder / "optimizer.safetensors").write_bytes(content)
        hashes = {"adapter_sha256": sha("adapter_model.safetensors"), "optimizer_sha256": sha("optimizer.safetensors")}
        states.append(json.dumps({"step": 3, **hashes}))
        states.append(json.dumps({"step": {}, **hashes}))
        for state in states:
            (folder / "state.json").write_text(state)
            with pytest.raises(RunError, match=r"cannot be used.*\n.*remove it"):
                checkpoint.load(folder, None, {}, None)
    assert not mark.exists()
    tried(4 * len(states), "checkpoints that are not what was written")


def test_the_command_line_says_it_in_a_sentence(plain, tmp_path):
    """Exit code 2, the file's name, no traceback."""
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    index_to("../outside.safetensors")(folder, None)
    recipe = toys.tiny_recipe(tmp_path / "r")
    command = [sys.executable, "-m", "stage1_teacher", "--recipe", str(recipe), "--set", f"teacher.model={folder}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr, ran.stderr
    assert "model.safetensors.index.json: weight_map names '../outside.safetensors'" in ran.stderr
