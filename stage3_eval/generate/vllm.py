"""Generation by vLLM: one engine for all checkpoints of a student, adapters by LoRARequest. Called by `subject`.

Prompts go in as token ids and answers come out as token ids, so the prompt builder of training is the only tokenizer.
Runs in an environment that has vLLM: see stage3_eval/VLLM.md.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RunError
from pipeline.model_folder import check_adapter
from pipeline.vllm import import_vllm
from stage3_eval.generate import ADAPTER_FILE, Generated

if TYPE_CHECKING:
    from pipeline.models import ModelSource

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be


class VLLMEngine:
    """See `stage3_eval.generate.Engine`.

    dtype: of the weights; vLLM casts the adapter to it as well. rank: of the adapters. longest: tokens of the longest
    prompt with its answer. adapters: those that will be asked for.
    Raises RunError where vLLM is missing or the rank too large.
    """

    chunk = 512  # vLLM schedules them itself; progress is shown and saved between chunks

    def __init__(
        self,
        source: "ModelSource",
        dtype: str,
        rank: int,
        longest: int,
        adapters: Sequence[Path],
        device: str = "auto",
    ) -> None:
        vllm, on_cpu = import_vllm("eval.engine", "stage3_eval", device)
        if rank > _RANKS[-1]:
            raise RunError(f"lora.r is {rank}, but vLLM serves ranks up to {_RANKS[-1]}; --set eval.engine=hf")
        self._requests: dict[Path, Any] = {}
        self._vllm = vllm
        self.provenance: dict[str, Any] = {"engine": "vllm", "vllm": vllm.__version__}
        # Without names vLLM adapts the head too, and its CPU build then fails at the log-probabilities of prompts.
        targets = sorted({name for adapter in adapters for name in _targets(adapter)})
        lora = {"lora_target_modules": targets} if targets else {}
        self._llm: Any = vllm.LLM(
            model=source.location,
            revision=source.revision,
            dtype=dtype,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            generation_config="vllm",  # none of the model's own sampling defaults
            max_model_len=longest,
            enable_lora=bool(adapters),
            max_lora_rank=next(allowed for allowed in _RANKS if allowed >= rank),
            enforce_eager=on_cpu,
            disable_log_stats=True,
            logprobs_mode="raw_logprobs",
            **lora,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], adapter: Path | None, max_new_tokens: int, end_id: int
    ) -> list[Generated]:
        """See Engine. Raises RunError where vLLM ends an answer for another reason than its end or the limit."""
        sampling = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            stop_token_ids=[end_id],
            ignore_eos=True,  # the end of a turn is ours to say: eos_token may be another token
            detokenize=False,
        )
        return [_answer(output.outputs[0], end_id) for output in self._run(prompts, sampling, adapter)]

    def label_logprobs(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[Sequence[int]]], adapter: Path | None
    ) -> list[list[float]]:
        """See Engine. A label is read as the end of its prompt; the one token generated after it is thrown away."""
        sampling = self._vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        whole = [[*prompt, *label] for prompt, of in zip(prompts, labels, strict=True) for label in of]
        outputs = iter(self._run(whole, sampling, adapter))
        sums = []
        for prompt, of in zip(prompts, labels, strict=True):
            # Entry i of prompt_logprobs predicts token i.
            rows = [(next(outputs).prompt_logprobs[len(prompt) :], label) for label in of]
            sums.append([sum(row[i][token].logprob for i, token in enumerate(label)) for row, label in rows])
        return sums

    def close(self) -> None:
        """Stop the engine and free its memory."""
        import gc

        self._llm = None
        gc.collect()

    def _run(self, prompts: Sequence[Sequence[int]], sampling: Any, adapter: Path | None) -> list[Any]:
        outputs: list[Any] = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            sampling,
            lora_request=self._request(adapter),
            use_tqdm=False,
        )
        return outputs

    def _request(self, adapter: Path | None) -> Any:
        """The adapter's request; each folder has an id of its own, by which vLLM knows it again."""
        if adapter is None:
            return None
        _check_folder(adapter)
        if adapter not in self._requests:
            from vllm.lora.request import LoRARequest

            number = len(self._requests) + 1
            self._requests[adapter] = LoRARequest(f"adapter{number}", number, str(adapter.resolve()))
        return self._requests[adapter]


def _check_folder(adapter: Path) -> None:
    if not (adapter / ADAPTER_FILE).is_file():
        raise RunError(f"checkpoint {adapter}: expected a LoRA adapter, found no {ADAPTER_FILE}; train it again")


def _targets(adapter: Path) -> list[str]:
    """The last names of the modules that an adapter changes.

    vLLM fuses some of them (q_proj, k_proj and v_proj into qkv_proj) and finds the fused one by the last names alone:
    by peft's full names it would leave them out, without a word.
    """
    _check_folder(adapter)
    names = check_adapter(adapter)["target_modules"]
    return [name.rpartition(".")[2] for name in names] if isinstance(names, list) else []


def _answer(completion: Any, end_id: int) -> Generated:
    ids = list(completion.token_ids)
    if completion.finish_reason not in ("stop", "length"):
        raise RunError(f"vLLM ended an answer after {len(ids)} tokens: {completion.finish_reason}; nothing is scored")
    finished = completion.finish_reason == "stop"
    return Generated(ids if not finished or ids[-1:] == [end_id] else [*ids, end_id], finished)
