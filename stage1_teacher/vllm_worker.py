"""What runs inside vLLM's workers: the top K of every row with its exact normalisers, sent as `prompt_logprobs`.

vLLM sends the largest scores of a row but not what the others sum to, and full logits cannot cross its processes. So
the function by which its sampler reduces a row is replaced by ours, and a request for as many "log-probabilities" as a
row has columns gets

    column   0           1 .. K          then T           then T, where K < V
    id       the target  the K ids       V + 0, V + 1, ...
    value    its score   the K scores    logsumexp        log_tail

in one pass, by the very function that reduces rows for transformers. Ids from V on belong to no token. Of a finished
sequence only the rows from its own `extra_args["first_row"]` on are sent: turning the entries of 1,200 tokens of
context into Python's lists would take vLLM 0.2 s a sequence, and entries found in the prefix cache are undefined.

Loaded by name into every worker (`worker_extension_cls`), so it is the same under tensor parallelism, where each worker
holds all of a row's logits once the head's parts are gathered. `stage1_teacher.vllm` reads what is sent.

Shape suffixes: N rows, V vocabulary, K ranks, T temperatures, C columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stage1_teacher.topk import TopK, select_top_k


def columns(k: int, temperatures: int, vocab_size: int) -> int:
    """How many columns follow the target's: how many `prompt_logprobs` to ask for."""
    return k + temperatures * (2 if k < vocab_size else 1)


def pack(kept: TopK, target_N: Tensor, score_N: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """ids_NC int32 and values_NC float32, the target's column first. A row that is not finite has NaN normalisers."""
    assert kept.token_ids_NK is not None
    normalisers = [kept.logsumexp_NT] if kept.log_tail_NT is None else [kept.logsumexp_NT, kept.log_tail_NT]
    sums_NC = torch.cat(normalisers, dim=1).masked_fill(~kept.finite_N[:, None], torch.nan)
    reserved_C = torch.arange(vocab_size, vocab_size + sums_NC.shape[1], device=target_N.device)
    ids_NC = torch.cat([target_N[:, None], kept.token_ids_NK, reserved_C.expand(len(target_N), -1)], dim=1)
    return ids_NC.int(), torch.cat([score_N[:, None], kept.logits_NK, sums_NC], dim=1)


def unpack(ids_NC: Tensor, values_NC: Tensor, k: int, temperatures: int, vocab_size: int) -> TopK | None:
    """What `pack` packed; None where the columns are others: vLLM's own, which have no normalisers."""
    sums_NC = values_NC[:, 1 + k :]
    reserved_C = torch.arange(vocab_size, vocab_size + sums_NC.shape[1])
    if ids_NC.shape[1] != 1 + columns(k, temperatures, vocab_size) or not (ids_NC[:, 1 + k :] == reserved_C).all():
        return None
    finite_N = ~sums_NC.isnan().any(1)
    sums_NC = torch.where(finite_N[:, None], sums_NC, 0.0)
    return TopK(
        values_NC[:, 1 : 1 + k],
        ids_NC[:, 1 : 1 + k].long(),
        sums_NC[:, :temperatures],
        sums_NC[:, temperatures:] if k < vocab_size else None,
        finite_N,
    )


class TopKWorker:
    """Methods that vLLM adds to its workers; the teacher calls them by name in all of them."""

    model_runner: Any

    def send_top_k(self, k: int, temperatures: Sequence[float]) -> None:
        """From now on, reduce the rows of every request for `columns(...)` scores as `topk.select_top_k` does."""
        from vllm.v1.outputs import LogprobsTensors

        runner, sampler = self.model_runner, self.model_runner.sampler
        theirs, finished = sampler.gather_logprobs, runner._get_prompt_logprobs_dict

        def gather_logprobs(scores_NV: Tensor, count: int, token_ids: Tensor) -> Any:
            vocab_size = scores_NV.shape[1]
            if count != columns(k, len(temperatures), vocab_size):
                return theirs(scores_NV, count, token_ids)
            score_N = scores_NV.gather(1, token_ids[:, None])[:, 0]
            packed = pack(select_top_k(scores_NV, k, temperatures), token_ids, score_N, vocab_size)
            return LogprobsTensors(*packed, torch.zeros_like(token_ids))

        def wanted(*args: Any) -> dict[str, Any]:
            sent: dict[str, Any] = finished(*args)
            for request, tensors in sent.items():
                first_row = runner.requests[request].sampling_params.extra_args["first_row"]
                sent[request] = LogprobsTensors(*(tensor[first_row:] for tensor in tensors[:3]))
            return sent

        sampler.gather_logprobs, runner._get_prompt_logprobs_dict = gather_logprobs, wanted

    def watch_head(self) -> None:
        """Keep what the model's head computes, until `head_logits` asks for it."""
        model = self.model_runner.model
        compute_logits = model.compute_logits
        self.head_outputs: list[Tensor] = []

        def watched(*args: Any, **options: Any) -> Any:
            logits_NV = compute_logits(*args, **options)
            self.head_outputs.append(logits_NV.clone())  # what comes after may write into it
            return logits_NV

        model.compute_logits = watched

    def head_logits(self, ids_NK: list[list[int]]) -> tuple[str, list[list[float]]]:
        """(the head's dtype, what it computed for these ids of the last request's N rows, N > 2); stops watching.

        vLLM computes the last row, from which it samples, apart from the others.
        """
        del self.model_runner.model.compute_logits
        outputs, self.head_outputs = self.head_outputs, []
        others_NV = next(out for out in reversed(outputs) if len(out) == len(ids_NK) - 1)
        last_1V = next(out for out in reversed(outputs) if len(out) == 1)
        logits_NV = torch.cat([others_NV, last_1V])
        picked_NK = logits_NV.gather(1, torch.tensor(ids_NK, device=logits_NV.device))
        return str(logits_NV.dtype).removeprefix("torch."), picked_NK.float().tolist()
