"""From untemplated text to token ids: the one prompt builder of teacher, training and scoring.

Two layouts for a decoder. With a chat template the prompt is a user turn, worked examples are earlier turns, and
end-of-sequence is the token that closes an assistant turn. Without one (plain) the ids are

    [bos, if the tokenizer adds one] + tok(prompt) + tok(" " + answer) + [eos]

and worked examples are the same thing in front, each ending with eos, or the teacher would never learn to stop.
One for an encoder-decoder (seq2seq):

    encoder   [tok(prompt) + tok(answer) + [eos] of each worked example] + tok(prompt) + [eos]
    decoder   [pad, the token T5's decoder starts with] + tok(answer) + [eos]

Prompt and answer are always tokenised apart and concatenated, so an answer has the same ids after any prompt.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import ModelError
from pipeline.tasks import Example

OFFSETS = 2  # raised whenever `answer_offsets` of the same tokens change; 1 were the tokenizer's own
_PROBE = "quokka"  # a word no template contains; marks where a turn's content begins and ends


@dataclass(frozen=True)
class Encoded:
    """A prompt with its answer, unpadded.

    input_ids: what the decoder reads: the prompt's ids (seq2seq: the start token alone), then the answer's,
      end-of-sequence included.
    answer_start: index of the first answer token in input_ids. The distribution that predicts answer token t is
      read at input position answer_start - 1 + t; it is row t of the cache.
    answer_offsets: (start, end) of each answer token in the answer text, Unicode code points, end exclusive;
      end-of-sequence is (len, len). `end` is how much of the text is consumed once the token is; tokens that consume
      one character between them share an end, and only the last of them is a boundary.
    encoder_ids: what the encoder reads; empty where there is none.
    """

    input_ids: list[int]
    answer_start: int
    answer_offsets: list[tuple[int, int]]
    encoder_ids: list[int] = field(default_factory=list)

    @property
    def answer_ids(self) -> list[int]:
        """The answer's ids, end-of-sequence included."""
        return self.input_ids[self.answer_start :]


