"""The engines that answer prompts, behind one small protocol. Called by `answers`, chosen by `subject`.

`hf` runs decoders on transformers, `seq2seq` encoder-decoders, `vllm` decoders on vLLM.
Greedy always: a prediction is a function of the prompt and the weights. One base model serves every checkpoint of a
student: LoRA adapters are swapped, the base is loaded once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

ADAPTER_FILE = "adapter_model.safetensors"


class Generated(NamedTuple):
    """One answer: its token ids, and whether it ended by the end token (then its last id) or was cut at the limit."""

    ids: list[int]
    finished: bool


class Engine(Protocol):
    """What answers prompts.

    chunk: how many prompts are worth handing over at once. provenance: what a prediction file says wrote it.
    """

    chunk: int
    provenance: dict[str, Any]

    def generate(
        self, prompts: Sequence[Sequence[int]], adapter: Path | None, max_new_tokens: int, end_id: int
    ) -> list[Generated]:
        """Greedy answers in the order of the prompts, by the base model (adapter None) or with a LoRA adapter."""
        ...

    def label_logprobs(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[Sequence[int]]], adapter: Path | None
    ) -> list[list[float]]:
        """How likely each of a prompt's labels is as its whole answer, in nats.

        labels: for each prompt, the token ids of its labels, end-of-sequence included. The log-probabilities of a
        label's tokens are summed, that of the end too: so a label that another one begins with is not favoured, and
        labels of different lengths compare as answers that could have been generated. Nothing is normalised by length.
        """
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...
