"""Recipes are strict: what is wrong is named, with what was found and what was expected."""

import pytest
import toys
import yaml

from pipeline.errors import RecipeError
from pipeline.fingerprint import Experiment
from pipeline.recipe import Recipe, describe_keys, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_built_in_recipe_passes_its_own_check(name):
    assert load_recipe(name).name == name


def test_the_published_settings_are_in_the_recipe():
    recipe = load_recipe("gsm8k-qwen3")
    assert (recipe.teacher.model, recipe.teacher.shots, recipe.teacher.thinking) == ("Qwen/Qwen3-1.7B", 8, False)
    assert (recipe.cache.top_k, recipe.arms["distill"].ce, recipe.arms["distill"].logit_mse) == (256, 1.0, 0.5)
    train = recipe.train
    assert (train.steps, train.batch_size, train.lr, train.save_every) == (1000, 32, 2e-4, 200)
    lora = recipe.students["qwen3"].lora
    assert (lora.r, lora.alpha, recipe.students["qwen3"].dtype) == (16, 32, "bfloat16")


def test_the_published_settings_of_universal_logit_distillation():
    recipe = load_recipe("flan-uld")
    teacher, cache = recipe.teacher, recipe.cache
    assert (teacher.model, teacher.kind, teacher.quantization) == ("google/flan-t5-xl", "seq2seq", "nf4")
    assert (teacher.dtype, teacher.shots, teacher.thinking) == ("bfloat16", 0, None)
    assert (cache.top_k, cache.temperatures, cache.store_ids) == (256, [1.2], False)
    assert {s.model: (s.lora.r, s.lora.alpha) for s in recipe.students.values()} == {
        "openai-community/gpt2-medium": (16, 32),
        "EleutherAI/pythia-410m": (16, 32),
        "HuggingFaceTB/SmolLM-360M": (16, 32),
    }
    arms = {name: (arm.ce, arm.uld, arm.temperature, arm.alignment) for name, arm in recipe.arms.items()}
    assert arms == {
        "sft": (1.0, 0.0, 1.0, None),
        "distill": (1.0, 0.5, 1.2, None),
        "distill_boundary": (1.0, 0.5, 1.2, "boundary"),
    }
    assert recipe.train.alignment == "index"
    scored = ["boolq", "squad", "samsum", "anli", "paws", "xsum", "common_gen", "cosmos_qa"]
    assert recipe.trained_tasks == scored and recipe.unseen_tasks == ["mbpp", "eng_spa"]
    assert (recipe.eval.splits, recipe.eval.shots) == (["train", "test"], 5)
    assert [r.model for r in recipe.eval.references.values()] == [
        f"google/flan-t5-{size}" for size in ("small", "base", "large", "xl", "xxl")
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", r"train: unknown key 'lrr'\. Did you mean 'lr'\?"),
        ("trian.lr=1", r"unknown key 'trian'\. Did you mean 'train'\?"),
        ("arms.distill.logit_mes=0.5", r"arms\.distill: unknown key 'logit_mes'\. Did you mean 'logit_mse'\?"),
        ("students.toy.lora.rank=8", r"students\.toy\.lora: unknown key 'rank'"),
        ("train.steps=many", r"train\.steps: .*valid integer; found 'many'"),
        ("train.steps=10.5", r"train\.steps: .*found 10\.5"),
        ("train.steps=true", r"train\.steps: .*found True"),
        ("train.steps=0", r"train\.steps: .*greater than or equal to 1; found 0"),
        ("cache.step=0.3", "step 0.3 is not a power of two"),
        ("teacher.dtype=int8", r"teacher\.dtype: .*found 'int8'"),
        ("arms.zero_shot={ce: 1.0}", "this name is a baseline's"),
        ("arms.idle={}", "needs a loss with a weight above zero"),
        ("arms.hot={kl: 1.0, temperature: 2.0}", r"temperature is 2\.0, but the cache holds .*\[1\.0\]"),
        ("cache.store_ids=false", "need token ids; set cache.store_ids=true"),
        ("eval.select=held_out", "data.held_out is 0"),
        ("teacher.shots=0", "few_shot, but teacher.shots is 0"),
        ("runtime.tensor_parallel=2", r"teacher\.engine is hf, which splits no layer; --set teacher\.engine=vllm"),
        ("runtime.device_map=auto", r"takes every GPU, but runtime\.device is cpu"),
        ("name=../elsewhere", r"name: .*found '\.\./elsewhere'"),
        ("arms.distil.ce=2.0", r"unknown arm 'distil'\. Did you mean 'distill'\?.*give it whole: --set 'arms\.distil="),
        ("students.tony.dtype=bfloat16", r"unknown student 'tony'\. Did you mean 'toy'\?"),
        ("data.tasks.gsm9k.train=3", r"unknown task of the recipe 'gsm9k'\. Did you mean 'gsm8k'\?"),
        ("train.lr", "expected key=value"),
        ("train.lr.x=1", "is a value, not a section"),
        ("train.lr=[", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, override, words):
    path = toys.tiny_recipe(tmp_path)
    with pytest.raises(RecipeError, match=words):
        load_recipe(str(path), [override])


@pytest.mark.parametrize(
    ("key", "found", "served"),
    [
        ("teacher.kind", "seq2seq", "causal"),
        ("teacher.quantization", "nf4", "none"),
        ("cache.selector", "sampled", "topk"),
        ("runtime.device_map", "auto", "null"),
    ],
)
def test_what_vllm_does_not_serve_is_refused(tmp_path, key, found, served):
    path = toys.tiny_recipe(tmp_path, runtime={"device": "auto"}, arms={"distill": None})
    override = f"{key}={found}"
    assert load_recipe(str(path), [override]).teacher.engine == "hf"
    with pytest.raises(RecipeError, match=rf"serves {key}={served} only, found {found}; --set teacher\.engine=hf"):
        load_recipe(str(path), ["teacher.engine=vllm", override])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.lr=1e-4", "lr", 1e-4),
        ("train.lr=2", "lr", 2.0),
        ("train.lr=.5", "lr", 0.5),
        ("train.schedule=linear", "schedule", "linear"),
    ],
)
def test_overrides_pass_through_the_same_check(tmp_path, override, key, value):
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path)), [override])
    assert getattr(recipe.train, key) == value