class PromptBuilder:
    """Builds prompts for one tokenizer.

    thinking: the chat template's `enable_thinking`; None: not passed. require_switch: refuse a template that does not
    read the switch (the teacher's side asks for it; a student whose template has no such switch has no such mode).
    seq2seq: for an encoder-decoder. Raises ModelError where the tokenizer cannot serve.
    """

    def __init__(
        self, tokenizer: Any, thinking: bool | None = None, require_switch: bool = True, *, seq2seq: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.seq2seq = seq2seq
        self.chat = bool(tokenizer.chat_template) and not seq2seq
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
        end_id: int | None = self._end_of_turn() if self.chat else tokenizer.eos_token_id
        if end_id is None:
            raise ModelError(f"tokenizer {tokenizer.name_or_path}: it has no end-of-sequence token (eos_token)")
        self.end_id = end_id
        self.start_id: int | None = tokenizer.pad_token_id if seq2seq else None
        if seq2seq and self.start_id is None:
            raise ModelError(f"tokenizer {tokenizer.name_or_path}: it has no pad_token for the decoder to start with")
        self._prefix_ids = self._added_in_front()
        self._untrimmed = _untrimmed(tokenizer)
        self._shots: dict[tuple[tuple[str, str], ...], tuple[str | None, list[int]] | None] = {}

    def describe(self) -> dict[str, Any]:
        """What a fingerprint needs to know of the layout."""
        layout = {
            "layout": "seq2seq" if self.seq2seq else "chat" if self.chat else "plain",
            "chat_template": self.tokenizer.chat_template if self.chat else None,
            "thinking": self.thinking,
            "offsets": OFFSETS,
            "end_of_sequence": self.tokenizer.convert_ids_to_tokens(self.end_id),
        }
        return layout | ({"decoder_start": self.tokenizer.pad_token} if self.seq2seq else {})

    def prompt_ids(self, prompt: str, shots: Sequence[Example] = ()) -> list[int]:
        """Ids of everything before the answer, worked examples in front; what the encoder reads, where there is one.

        The next token (the first after the decoder's start) is answer token 0.
        """
        text, ids = self._read_before(shots)
        if self.chat:
            rendered = self._render_with(shots, prompt)
            if text is None or not rendered.startswith(text):
                return self._tokens(rendered)
            return [*ids, *self._tokens(rendered[len(text) :])]
        if text is None:
            ids = self._plain_shots(shots)
        return [*self._prefix_ids, *ids, *self._tokens(prompt), *([self.end_id] if self.seq2seq else [])]

    def shared_ids(self, shots: Sequence[Example]) -> list[int]:
        """The ids every prompt behind these worked examples begins with: what two with nothing in common share.

        None in an encoder, where the worked examples are read in the light of the prompt behind them.
        """
        if self.seq2seq:
            return []
        one, other = (self.prompt_ids(text, shots) for text in ("0", "a"))
        same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        return one[:same]

    def encode(self, prompt: str, answer: str, shots: Sequence[Example] = ()) -> Encoded:
        """A prompt and its answer, with the answer's place and offsets."""
        before = self.prompt_ids(prompt, shots)
        ids, offsets = self._answer(answer)
        if self.start_id is not None:
            return Encoded([self.start_id, *ids], 1, offsets, before)
        return Encoded(before + ids, len(before), offsets)

    def try_encode(self, prompt: str, answer: str, shots: Sequence[Example] = ()) -> Encoded | None:
        """As `encode`; None where the tokenizer or the chat template fails on these texts, whatever they raise: that is
        one bad example, not the end of the run."""
        try:
            return self.encode(prompt, answer, shots)
        except MemoryError:
            raise
        except Exception:
            return None

    def text(self, ids: Sequence[int]) -> str:
        """What a model wrote: `ids` up to end-of-sequence, as text, without special tokens or outer space."""
        ids = list(ids)
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        decoded: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded.strip()

    def _answer(self, answer: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Answer ids and offsets; the plain layout's separating space is the answer's, offsets are clipped."""
        text = answer if self.chat or self.seq2seq else " " + answer
        space = len(text) - len(answer)
        enc = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = enc["offset_mapping"]
        if self._untrimmed is not None:
            spans = self._untrimmed.encode(text, add_special_tokens=False).offsets
        offsets = [(max(start - space, 0), max(end - space, 0)) for start, end in _consumed(text, spans)]
        return [*enc["input_ids"], self.end_id], [*offsets, (len(answer), len(answer))]

    def _plain_shots(self, shots: Sequence[Example]) -> list[int]:
        return [i for shot in shots for i in (*self._tokens(shot.prompt), *self._answer(shot.answer)[0])]

    def _render_with(self, shots: Sequence[Example], prompt: str) -> str:
        turns = [turn for shot in shots for turn in (_user(shot.prompt), _assistant(shot.answer))]
        return self._render([*turns, _user(prompt)], add_generation_prompt=True)

    def _read_before(self, shots: Sequence[Example]) -> tuple[str | None, list[int]]:
        """(text, ids) that every prompt behind these worked examples begins with; text None: not known.

        Known from the second time on, if they are the same for many: eight take 1.1 ms to tokenise, the prompt 0.2.
        """
        key = tuple((shot.prompt, shot.answer) for shot in shots)
        if not shots:
            return None, []
        if key not in self._shots:
            if len(self._shots) >= 64:  # others for every example: nothing to remember
                self._shots.clear()
            self._shots[key] = None
            return None, []
        known = self._shots[key]
        if known is None:
            known = self._shots[key] = self._common(shots) if self.chat else ("", self._plain_shots(shots))
        return known

    def _common(self, shots: Sequence[Example]) -> tuple[str | None, list[int]]:
        """What two prompts have in common in front, up to a special token, which ends the one before whatever follows.

        Not known where the tokenizer reads the two parts otherwise than the whole.
        """
        one, other = (self._render_with(shots, prompt) for prompt in ("0", "a"))
        same = one[: next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)]
        cut = max((same.rfind(str(token)) for token in self.tokenizer.added_tokens_decoder.values()), default=-1)
        before, behind = self._tokens(one[: max(cut, 0)]), self._tokens(one[max(cut, 0) :])
        return (one[:cut], before) if cut > 0 and before + behind == self._tokens(one) else (None, [])

    def _tokens(self, text: str) -> list[int]:
        # verbose: its own warning of long texts is wrong for T5, which has no window; stages check the model's window
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
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


def _untrimmed(tokenizer: Any) -> Any:
    """A copy of the tokenizer whose offsets keep their white space, None where they do anyway.

    GPT-NeoX's post-processor trims it: of a token that is a newline and four spaces the offset says one consumed.
    """
    from tokenizers import Tokenizer

    described = tokenizer.backend_tokenizer.to_str()
    if '"trim_offsets":true' not in json.dumps(json.loads(described)["post_processor"], separators=(",", ":")):
        return None
    core = Tokenizer.from_str(described)
    core.post_processor = None
    core.no_truncation()
    core.no_padding()
    return core


def _consumed(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets whose ends say how much of `text` is consumed, where the tokenizer's own say less or more.

    Less: a normalizer composed e and an accent into one letter, or dropped a character, and the offset covers the
    first alone; the end then moves over what no token covers. More: the next token begins inside this one's span (the
    ½ that became "1/2" and was split; T5's lone `▁`, which is given the first letter of its word), or with an accent
    that belongs to this one's letter, whatever a normalizer made of them; the two then share an end, so that this one
    is no boundary.
    """
    mended: list[tuple[int, int]] = []
    next_start, next_end = len(text), len(text)
    for start, end in reversed(offsets):
        if next_start < end or unicodedata.combining(text[next_start : next_start + 1] or " "):
            end = next_end
        elif text[end:next_start].strip():
            end += len(text[end:next_start].rstrip())
        mended.append((start, end))
        next_start, next_end = start, end
    return mended[::-1]
