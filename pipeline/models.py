"""Models and tokenizers: found, loaded, and taken apart into body and head. The stages' only way to a model.

Weights are read from safetensors only, and no code comes with them (`trust_remote_code` stays off).
"""

import hashlib
import inspect
import json
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError, first_line
from pipeline.model_folder import check_model
from pipeline.progress import waiting
from pipeline.recipe import Recipe

EMBEDDED_DIR = Path(__file__).parent / "pocket" / "weights"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies: a folder, or a Hub name at one commit."""

    location: str
    revision: str | None

    @property
    def is_folder(self) -> bool:
        return self.revision is None

    def identity(self) -> str:
        """What a fingerprint hashes: the Hub name and commit, or the content of a folder's weights and config."""
        if not self.is_folder:
            return f"{self.location}@{self.revision}"
        digest = hashlib.sha256()
        for path in sorted([*Path(self.location).glob("*.safetensors"), Path(self.location) / "config.json"]):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return f"sha256:{digest.hexdigest()}"


def locate(model: str, revision: str | None = None) -> ModelSource:
    """Find a model by recipe name: `embedded:<name>`, a folder, or a Hub name (pinned to a commit).

    Raises ModelError for a folder without config.json, a file, or a Hub name that cannot be resolved.
    """
    if model.startswith("embedded:"):
        folder = EMBEDDED_DIR / model.removeprefix("embedded:")
        if not folder.is_dir():
            known = ", ".join(f"embedded:{p.name}" for p in sorted(EMBEDDED_DIR.glob("*/")))
            raise ModelError(f"model {model}: there is no such embedded model; there are: {known}")
        return ModelSource(str(folder), None)
    path = Path(model).expanduser()
    if path.exists():
        if not path.is_dir():
            raise ModelError(f"model {model}: expected a folder written by save_pretrained, found a file")
        check_model(path)
        return ModelSource(str(path), None)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(f"model {model}: no such folder, and not a Hub name (owner/name)")
    return ModelSource(model, _hub_commit(model, revision))