def test_an_encoder_decoders_ids_are_not_stored_unless_asked_for(tmp_path):
    """No loss could read them: whoever asks for one that needs ids is told of uld, not of ids."""
    path = str(toys.tiny_recipe(tmp_path))
    seq2seq = ["teacher.kind=seq2seq", "arms.distill={uld: 1.0}"]
    assert load_recipe(path).cache.store_ids
    assert not load_recipe(path, seq2seq).cache.store_ids
    assert load_recipe(path, [*seq2seq, "cache.store_ids=true"]).cache.store_ids
    for ids in ("true", "false"):
        with pytest.raises(RecipeError, match=r"no student here is an encoder-decoder; use uld"):
            load_recipe(path, ["teacher.kind=seq2seq", f"cache.store_ids={ids}"])


def test_drawn_ids_are_for_kl_alone(tmp_path):
    path = str(toys.tiny_recipe(tmp_path))
    sampled, kl = ["cache.selector=sampled"], "arms.distill={ce: 1.0, kl: 1.0}"
    assert load_recipe(path, [*sampled, kl]).cache.selector == "sampled"
    for arm, loss in (("{kl: 1.0, logit_mse: 0.5}", "logit_mse"), ("{uld: 1.0}", "uld")):
        with pytest.raises(RecipeError, match=rf"arms.distill: {loss} needs .* set cache.selector=topk"):
            load_recipe(path, [*sampled, f"arms.distill={arm}"])
    for temperatures, refused in (("[1.0, 2.0]", True), ("[2.0, 1.0]", False)):
        flatter = [*sampled, f"cache.temperatures={temperatures}", "arms.distill={kl: 1.0, temperature: 2.0}"]
        if refused:
            with pytest.raises(RecipeError, match=r"distill\.temperature is 2\.0, but ids are drawn at 1\.0"):
                load_recipe(path, flatter)
        else:
            assert load_recipe(path, flatter).arms["distill"].temperature == 2.0
    with pytest.raises(RecipeError, match=r"draws mean nothing without ids; set cache\.store_ids=true"):
        load_recipe(path, [*sampled, kl, "cache.store_ids=false"])
    with pytest.raises(RecipeError, match=r"teacher.engine is vllm, which serves cache.selector=topk only"):
        load_recipe(path, [*sampled, kl, "teacher.engine=vllm"])


def test_the_seed_of_the_draws_is_identity_where_there_are_any(tmp_path):
    path, kl = str(toys.tiny_recipe(tmp_path)), "arms.distill={kl: 1.0}"

    def fingerprint(*overrides):
        return Experiment(load_recipe(path, [kl, *overrides])).fingerprint

    assert fingerprint() == fingerprint("cache.sample_seed=3")
    drawn = [fingerprint("cache.selector=sampled", f"cache.sample_seed={seed}") for seed in (0, 3)]
    assert len({fingerprint(), *drawn}) == 3


def test_missing_sections_and_files(tmp_path):
    with pytest.raises(RecipeError, match=r"unknown recipe 'gsm8k-qwen'\. Did you mean 'gsm8k-qwen3'"):
        load_recipe("gsm8k-qwen")
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(str(tmp_path / "folder.yaml"))
    (tmp_path / "bare.yaml").write_text("name: bare\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="teacher: required, but not given"):
        load_recipe(str(tmp_path / "bare.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="expected a mapping"):
        load_recipe(str(tmp_path / "list.yaml"))


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\nname: b\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="'name' is given twice"):
        load_recipe(str(path))


def test_a_recipe_written_out_reads_back_the_same(tmp_path):
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path)))
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


def test_every_key_is_documented():
    undocumented = [key for key, _, _, meaning in describe_keys() if not meaning]
    assert not undocumented
    assert len(describe_keys()) > 50
    assert Recipe.model_config["extra"] == "forbid"
