"""A teacher whose layers lie in several places says the same as one in a single place.

Without several GPUs the places are memory and disk: accelerate brings layers and inputs together by the same hooks.
"""

import pytest
import torch
import toys
import transformers

from pipeline.models import ModelSource, load_causal_lm, load_seq2seq_lm
from pipeline.recipe import load_recipe
from stage1_teacher.teacher import CausalTeacher, Seq2SeqTeacher, TeacherInput, load_teacher

CPU = torch.device("cpu")
QWEN3 = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
T5 = (
    "shared",
    *(f"{s}.{m}" for s in ("encoder", "decoder") for m in ("embed_tokens", "block.0", "block.1", "final_layer_norm")),
    "lm_head",
)


def inputs(encoder=False):
    draw = torch.Generator().manual_seed(1)
    context = [] if encoder else torch.randint(4, 320, (20,), generator=draw).tolist()
    own = [torch.randint(4, 320, (n,), generator=draw).tolist() for n in (9, 5)]
    return context, [TeacherInput([*context, *ids], len(context) + 1, ids if encoder else ()) for ids in own]


def rows(teacher, context, batch):
    return torch.cat(list(teacher.answer_logits(batch, context)))


@pytest.mark.parametrize("on_disk", ["model.layers.1", "model.embed_tokens lm_head", "model.layers.0 model.norm"])
def test_a_spread_decoder_computes_the_same_rows(tmp_path, on_disk):
    source = ModelSource(str(toys.tiny_qwen3(tmp_path)), None)
    context, batch = inputs()
    plain = CausalTeacher(load_causal_lm(source, "float32", "none", CPU))
    places = {name: "disk" if name in on_disk.split() else "cpu" for name in QWEN3}
    spread = CausalTeacher(load_causal_lm(source, "float32", "none", CPU, places))
    assert any(parameter.is_meta for parameter in spread.model.parameters())
    for shared in (context, []):
        torch.testing.assert_close(rows(spread, shared, batch), rows(plain, shared, batch), rtol=0, atol=1e-6)
    assert spread.provenance == {"device_map": places} and plain.provenance == {}


@pytest.mark.parametrize("on_disk", ["encoder.block.1", "decoder.block.0"])
def test_a_spread_encoder_decoder_computes_the_same_rows(tmp_path, on_disk):
    source = ModelSource(str(toys.tiny_t5(tmp_path)), None)
    _, batch = inputs(encoder=True)
    plain = Seq2SeqTeacher(load_seq2seq_lm(source, "float32", "none", CPU))
    places = {name: "disk" if name == on_disk else "cpu" for name in T5}
    spread = Seq2SeqTeacher(load_seq2seq_lm(source, "float32", "none", CPU, places))
    torch.testing.assert_close(rows(spread, [], batch), rows(plain, [], batch), rtol=0, atol=1e-6)
    assert spread.provenance == {"device_map": places}


@pytest.mark.parametrize("device_map", [None, "auto", "balanced"])
def test_the_recipe_says_how_a_teacher_is_spread(tmp_path, monkeypatch, device_map):
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path, runtime={"device": "auto", "device_map": device_map})))
    real, asked = transformers.AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(*args, **options):
        asked.append(options.get("device_map"))
        return real(*args, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_teacher(recipe, lambda: pytest.fail("only an engine that reserves memory counts tokens"))
    assert asked == [device_map]
