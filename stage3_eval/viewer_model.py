"""A student that reads the reference answers of cached examples, untouched and with adapters. Called by `viewer`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schema.schema import ALIGNMENT, ALL
from pipeline.errors import ModelError
from pipeline.recipe import Recipe
from stage3_eval.conditions import Condition
from stage3_eval.subject import Subject
from stage3_eval.viewer_rows import Answer, mean_of, student_probabilities, temperature_of

if TYPE_CHECKING:
    from cache_schema.reader import CacheReader
    from pipeline.prompts import Encoded

_LONGEST = 320  # tokens of an answer that is shown
_PROMPT = 4000  # characters of a prompt


class Reading:
    """One student on one cache. Indices are the cache's row numbers. Loads the model on transformers, whatever engine
    generates. Raises ModelError for an encoder-decoder and for whatever cannot be loaded."""

    def __init__(self, recipe: Recipe, subject: Subject, reader: "CacheReader") -> None:
        from pipeline.models import device_of, load_causal_lm, tokenizer_digest
        from stage3_eval.generate.hf import HFEngine

        if subject.seq2seq:
            raise ModelError("the token viewer reads answers with decoders only, and this student is none")
        self._subject, self._reader = subject, reader
        digest = tokenizer_digest(subject.prompts.tokenizer)
        self.same_tokenizer = bool(digest == reader.manifest.identity["tokenizer"]["sha256"])
        self.temperature = temperature_of(reader.manifest)[1]
        self._vocabulary = reader.vocabulary()
        self._names: dict[int, str] = {}
        self._encoded: dict[int, Encoded | None] = {}
        model = load_causal_lm(subject.source, subject.settings.dtype, "none", device_of(recipe))
        self._engine = HFEngine(model, batch_size=1)

    def close(self) -> None:
        """Free the model's memory."""
        self._engine.close()

    def fitting(self, rows: Sequence[tuple[int, str]], most: int) -> list[tuple[int, str]]:
        """The first of these rows that the student can read whole and a page can show."""
        found: list[tuple[int, str]] = []
        for index, why in rows:
            if len(found) < most and self._encode(index) is not None:
                found.append((index, why))
        return found

    def answer(self, index: int) -> Answer:
        """The teacher's side of a row."""
        row, encoded = self._reader.read([index], ALL)[0], self._of(index)
        same = self.same_tokenizer and encoded.answer_ids == row.answer_ids.tolist()
        return Answer(row, self._reader.manifest, np.array(encoded.answer_offsets), same)

    def mean_disagreement(self, index: int, condition: Condition) -> float | None:
        """Over the positions of an answer that have a teacher."""
        return mean_of(self.answer(index).disagreements(self._probabilities(index, condition)))

    def expectation(self, index: int, answer: Answer, condition: Condition) -> dict[str, Any]:
        """See `Answer.student`."""
        return answer.student(self._probabilities(index, condition), self._of(index).answer_ids, self._name)

    def described(self, index: int, answer: Answer) -> dict[str, Any]:
        """The example and its tokens on both sides."""
        row, encoded = answer.row, self._of(index)
        return {
            "id": row.example_id,
            "task": row.task,
            "prompt": row.prompt if len(row.prompt) <= _PROMPT else f"{row.prompt[:_PROMPT]} ...",
            "answer": row.answer,
            "same_tokens": answer.same_tokens,
            "by_rank": answer.ids is None,
            "teacher": answer.teacher(lambda i: self._vocabulary[i] or f"id {i}"),
            "tokens": [  # the name of one whose text is empty, as the space before a plain answer's first word
                [start, end, i, "" if end > start else self._name(i)]
                for (start, end), i in zip(encoded.answer_offsets, encoded.answer_ids, strict=True)
            ],
            "pairs": {mode: pairs.tolist() for mode, pairs in answer.pairs.items()},
        }

    def _probabilities(self, index: int, condition: Condition) -> Any:
        encoded = self._of(index)
        prompt = encoded.input_ids[: encoded.answer_start]
        logits_MV = self._engine.answer_logits(prompt, encoded.answer_ids, condition.adapter).numpy()
        if not np.isfinite(logits_MV).all():  # JSON has no number for what would come of it
            raise ModelError(f"{condition.name}: its logits are not finite")
        return student_probabilities(logits_MV, self.temperature)

    def _of(self, index: int) -> "Encoded":
        encoded = self._encode(index)
        assert encoded is not None, "asked for only where `fitting` has found it"
        return encoded

    def _encode(self, index: int) -> "Encoded | None":
        """None where it does not fit into the student's window, or on a page."""
        if index not in self._encoded:
            row = self._reader.read([index], ALIGNMENT)[0]
            encoded = self._subject.prompts.try_encode(row.prompt, row.answer)
            window = self._subject.window
            too_long = encoded is None or len(encoded.answer_ids) > _LONGEST or len(row.answer_ids) > _LONGEST
            if encoded is not None and window is not None and len(encoded.input_ids) > window:
                too_long = True
            self._encoded[index] = None if too_long else encoded
        return self._encoded[index]

    def _name(self, token_id: int) -> str:
        """The text of one of the student's ids alone."""
        if token_id not in self._names:
            text = self._subject.prompts.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
            self._names[token_id] = text or f"id {token_id}"
        return self._names[token_id]
