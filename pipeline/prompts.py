"""From untemplated text to token ids: the one prompt builder of teacher, training and scoring.

Two layouts. With a chat template the prompt is a user turn, worked examples are earlier turns, and end-of-sequence is
the token that closes an assistant turn. Without one (plain) the ids are

    [bos, if the tokenizer adds one] + tok(prompt) + tok(" " + answer) + [eos]

and worked examples are the same thing in front, each ending with eos, or the teacher would never learn to stop.
Prompt and answer are always tokenised apart and concatenated, so an answer has the same ids after any prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ModelError
from pipeline.tasks import Example

_PROBE = "quokka"  # a word no template contains; marks where a turn's content begins and ends


@dataclass(frozen=True)
class Encoded:
    """A prompt with its answer, unpadded.

    input_ids: the prompt's ids, then the answer's, end-of-sequence included.
    answer_start: index of the first answer token in input_ids. The distribution that predicts answer token t is
      read at input position answer_start - 1 + t; it is row t of the cache.
    answer_offsets: (start, end) of each answer token in the answer text, Unicode code points, end exclusive;
      end-of-sequence is (len, len).
    """

    input_ids: list[int]
    answer_start: int
    answer_offsets: list[tuple[int, int]]

    @property
    def answer_ids(self) -> list[int]:
        """The answer's ids, end-of-sequence included."""
        return self.input_ids[self.answer_start :]


class PromptBuilder:
    """Builds prompts for one tokenizer.

    thinking: the chat template's `enable_thinking`; None: not passed. require_switch: refuse a template that does not
    read the switch (the teacher's side asks for it; a student whose template has no such switch has no such mode).
    Raises ModelError where the tokenizer cannot serve.
    """

    def __init__(self, tokenizer: Any, thinking: bool | None = None, require_switch: bool = True) -> None:
        self.tokenizer = tokenizer
        self.chat = bool(tokenizer.chat_template)
        self.thinking = thinking
        if not tokenizer.is_fast:
            raise ModelError(
                f"tokenizer {tokenizer.name_or_path}: offsets need a fast tokenizer (tokenizer.json), found a slow one"
            )
        if thinking is not None and not self._template_reads_switch():
            if require_switch:
                raise ModelError(
                    f"tokenizer {tokenizer.name_or_path}: the recipe asks for thinking={str(thinking).lower()}, but "
                    + ("its chat template ignores enable_thinking" if self.chat else "it has no chat template")
                    + "; set teacher.thinking=null, or use the tokenizer that has the switch"
                )
            self.thinking = None
        self.end_id = self._end_of_turn() if self.chat else tokenizer.eos_token_id
        if self.end_id is None:
            raise ModelError(f"tokenizer {tokenizer.name_or_path}: it has no end-of-sequence token (eos_token)")
        self._prefix_ids = self._added_in_front()

    def describe(self) -> dict[str, Any]:
        """What a fingerprint needs to know of the layout."""
        return {
            "layout": "chat" if self.chat else "plain",
            "chat_template": self.tokenizer.chat_template if self.chat else None,
            "thinking": self.thinking,
            "end_of_sequence": self.tokenizer.convert_ids_to_tokens(self.end_id),
        }

    def prompt_ids(self, prompt: str, shots: Sequence[Example] = ()) -> list[int]:
        """Ids of everything before the answer, worked examples in front. The next token is answer token 0."""
        if self.chat:
            turns = [turn for shot in shots for turn in (_user(shot.prompt), _assistant(shot.answer))]
            return self._tokens(self._render([*turns, _user(prompt)], add_generation_prompt=True))
        ids = list(self._prefix_ids)
        for shot in shots:
            ids += [*self._tokens(shot.prompt), *self._answer(shot.answer)[0]]
        return ids + self._tokens(prompt)

    def encode(self, prompt: str, answer: str, shots: Sequence[Example] = ()) -> Encoded:
        """A prompt and its answer as one sequence, with the answer's place and offsets."""
        before = self.prompt_ids(prompt, shots)
        ids, offsets = self._answer(answer)
        return Encoded(before + ids, len(before), offsets)

    def text(self, ids: Sequence[int]) -> str:
        """What a model wrote: `ids` up to end-of-sequence, as text, without special tokens or outer space."""
        ids = list(ids)
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        decoded: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded.strip()

    def _answer(self, answer: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Answer ids and offsets; the plain layout's separating space is the answer's, offsets are clipped."""
        space = 0 if self.chat else 1
        enc = self.tokenizer(" " * space + answer, add_special_tokens=False, return_offsets_mapping=True)
        offsets = [(max(start - space, 0), max(end - space, 0)) for start, end in enc["offset_mapping"]]
        return [*enc["input_ids"], self.end_id], [*offsets, (len(answer), len(answer))]

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _render(self, turns: list[dict[str, str]], **options: Any) -> str:
        if self.thinking is not None:
            options.setdefault("enable_thinking", self.thinking)
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, **options)
        return text

    def _template_reads_switch(self) -> bool:
        """Whether `enable_thinking` changes what is rendered. Asked of the rendering, not of the template's source."""
        if not self.chat:
            return False
        on, off = (
            self.tokenizer.apply_chat_template(
                [_user(_PROBE)], tokenize=False, add_generation_prompt=True, enable_thinking=switch
            )
            for switch in (True, False)
        )
        return bool(on != off)

    def _end_of_turn(self) -> int | None:
        """The special token that follows an assistant's content in the template, else eos_token."""
        rendered = self._render([_user("."), _assistant(_PROBE)])
        after = self._tokens(rendered.rpartition(_PROBE)[2])
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        if after and after[0] in special:
            return after[0]
        eos: int | None = self.tokenizer.eos_token_id
        return eos

    def _added_in_front(self) -> list[int]:
        """Ids the tokenizer itself puts before a text (bos), which the chat template writes on its own."""
        ids: list[int] = self.tokenizer(_PROBE, add_special_tokens=True)["input_ids"]
        bare = self._tokens(_PROBE)
        for start in range(len(ids) - len(bare) + 1):
            if ids[start : start + len(bare)] == bare:
                return ids[:start]
        return []


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
