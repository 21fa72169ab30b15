"""BERTScore on tiny random encoders: against the formula written out here, and against the package's own call."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from pipeline.errors import RunError
from pipeline.sections import Metrics
from pipeline.tasks import Example
from stage3_eval.metrics import check_available, describe, metric_module
from stage3_eval.predictions import Prediction

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "a", "the", "cat", "dog", "sat", "ran", "on", "mat", "far"]
TEXTS = ["a cat sat", "the dog ran far", "the cat sat on the mat", "a dog", "ran"]
GOLDS = [("the cat sat on a mat",), ("a dog ran",), ("a dog ran", "the cat sat on the mat"), ("a cat",), ("sat",)]
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def save_encoder(folder: Path, kind: str, **tokenizer_options) -> Path:
    """A random encoder of three layers with a word tokenizer, as `save_pretrained` writes them."""
    torch.manual_seed(3)
    options = {"vocab_size": len(WORDS), "max_position_embeddings": 24, **SIZES}
    model = (
        RobertaModel(RobertaConfig(pad_token_id=1, **options))
        if kind == "roberta"
        else BertModel(BertConfig(**options))
    )
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names, **tokenizer_options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoders") / "bert-t5-like", "bert", model_max_length=24)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoders") / "roberta", "roberta")


def settings_of(folder, layer=2):
    return Metrics(bert_score_model=str(folder), bert_score_layer=layer)


def measure(settings, texts=TEXTS, golds=GOLDS):
    of = [Example(f"e{i}", "toy", "?", gold[0], references=gold) for i, gold in enumerate(golds)]
    answers = [Prediction(f"e{i}", "toy", "", text, 3, True) for i, text in enumerate(texts)]
    return metric_module("bert_score").measure("bert_score", of, answers, settings)


def by_hand(folder, layer, text, gold):
    """Equations 1 to 3 of the paper: every word takes its most similar one; cosine of hidden states of the layer."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    vectors = []
    for words in (text, gold):
        with torch.no_grad():
            states_LH = model(**tokenizer(words, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][
                0
            ]
        vectors.append(torch.nn.functional.normalize(states_LH, dim=-1))
    similar = vectors[0] @ vectors[1].T
    # the marks at the ends take part in the matching, but have no weight of their own
    precision, recall = similar.max(1).values[1:-1].mean(), similar.max(0).values[1:-1].mean()
    return float(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_f1_is_the_papers(encoder, layer):
    found = measure(settings_of(encoder, layer)).values
    for value, text, golds in zip(found, TEXTS, GOLDS, strict=True):
        assert value == pytest.approx(max(by_hand(encoder, layer, text, gold) for gold in golds), abs=1e-5)
    assert found[2] == pytest.approx(1)  # the best of two golds is the text itself
    assert len(set(found)) == len(found)


def test_f1_is_the_packages(tmp_path):
    """Its own call, where it works: its loader takes this folder for a BERT's, its tokenizer has a window."""
    import bert_score

    folder = save_encoder(tmp_path / "encoder", "bert", model_max_length=22)
    f1 = bert_score.score(TEXTS, [list(of) for of in GOLDS], model_type=str(folder), num_layers=2)[2]
    assert measure(settings_of(folder)).values == pytest.approx(f1.tolist(), abs=1e-6)


def test_a_roberta_without_a_window_in_its_tokenizer(roberta):
    """The package would ask its tokenizer for 10**30 tokens; and positions start at two."""
    found = measure(settings_of(roberta), [*TEXTS[:2], "the cat " * 40], [*GOLDS[:2], ("the cat " * 40,)]).values
    for value, text, golds in zip(found[:2], TEXTS, GOLDS, strict=False):
        assert value == pytest.approx(by_hand(roberta, 2, text, golds[0]), abs=1e-5)
    assert found[2] == pytest.approx(1)


def test_a_space_stands_before_robertas_first_word(tmp_path):
    """As in the package's published scores; transformers 5 ignores the argument by which the package asks for it."""
    from transformers import RobertaTokenizer

    folder = save_encoder(tmp_path / "encoder", "roberta")
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b", "Ġ", "Ġa", "Ġb"])}
    RobertaTokenizer(vocab=vocabulary, merges=[("Ġ", "a"), ("Ġ", "b")]).save_pretrained(folder)
    bare = AutoTokenizer.from_pretrained(folder)
    assert isinstance(bare, RobertaTokenizer)
    assert bare.encode("a b", add_prefix_space=True) == [0, 4, 8, 2]
    _, tokenizer = metric_module("bert_score")._encoder(settings_of(folder))
    assert tokenizer.encode("a b") == [0, 7, 8, 2]


def test_an_empty_answer_scores_nothing(encoder, capfd):
    found = measure(settings_of(encoder), ["", " \n", "a cat"], [("a cat",), ("a",), ("a cat",)])
    assert found.values == (0.0, 0.0, pytest.approx(1))
    assert found.unparsable == 2
    printed = capfd.readouterr()
    assert printed.err == "" and all(line.startswith("BERTScore: ") for line in printed.out.splitlines())


def test_what_was_not_asked_is_not_unparsable(encoder):
    example = Example("e0", "toy", "?", "a cat")
    found = metric_module("bert_score").measure(
        "bert_score", [example], [Prediction.unanswered(example, "")], settings_of(encoder)
    )
    assert (found.values, found.unparsable) == ((0.0,), 0)


def test_values_do_not_depend_on_order_or_company(encoder):
    """Batches are sorted, and what was scored is not scored again: subsets have the very numbers of the whole."""
    module = metric_module("bert_score")
    settings = settings_of(encoder, 3)
    module._known.clear()
    whole = measure(settings).values
    assert measure(settings, TEXTS[::-1], GOLDS[::-1]).values == whole[::-1]
    assert measure(settings, TEXTS[:2], GOLDS[:2]).values == whole[:2]
    module._known.clear()
    assert measure(settings, TEXTS[::-1], GOLDS[::-1]).values == whole[::-1]


def test_the_results_say_which_encoder(encoder):
    found = describe(settings_of(encoder), ["bert_score"])["bert_score"]
    assert found["weights"].startswith("sha256:")
    assert (found["layer"], found["rescaled"], found["idf"]) == (2, False, False)
    assert set(found) >= {"bert-score", "transformers", "model"}


def test_what_cannot_serve_is_refused_before_anything_is_generated(encoder, tmp_path):
    check_available(["bert_score"], settings_of(encoder))
    with pytest.raises(RunError, match=r"bert_score_layer=17: .* has 3 layers; name one of them"):
        check_available(["bert_score"], settings_of(encoder, 17))
    with pytest.raises(RunError, match=r"no such folder.*set eval\.metrics\.bert_score_model=<folder>"):
        check_available(["bert_score"], settings_of("./nowhere"))
    with pytest.raises(RunError, match=r"no encoder's config\.json"):
        check_available(["bert_score"], settings_of(tmp_path))
    for content in ("[]", '{"num_hidden_layers": null}', "{"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(RunError, match=r"no encoder's config\.json"):
            check_available(["bert_score"], settings_of(tmp_path))
    pickled = save_encoder(tmp_path / "pickled", "bert")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(RunError, match="expected weights as safetensors, found none"):
        check_available(["bert_score"], settings_of(pickled))
    with pytest.raises(RunError, match="safetensors"):
        measure(settings_of(pickled))


def test_weights_that_lack_a_layer_are_refused(tmp_path):
    """transformers would fill it with random numbers, and score."""
    from safetensors.torch import load_file, save_file

    folder = save_encoder(tmp_path / "encoder", "bert")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"no weights for encoder\.layer\.1\..* of an encoder with 2 layers"):
        measure(settings_of(folder))