def _hub_commit(model: str, revision: str | None) -> str:
    """The commit a Hub name stands for, from the Hub or, without a network, from its local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # its retries; the error says it all
    try:
        path = hf_hub_download(model, "config.json", revision=revision)
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        raise ModelError(
            f"model {model}: neither the Hub nor its local cache answers: {first_line(error).rstrip('.')}. "
            "Without a network, give a folder written by save_pretrained instead, as in --set teacher.model=<folder>"
        ) from None
    return Path(path).parent.name


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer that comes with a model. Raises ModelError where there is none that can be read."""
    from transformers import AutoTokenizer

    if source.is_folder and not any((Path(source.location) / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make up an empty one of the model's family, without a word
        raise ModelError(
            f"model {source.location}: it has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); "
            "save the model's own one beside its weights"
        )
    try:
        return AutoTokenizer.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of a file that anyone may have written
        raise ModelError(f"model {source.location}: its tokenizer cannot be loaded: {first_line(error)}") from None


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what turns text into ids: the fast-tokenizer description, but for truncation and padding.

    Those two are a state that calls leave behind (and that a save keeps), never what we ask of a tokenizer.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["truncation"] = described["padding"] = None
    return hashlib.sha256(json.dumps(described, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def vocabulary(tokenizer: Any, size: int) -> list[str | None]:
    """id -> the text of that token alone, for people; `size` long, None for ids that no token has."""
    texts: list[str | None] = [None] * size
    for token_id in tokenizer.get_vocab().values():
        if token_id < size:
            texts[token_id] = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    return texts


def device_of(recipe: Recipe) -> torch.device:
    """The device the recipe asks for; `auto` takes a GPU where there is one, that of LOCAL_RANK under torchrun."""
    wanted = recipe.runtime.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("runtime.device is cuda, but torch sees no GPU here; set runtime.device=cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def load_config(source: ModelSource) -> Any:
    """A model's config, before any weight is read. Raises ModelError where it cannot be."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    except Exception as error:  # as above
        raise ModelError(f"model {source.location}: its config.json cannot be read: {first_line(error)}") from None


DeviceMap = str | dict[str, str | int] | None


def load_causal_lm(
    source: ModelSource, dtype: str, quantization: str, device: torch.device, device_map: DeviceMap = None
) -> Any:
    """A decoder in evaluation mode, weights frozen. quantization nf4: 4-bit, double quantisation, compute in `dtype`.

    device_map: None puts all of it on `device`; else accelerate's way of spreading it (`auto`, ...) or each module's
    place by name, and `device` is not looked at.
    Raises ModelError where the folder is no causal model or has no safetensors.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, "a causal model", source, dtype, quantization, device, device_map)


def load_seq2seq_lm(
    source: ModelSource, dtype: str, quantization: str, device: torch.device, device_map: DeviceMap = None
) -> Any:
    """An encoder-decoder, otherwise as `load_causal_lm`.

    What stays out of nf4 stays in `dtype`: embeddings, head, norms and, by T5's own rule, the feed-forward's `wo`.
    (transformers keeps `wo` in float32 under float16 only, in which the larger T5s overflow all the same.)
    """
    from transformers import AutoModelForSeq2SeqLM

    return _load(AutoModelForSeq2SeqLM, "an encoder-decoder", source, dtype, quantization, device, device_map)


def _load(
    auto_class: Any,
    what: str,
    source: ModelSource,
    dtype: str,
    quantization: str,
    device: torch.device,
    device_map: DeviceMap,
) -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # wants a package that calls the Hub
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=DTYPES[dtype],
            bnb_4bit_use_double_quant=True,
        )
        device_map = device_map or {"": str(device)}
    if device_map:
        options["device_map"] = device_map
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its doubts about ties; what matters of its report is an error below
    try:
        with waiting(f"loading {source.location}"):
            model, report = auto_class.from_pretrained(
                source.location,
                revision=source.revision,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # as above
        raise ModelError(f"model {source.location}: it cannot be loaded as {what}: {first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    if lacking := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {source.location}: its files have no weights for {lacking[0]} and {len(lacking) - 1} more, which "
            f"{what} needs and would draw at random; use the whole model"
        )
    if not device_map:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def input_device(model: Any) -> torch.device:
    """Where the model's inputs belong. accelerate brings them to layers that lie elsewhere."""
    spread: Any = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return next(model.parameters()).device if spread is None else torch.device(spread)


def placement(model: Any) -> dict[str, Any]:
    """Which module lies where, for records; empty for a model on one device."""
    places = {name: str(place) for name, place in getattr(model, "hf_device_map", {}).items()}
    return {"device_map": places} if len(set(places.values())) > 1 else {}


def window_of(config: Any) -> int | None:
    """The most tokens a model can read, None where its config names no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def body_and_head(model: Any) -> tuple[nn.Module, nn.Module]:
    """A causal model as its body (ids -> hidden states) and its output head (hidden states -> logits).

    Works through peft too: the body is the one that holds the adapter. Hidden states are gathered at the rows that
    are needed before the head runs, which is most of what makes a large vocabulary affordable.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.base_model, causal.get_output_embeddings()


def kv_cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """A KV cache as the keyword argument by which this model's forward takes it, as it is or under an adapter.

    transformers 5.24 renamed `past_key_values` to `cache` and warns of the old name.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values": cache}


def check_head(model: Any) -> None:
    """Raise ModelError unless head(body(x)) is what the model itself computes (some families scale in between)."""
    body, head = body_and_head(model)
    ids = _probe_ids(model)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        parts = head(body(input_ids=ids, use_cache=False).last_hidden_state)
    _same_logits(model, whole, parts)


def check_seq2seq_head(model: Any) -> None:
    """`check_head` for an encoder-decoder: head(scale * decoder(y, encoder(x))), the scale of `head_scale`."""
    ids = _probe_ids(model)
    with torch.no_grad():
        whole = model(input_ids=ids, decoder_input_ids=ids.flip(1), use_cache=False).logits
        read = model.get_encoder()(input_ids=ids).last_hidden_state
        hidden = model.get_decoder()(input_ids=ids.flip(1), encoder_hidden_states=read, use_cache=False)
        parts = model.get_output_embeddings()(hidden.last_hidden_state * head_scale(model))
    _same_logits(model, whole, parts)


def _probe_ids(model: Any) -> Tensor:
    return torch.arange(1, 9, device=input_device(model))[None] % int(model.config.vocab_size)


def _same_logits(model: Any, whole: Tensor, parts: Tensor) -> None:
    whole, parts = whole.float().cpu(), parts.float().cpu()  # the layers may lie on several devices
    if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-3):
        worst = (whole - parts).abs().max().item()
        raise ModelError(
            f"model {model.config.name_or_path} ({model.config.model_type}): its logits are not its head's output "
            f"(they differ by up to {worst:.3g}); this family rescales or caps logits and cannot be taken apart"
        )


def head_scale(model: Any) -> float:
    """What hidden states are multiplied with before the head: d_model ** -0.5 in the first T5, 1 in T5 1.1 and FLAN.

    transformers tells them apart by the config's tie_word_embeddings, which it keeps as scale_decoder_outputs.
    """
    config = model.config
    return float(config.d_model) ** -0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0


def float32_head(model: Any) -> Callable[[Tensor], Tensor]:
    """The output head in float32, hidden_NH of any dtype -> logits_NV float32.

    bfloat16 logits near 20 are only good to 0.06; the answer rows are few, so their head is exact instead.
    """
    from accelerate.utils import align_module_device

    head: Any = body_and_head(model)[1]
    with align_module_device(head):  # read in, if it lies in no memory
        weight_VH = head.weight.detach().float()
        bias_V = head.bias.detach().float() if getattr(head, "bias", None) is not None else None
    scale = head_scale(model)

    def logits(hidden_NH: Tensor) -> Tensor:
        return nn.functional.linear(hidden_NH.to(weight_VH.device, torch.float32) * scale, weight_VH, bias_V)

    return logits


def provenance() -> dict[str, str]:
    """The software and the machine, for records; never hashed."""
    import transformers

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    return {
        "host": platform.node(),
        "device": device,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
