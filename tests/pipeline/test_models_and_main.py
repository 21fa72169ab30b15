"""Finding models, and the front door's small commands."""

import pytest
import toys

from pipeline.__main__ import main
from pipeline.errors import ModelError, RecipeError, unknown_name
from pipeline.models import (
    ModelSource,
    kv_cache_argument,
    load_causal_lm,
    load_config,
    load_seq2seq_lm,
    load_tokenizer,
    locate,
    tokenizer_digest,
    vocabulary,
)
from pipeline.recipe import describe_keys, load_recipe, recipe_names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("embedded:nothing", "no such embedded model; there are: .*embedded:decoder"),
        ("./nowhere", "no such folder, and not a Hub name"),
        ("a/b/c", "no such folder, and not a Hub name"),
        ("qwen", "no such folder, and not a Hub name"),
    ],
)
def test_a_model_that_is_not_there_is_named(name, words):
    with pytest.raises(ModelError, match=words):
        locate(name)


def test_the_hub_without_a_network_says_what_to_do_instead(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"model nobody/nothing: neither the Hub nor its local cache.*give a folder"):
        locate("nobody/nothing")


def test_a_folders_identity_is_its_content(tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    toys.tiny_qwen3(one, seed=0)
    toys.tiny_qwen3(same, seed=0)
    toys.tiny_qwen3(other, seed=1)
    identities = [ModelSource(str(folder), None).identity() for folder in (one, same, other)]
    assert identities[0] == identities[1] != identities[2]
    assert ModelSource("owner/name", "abc").identity() == "owner/name@abc"


def test_pickled_weights_are_not_read(tmp_path):
    import torch

    toys.tiny_qwen3(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded as a causal model"):
        load_causal_lm(ModelSource(str(tmp_path), None), "float32", "none", torch.device("cpu"))


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(toys.tiny_qwen3(tmp_path) / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for model\.norm\.weight and 0 more"):
        load_causal_lm(ModelSource(str(tmp_path), None), "float32", "none", torch.device("cpu"))


def test_a_tokenizers_digest_is_the_same_after_any_call(tmp_path):
    """A tokenizer keeps the padding and truncation of its last call, and a save keeps them with it."""
    tokenizer = toys.tiny_tokenizer(tmp_path / "fresh")
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == digest
    tokenizer.save_pretrained(tmp_path / "used")
    used = load_tokenizer(ModelSource(str(tmp_path / "used"), None))
    assert '"max_length": 2' in (tmp_path / "used" / "tokenizer.json").read_text(encoding="utf-8")
    assert tokenizer_digest(used) == digest
    assert tokenizer_digest(toys.tiny_tokenizer(tmp_path / "other", vocab_size=330)) != digest


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"its config.json cannot be read: .*nothing-known"):
        load_config(locate(str(tmp_path)))


def test_a_decoder_is_no_encoder_decoder(tmp_path):
    import torch

    toys.tiny_qwen3(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded as an encoder-decoder"):
        load_seq2seq_lm(ModelSource(str(tmp_path), None), "float32", "none", torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_kv_cache_is_passed_by_the_name_that_the_model_knows(tmp_path):
    """With and without an adapter around it. A name it only tolerates would be a warning, which fails here."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import DynamicCache

    toys.tiny_llama(tmp_path)
    model = load_causal_lm(ModelSource(str(tmp_path), None), "float32", "none", torch.device("cpu"))
    ids_1L = torch.tensor([[5, 6, 7, 8]])
    for wrapped in (model, get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))):
        cache = DynamicCache()
        with torch.no_grad():
            whole = wrapped(input_ids=ids_1L).logits
            wrapped(input_ids=ids_1L[:, :2], use_cache=True, **kv_cache_argument(wrapped, cache))
            rest = wrapped(input_ids=ids_1L[:, 2:], use_cache=True, **kv_cache_argument(wrapped, cache)).logits
        torch.testing.assert_close(rest, whole[:, 2:], rtol=0, atol=2e-5)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    toys.tiny_qwen3(tmp_path)
    with pytest.raises(ModelError, match="it has no tokenizer"):
        load_tokenizer(ModelSource(str(tmp_path), None))


def test_the_vocabulary_is_as_long_as_the_head(tmp_path):
    tokenizer = toys.tiny_tokenizer(tmp_path)
    texts = vocabulary(tokenizer, 400)
    assert len(texts) == 400 and texts[399] is None
    assert texts[tokenizer("7", add_special_tokens=False)["input_ids"][0]] == "7"


def test_show_and_recipes(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipe_names())
    assert main(["show", "--keys"]) == 0
    keys = capsys.readouterr().out
    assert all(key in keys for key, *_ in describe_keys())
    assert main(["show", "--recipe", "gsm8k-qwen3", "--set", "train.lr=1e-3", "--field", "train.lr"]) == 0
    assert capsys.readouterr().out.strip() == "0.001"
    with pytest.raises(RecipeError, match="unknown key 'lrr'"):
        main(["show", "--recipe", "gsm8k-qwen3", "--field", "train.lrr"])


def test_what_show_prints_is_a_recipe(tmp_path, capsys):
    assert main(["show", "--recipe", "gsm8k-qwen3", "--no-example"]) == 0
    (tmp_path / "copy.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(str(tmp_path / "copy.yaml")) == load_recipe("gsm8k-qwen3")


def test_status_names_every_repeat(tmp_path, capsys):
    recipe = str(toys.tiny_recipe(tmp_path, train={"repeats": 2}))
    assert main(["status", "--recipe", recipe]) == 0
    printed = capsys.readouterr().out
    assert all(f"toy/{name}: no checkpoint of 4 steps" in printed for name in ("sft", "sft~1", "distill", "distill~1"))


def test_names_are_suggested():
    assert unknown_name("recipe", "pokcet", ["pocket", "other"]).startswith(
        "unknown recipe 'pokcet'. Did you mean 'pocket'?"
    )
    assert "Did you mean" not in unknown_name("recipe", "zzz", ["pocket"])
