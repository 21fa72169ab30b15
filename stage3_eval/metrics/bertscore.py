"""BERTScore (Zhang et al. 2020, arXiv 1904.09675): F1 of words matched by their vectors in an encoder's hidden layer.

Vectors and matching are the package bert-score's. Loading is ours: safetensors, one commit, the layers up to the
compared one. (The package's own loader takes pickles, takes any path with "t5" in it for a T5, and leaves the space
out that RoBERTa's tokenizer wants before the first word, since transformers 5 ignores the argument it passes.) No idf
weights and no rescaling with a baseline: raw F1 of roberta-large lies between .8 and 1 whatever is compared, and a
value outside [0, 1] is moved to its edge. Of several references the best counts; an empty answer has 0.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError, RunError
from pipeline.progress import progress
from pipeline.sections import Metrics
from pipeline.tasks import Example
from stage3_eval.compare import Measured
from stage3_eval.predictions import Prediction

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

LIBRARIES = {"bert-score": "bert_score"}
_PINNED = {"FacebookAI/roberta-large": "722cf37b1afa9454edce342e7895e588b6ff1d59"}  # main since February 2024
_BATCH = 64
_ELSE = "set eval.metrics.bert_score_model=<folder> (and bert_score_layer to match)"
_known: dict[tuple[str, str | None, int, str, str], float] = {}  # checkpoints are scored on subsets too: never twice


def check(settings: Metrics) -> None:
    """Raise RunError where the encoder is not there, or has fewer layers than the one to compare."""
    folder = Path(settings.bert_score_model).expanduser()
    if not folder.is_dir():
        _locate(settings)
        return
    try:
        layers = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"eval.metrics.bert_score_model={folder}: no encoder's config.json: {error}; {_ELSE}") from None
    if not any(folder.glob("*.safetensors")):
        raise RunError(f"eval.metrics.bert_score_model={folder}: expected weights as safetensors, found none; {_ELSE}")
    if layers < settings.bert_score_layer:
        raise RunError(
            f"eval.metrics.bert_score_layer={settings.bert_score_layer}: {folder} has {layers} layers; name one of them"
        )


def measure(name: str, examples: Sequence[Example], answers: Sequence[Prediction], settings: Metrics) -> Measured:
    """F1 of each answer against its best gold; all new texts of a condition are embedded together."""
    encoder = (settings.bert_score_model, settings.bert_score_revision, settings.bert_score_layer)
    texts = [answer.prediction.strip() for answer in answers]
    golds = [[gold.strip() for gold in example.golds] for example in examples]
    pairs = {(text, gold): None for text, of in zip(texts, golds, strict=True) for gold in of if text and gold}
    new = [pair for pair in pairs if (*encoder, *pair) not in _known]
    for pair, f1 in zip(new, _f1(new, settings) if new else [], strict=True):
        _known[*encoder, *pair] = f1
    values = [
        max(_known.get((*encoder, text, gold), 0.0) for gold in of) for text, of in zip(texts, golds, strict=True)
    ]
    empty = sum(not text and not answer.too_long for text, answer in zip(texts, answers, strict=True))
    return Measured(tuple(values), unparsable=empty)


def describe(name: str, settings: Metrics) -> dict[str, Any]:
    """The encoder at its commit (or its folder's hash), the layer, and what was left out."""
    from importlib.metadata import version

    return {
        "score": "F1, best over references",
        "model": settings.bert_score_model,
        "weights": _locate(settings).identity(),
        "layer": settings.bert_score_layer,
        "idf": False,
        "rescaled": False,
        "transformers": version("transformers"),
    }


def _f1(pairs: Sequence[tuple[str, str]], settings: Metrics) -> list[float]:
    """F1 of (answer, gold) pairs, none of them blank.

    The package's own loop batches a set in hash order, so its last digits change from run to run: here the batches
    are sorted, and each pair is matched alone.
    """
    import torch
    from bert_score.utils import get_bert_embedding, greedy_cos_idf

    model, tokenizer = _encoder(settings)
    weights: dict[int, float] = defaultdict(lambda: 1.0, {tokenizer.cls_token_id: 0.0, tokenizer.sep_token_id: 0.0})
    texts = sorted({text for pair in pairs for text in pair}, key=lambda text: (len(text), text))
    embedded: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    with progress("BERTScore", len(texts), "texts") as bar:
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            vectors_BLH, mask_BL, weights_BL = get_bert_embedding(batch, model, tokenizer, weights, device=model.device)
            for i, text in enumerate(batch):
                n = int(mask_BL[i].sum())
                embedded[text] = (vectors_BLH[i, :n].cpu(), mask_BL[i, :n].cpu(), weights_BL[i, :n])
            bar.advance(len(batch))

    def one(text: str) -> list["Tensor"]:
        return [part.clone()[None] for part in embedded[text]]  # matching normalises them in place

    with torch.no_grad():
        found = [float(greedy_cos_idf(*one(gold), *one(answer))[2]) for answer, gold in pairs]
    return [min(1.0, max(0.0, f1)) for f1 in found]


def _locate(settings: Metrics) -> Any:
    from pipeline.models import locate

    model = settings.bert_score_model
    try:
        return locate(model, settings.bert_score_revision or _PINNED.get(model))
    except ModelError as error:
        raise RunError(f"eval.metrics.bert_score_model: {error}; {_ELSE}") from None


def _encoder(settings: Metrics) -> tuple[Any, Any]:
    """The encoder cut off after the compared layer, and its tokenizer; on the GPU where there is one."""
    return _load(_locate(settings), settings.bert_score_layer)


@lru_cache(maxsize=1)
def _load(source: Any, layer: int) -> tuple[Any, Any]:
    """Raises RunError where the weights are no encoder's, or lack the layer."""
    import torch
    from transformers import AutoModel, AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

    from pipeline.models import load_tokenizer

    options = {"revision": source.revision, "trust_remote_code": False}
    tokenizer = load_tokenizer(source)
    if isinstance(tokenizer, GPT2Tokenizer | RobertaTokenizer):
        tokenizer = AutoTokenizer.from_pretrained(source.location, add_prefix_space=True, **options)
    try:
        with _no_load_report():
            model, report = AutoModel.from_pretrained(
                source.location,
                num_hidden_layers=layer,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"eval.metrics.bert_score_model={source.location}: {first}; {_ELSE}") from None
    if tokenizer.pad_token_id is None:
        raise RunError(
            f"eval.metrics.bert_score_model={source.location}: its tokenizer has no pad_token, which an encoder that "
            f"reads texts in batches needs; {_ELSE}"
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))  # made of the last layer
    if missing:
        raise RunError(
            f"eval.metrics.bert_score_model={source.location}: no weights for {missing[0]} and {len(missing) - 1} more "
            f"of an encoder with {layer} layers; {_ELSE}"
        )
    window = model.config.max_position_embeddings - 2  # RoBERTa keeps two positions to itself
    tokenizer.model_max_length = min(tokenizer.model_max_length, window)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


@contextmanager
def _no_load_report() -> "Iterator[None]":
    """The layers left out are meant to be: transformers need not list them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
