"""What the engines on transformers share: batches that shrink to what memory holds, and rows that leave them.

Called by `hf` and `seq2seq`. N rows of logits, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import RunError
from stage3_eval.generate import Generated

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Batches:
    """Work in batches of at most `size` items. Out of memory halves the size, for good, and goes on."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, lengths: Sequence[int], work: Callable[[list[int]], list[T]]) -> list[T]:
        """`work` on batches of the indices of `lengths`, the longest first; its results in the order of `lengths`.

        Raises RunError where a single item is too much.
        """

        def one_batch(left: list[int]) -> Iterator[tuple[int, T]]:
            batch = left[: self.size]
            yield from zip(batch, work(batch), strict=True)

        return self.stream(lengths, one_batch)

    def stream(self, lengths: Sequence[int], work: Callable[[list[int]], Iterator[tuple[int, T]]]) -> list[T]:
        """The same, of `work` that hands over each item's result when it has it, from the items that are left.

        It keeps at most `size` of them in work at a time, and may stop before it has done all.
        """
        import torch

        results: dict[int, T] = {}
        left = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
        while left:
            try:
                for index, result in work(left):
                    results[index] = result
                failed = False
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                failed = True
            if failed:  # outside the handler: the exception holds on to the batch's tensors
                self._halve(min(self.size, len(left)))
            left = [index for index in left if index not in results]
        return [results[i] for i in range(len(lengths))]

    def _halve(self, tried: int) -> None:
        import torch

        if tried == 1:
            raise RunError(
                "out of memory with a single prompt; lower eval.max_new_tokens or the worked examples (teacher.shots, "
                "eval.shots), or use a larger device"
            )
        self.size = tried // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"out of memory with {tried} prompts in a batch; going on with {self.size}", flush=True)


class Rows:
    """The answers of a batch while they are written: which prompt each row answers, and which have ended."""

    def __init__(self, prompts: int, end_id: int) -> None:
        self._answers: list[list[int]] = [[] for _ in range(prompts)]
        self._prompts = list(range(prompts))  # row of the batch -> prompt; -1 once it has ended
        self._end_id = end_id

    def add(self, tokens: Sequence[int]) -> bool:
        """One token more for each row; whether any goes on."""
        for row, token in enumerate(tokens):
            if self._prompts[row] >= 0:
                self._answers[self._prompts[row]].append(token)
                if token == self._end_id:
                    self._prompts[row] = -1
        return any(prompt >= 0 for prompt in self._prompts)

    def leave(self) -> list[int] | None:
        """The rows to go on with, once at most half of them do: copying the KV cache pays when it halves."""
        alive = [row for row, prompt in enumerate(self._prompts) if prompt >= 0]
        if len(alive) > len(self._prompts) // 2:
            return None
        self._prompts = [self._prompts[row] for row in alive]
        return alive

    def answers(self) -> list[Generated]:
        """What each prompt got."""
        return [Generated(ids, ids[-1] == self._end_id) for ids in self._answers]


def summed_logprobs(logits_NV: "Tensor", targets_N: "Tensor", lengths: Sequence[int]) -> list[float]:
    """The log-probability of each run of `lengths` tokens, in nats; row n of the logits predicts target n."""
    of_tokens = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0].double()
    return [float(tokens.sum()) for tokens in of_tokens.split(list(lengths))]


def _out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU a type of its own, on a CPU a RuntimeError that says so."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
