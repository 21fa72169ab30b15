"""A decoder run by vLLM, for teachers that need several GPUs: raw logits through `prompt_logprobs`.

vLLM reads a sequence without its last token, as transformers does here: the entry of each further token in
`prompt_logprobs` is the row that predicts it, and the row that predicts the last token is the one vLLM samples from.
`vllm_worker` puts the exact normalisers into the same entries. stage1_teacher/ENGINES.md says when to choose it.

Shape suffixes: N answer rows, V vocabulary, K ranks, C columns.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ModelError, first_line
from pipeline.models import load_config, locate, window_of
from pipeline.recipe import Recipe
from pipeline.vllm import import_vllm
from stage1_teacher.teacher import TeacherInput
from stage1_teacher.topk import TopK
from stage1_teacher.vllm_worker import columns, unpack

_MAX_SEQUENCES = 128  # in one step: of each, one row of logits to sample from
_STEP_LOGITS = 2**28  # the most logits of a step, 1 GiB of float32: vLLM computes a sequence's rows all at once
_MEMORY_SHARE = 0.85  # of a GPU for weights and KV cache; such logits and their sums need the rest
_KNOWN_ROW_TOLERANCE = 1e-3  # logits and log-probabilities are a logsumexp apart, the same tensor is 0 apart


class VLLMTeacher:
    """See `teacher.Teacher`. longest: tokens of the longest sequence it will be given.

    The context that all sequences share is found in vLLM's prefix cache. vLLM leaves that unread wherever
    `prompt_logprobs` are asked for, since what is found there has no entries; here it is read all the same, as nobody
    wants the context's entries, and a sequence of which more than the context was found is read again as a whole.
    Raises RunError where vLLM is missing, ModelError for a model it cannot run or whose rows are not raw logits.
    """

    def __init__(self, recipe: Recipe, longest: int) -> None:
        vllm, on_cpu = import_vllm("teacher.engine", "stage1_teacher", recipe.runtime.device)
        if not vllm.__version__.startswith("0.32."):
            raise ModelError(
                f"teacher.engine is vllm, but vLLM {vllm.__version__} is installed here; expected 0.32, whose workers "
                "this project knows how to ask: pip install 'logitbank[vllm]', or --set teacher.engine=hf"
            )
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # reduces rows elsewhere than in the sampler
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # a full window and the one token that must be sampled
        source = locate(recipe.teacher.model, recipe.teacher.revision)
        config = load_config(source)
        cache = recipe.cache
        self.vocab_size, self.window = int(config.vocab_size), window_of(config)
        self._k, self._temperatures = cache.top_k, tuple(cache.temperatures)
        self._columns = columns(self._k, len(self._temperatures), self.vocab_size)
        self._vllm, self._read, self._found = vllm, 0, 0
        readable = min(longest - 1, self.window or longest)  # the last token is only predicted
        step_tokens = min(recipe.runtime.batch_tokens, _STEP_LOGITS // self.vocab_size)
        try:
            self._llm: Any = vllm.LLM(
                model=source.location,
                revision=source.revision,
                dtype=recipe.teacher.dtype,
                tensor_parallel_size=recipe.runtime.tensor_parallel,
                max_model_len=readable + 1,
                max_num_batched_tokens=max(step_tokens, _MAX_SEQUENCES),
                max_num_seqs=_MAX_SEQUENCES,
                max_logprobs=self._columns,
                logprobs_mode="raw_logits",
                hf_overrides={"head_dtype": "float32"},
                worker_extension_cls="stage1_teacher.vllm_worker.TopKWorker",
                skip_tokenizer_init=True,
                trust_remote_code=False,
                load_format="safetensors",
                generation_config="vllm",
                enforce_eager=True,  # graphs are for decoding; nothing here is decoded
                disable_log_stats=True,
                **({} if on_cpu else {"gpu_memory_utilization": _MEMORY_SHARE}),
            )
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise ModelError(
                f"model {source.location}: vLLM {vllm.__version__} cannot run it: {first_line(error)}; give it more "
                "GPUs by --set runtime.tensor_parallel=N, or take transformers: --set teacher.engine=hf"
            ) from None
        self._llm.collective_rpc("send_top_k", args=(self._k, list(self._temperatures)))
        self._check_known_row(readable)
        self._probe = self._probe_prefix_cache(readable, recipe.runtime.tensor_parallel)

    @property
    def provenance(self) -> dict[str, Any]:
        """For commit records; the tokens are those that this process has read so far."""
        return {"vllm": self._probe | {"tokens_read": self._read, "tokens_from_prefix_cache": self._found}}

    def top_k(
        self, batch: Sequence[TeacherInput], context_ids: Sequence[int], k: int, temperatures: Sequence[float]
    ) -> Iterator[TopK]:
        """See Teacher. k and temperatures are the recipe's, which the workers know."""
        assert (k, tuple(temperatures)) == (self._k, self._temperatures), "the workers were told otherwise"
        outputs = self._generate(batch, whole=not context_ids)
        found_too_much = [i for i, item in enumerate(batch) if outputs[i].num_cached_tokens > item.first_row]
        if found_too_much:
            again = self._generate([batch[i] for i in found_too_much], whole=True)
            for i, output in zip(found_too_much, again, strict=True):
                outputs[i] = output
        for item, output in zip(batch, outputs, strict=True):
            yield self._rows(item, output)

    def _generate(self, batch: Sequence[TeacherInput], whole: bool) -> list[Any]:
        """One output a sequence, with its wanted rows; those of what the prefix cache had are undefined.

        whole: leave the prefix cache unread, so that there are none of these.
        """
        sampling = [
            self._vllm.SamplingParams(
                temperature=0.0,
                max_tokens=1,  # vLLM must sample one; it is thrown away
                prompt_logprobs=self._columns,
                logprobs=self._columns,
                flat_logprobs=True,
                detokenize=False,
                skip_reading_prefix_cache=whole,
                extra_args={"first_row": item.first_row},
            )
            for item in batch
        ]
        prompts = [{"prompt_token_ids": item.input_ids[:-1]} for item in batch]
        outputs: list[Any] = self._llm.generate(prompts, sampling, use_tqdm=False)
        self._read += sum(len(item.input_ids) - 1 for item in batch)
        self._found += sum(output.num_cached_tokens for output in outputs)
        return outputs

    def _rows(self, item: TeacherInput, output: Any) -> TopK:
        """The wanted rows of one sequence. Raises ModelError where they do not predict its tokens."""
        sampled = output.outputs[0]
        ids_NC, values_NC = entries(output.prompt_logprobs, sampled.logprobs, 1 + self._columns)
        kept = unpack(ids_NC, values_NC, self._k, len(self._temperatures), self.vocab_size)
        predicted = [*item.input_ids[item.first_row + 1 : -1], sampled.token_ids[0]]
        if kept is None or ids_NC[:, 0].tolist() != predicted:
            raise ModelError(
                f"vLLM {self._vllm.__version__}: its prompt_logprobs are not the {len(predicted)} rows with "
                "normalisers that its workers were told to send; this project knows how to tell them in vLLM 0.32: "
                "pip install 'logitbank[vllm]', or take transformers: --set teacher.engine=hf"
            )
        return kept

    def _check_known_row(self, readable: int) -> None:
        """Raise ModelError unless what arrives is, to the bit or nearly, what the model's own head computed in float32.

        Before July 2026 vLLM answered `prompt_logprobs` with log-probabilities whatever it was asked for. They differ
        from logits by each row's logsumexp.
        """
        ids = [i % self.vocab_size for i in range(1, min(8, readable) + 2)]
        self._llm.collective_rpc("watch_head")
        (kept,) = self.top_k([TeacherInput(ids, 0)], [], self._k, self._temperatures)
        assert kept.token_ids_NK is not None
        dtype, values = self._llm.collective_rpc("head_logits", args=(kept.token_ids_NK.tolist(),))[0]
        off_NK = torch.tensor(values) - kept.logits_NK
        worst = off_NK.abs().max().item()
        if dtype != "float32":
            raise ModelError(
                f"vLLM {self._vllm.__version__} ran the output head in {dtype}; expected float32, without which logits "
                "near 20 are only good to 0.06. --set teacher.engine=hf"
            )
        if not worst <= _KNOWN_ROW_TOLERANCE:
            shifted = (off_NK - off_NK[:, :1]).abs().max().item() <= _KNOWN_ROW_TOLERANCE
            what = (
                "log-probabilities, not the raw logits asked for" if shifted else "not the output of the model's head"
            )
            raise ModelError(
                f"vLLM {self._vllm.__version__} sends {what}: on a known row of tokens the two differ by up to "
                f"{worst:.3g}. Use vLLM 0.32 (pip install 'logitbank[vllm]') or --set teacher.engine=hf"
            )

    def _probe_prefix_cache(self, readable: int, tensor_parallel: int) -> dict[str, Any]:
        """Read one prompt twice, say what was computed again, and return it with the engine's version."""
        block = int(self._llm.llm_engine.vllm_config.cache_config.block_size)
        prompt = [i % self.vocab_size for i in range(2, 2 + min(2 * block + 1, readable))]
        again = TeacherInput([*prompt, 0], 0)
        found = [self._generate([again], whole)[0].num_cached_tokens for whole in (False, True, False)]
        self._read = self._found = 0
        print(
            f"vLLM {self._vllm.__version__}: of a prompt of {len(prompt)} tokens that it had read before, "
            f"{len(prompt) - found[2]} were computed again, {found[2]} came from its prefix cache (blocks of {block}); "
            f"of a prompt whose rows are all wanted, {len(prompt) - found[1]}",
            flush=True,
        )
        return {
            "version": self._vllm.__version__,
            "tensor_parallel": tensor_parallel,
            "probe": {"prompt_tokens": len(prompt), "from_prefix_cache": found[2], "block_tokens": block},
        }


def entries(prompt: Any, sampled: Any, width: int) -> tuple[Tensor, Tensor]:
    """(ids, values) [entries, width] of two of vLLM's FlatLogprobs, those of a prompt and that of the token after it.

    The prompt's first position, which nothing predicts, has none. Entries of another width give no rows.
    """
    ids, values = [*prompt.token_ids, *sampled.token_ids], [*prompt.logprobs, *sampled.logprobs]
    spans = [(*flat.start_indices, len(flat.token_ids)) for flat in (prompt, sampled)]
    if {end - begin for span in spans for begin, end in pairwise(span)} - {0, width}:
        ids, values = [], []
    return torch.tensor(ids, dtype=torch.long).view(-1, width), torch.tensor(values).view(-1, width)
