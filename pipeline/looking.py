"""One training example as the teacher and each student will see it, token by token. Called by `show`.

No weights are loaded: tokenizers and configs are. Row t of the cache predicts answer token t and is read one place
before it; here every answer token says so.
"""

from dataclasses import dataclass, field

import numpy as np

from pipeline.alignment import NONE, align
from pipeline.errors import RecipeError
from pipeline.fingerprint import Experiment
from pipeline.models import ModelSource, load_config, load_tokenizer, locate, tokenizer_digest, window_of
from pipeline.prompts import Encoded, PromptBuilder
from pipeline.tasks import Example


@dataclass(frozen=True)
class Token:
    """place: in what the model reads. row: of an answer token, its number in the answer; read_at: the place whose
    output predicts it. compared: alignment -> the teacher's row that a student's position is compared with, None
    for none.
    """

    place: int
    id: int
    text: str
    special: bool
    row: int | None = None
    read_at: int | None = None
    compared: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """What one model reads. encoder: empty without one. folded: leading tokens that are the worked examples."""

    name: str
    model: str
    layout: str
    shots: int
    folded: int
    encoder: list[Token]
    tokens: list[Token]
    notes: list[str]


@dataclass(frozen=True)
class Look:
    """An example from both sides; no side where it cannot be used, and `notes` say why."""

    index: int
    of: int
    id: str
    task: str
    prompt: str
    answer: str
    sides: list[Side]
    notes: list[str]


def look(experiment: Experiment, index: int) -> Look:
    """Example `index` of those that are cached. Raises RecipeError where there is none of this number."""
    cached = experiment.training_set.cached
    if not 0 <= index < len(cached):
        raise RecipeError(f"--example {index}: the recipe caches the examples 0 to {len(cached) - 1}")
    example = cached[index]
    about = (index, len(cached), example.id, example.task, example.prompt, example.answer)
    if example.unusable:
        return Look(*about, [], [f"it cannot be used ({example.unusable}): stage 1 will quarantine it"])
    recipe, prompts = experiment.recipe, experiment.teacher_prompts
    shots = experiment.training_set.shots.of(example)
    encoded = prompts.try_encode(example.prompt, example.answer, shots)
    if encoded is None:
        return Look(*about, [], ["the teacher's tokenizer fails on it (cannot_encode): stage 1 will quarantine it"])
    window = window_of(load_config(experiment.teacher_source))
    lost = len(encoded.input_ids) - window - 1 if window else 0
    notes = [f"{lost} answer tokens are beyond the {window} tokens that it reads: cut"] if lost > 0 else []
    if lost >= len(encoded.answer_ids):
        notes = [f"its prompt alone is beyond the {window} tokens that it reads: stage 1 will quarantine it"]
    folded = len(prompts.shared_ids(shots)) if shots else 0
    teacher = _side("teacher", recipe.teacher.model, prompts, encoded, len(shots), folded, notes)
    sides = [teacher, *(_student(experiment, name, example, encoded) for name in recipe.students)]
    return Look(*about, sides, [])


def _student(experiment: Experiment, name: str, example: Example, teacher: Encoded) -> Side:
    """The same example without worked examples, each answer position with the row that it is compared with."""
    recipe = experiment.recipe
    settings = recipe.students[name]
    source: ModelSource = locate(settings.model, settings.revision)
    prompts = PromptBuilder(load_tokenizer(source), recipe.teacher.thinking, require_switch=False)
    encoded = prompts.encode(example.prompt, example.answer)
    window = window_of(load_config(source))
    too_long = window is not None and len(encoded.input_ids) > window
    notes = [f"it is longer than the {window} tokens that this student reads: dropped"] if too_long else []
    modes = {arm.alignment or recipe.train.alignment for arm in recipe.arms.values() if arm.needs_teacher}
    same = tokenizer_digest(prompts.tokenizer) == tokenizer_digest(experiment.teacher_tokenizer)
    same_tokens = same and encoded.answer_ids == teacher.answer_ids
    theirs, ours = np.array(teacher.answer_offsets), np.array(encoded.answer_offsets)
    compared: dict[str, list[int]] = {mode: align(mode, theirs, ours, same_tokens).tolist() for mode in sorted(modes)}
    return _side(f"student {name}", settings.model, prompts, encoded, 0, 0, notes, compared)


def _side(
    name: str,
    model: str,
    prompts: PromptBuilder,
    encoded: Encoded,
    shots: int,
    folded: int,
    notes: list[str],
    compared: dict[str, list[int]] | None = None,
) -> Side:
    special = {*prompts.tokenizer.all_special_ids, *prompts.tokenizer.added_tokens_decoder}

    def token(place: int, token_id: int) -> Token:
        """One token with its place in the answer, if it has one."""
        text = prompts.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        piece = str(prompts.tokenizer.convert_ids_to_tokens(token_id))
        # part of a character, say; or a space in front that decoding takes for none
        if token_id in special or not text or "\N{REPLACEMENT CHARACTER}" in text or piece.startswith("▁"):
            text = piece
        t = place - encoded.answer_start
        if t < 0:
            return Token(place, token_id, text, token_id in special)
        rows = {mode: None if at[t] == NONE else at[t] for mode, at in (compared or {}).items()}
        return Token(place, token_id, text, token_id in special, t, place - 1, rows)

    return Side(
        name,
        model,
        str(prompts.describe()["layout"]),
        shots,
        folded,
        [Token(i, at, token(-1, at).text, at in special) for i, at in enumerate(encoded.encoder_ids)],
        [token(place, token_id) for place, token_id in enumerate(encoded.input_ids)],
        notes,
    )


def told(found: Look, full: bool) -> str:
    """For people. full: the worked examples token by token too."""
    lines = [f"example {found.index} of {found.of:,}: {found.id} ({found.task})", *found.notes]
    if found.sides:
        lines.append(
            "The answer is what has a row or position: what is cached and trained on. Row t of the cache is the "
            "distribution\nthat predicts answer token t; it is read one place before that token."
        )
    for side in found.sides:
        lines += ["", *_side_told(side, full)]
    return "\n".join(line.rstrip() for line in lines)


def _side_told(side: Side, full: bool) -> list[str]:
    answers = sum(token.row is not None for token in side.tokens)
    read = len(side.encoder) + len(side.tokens)
    shots = f"{side.shots} worked examples, " if side.shots else ""
    lines = [
        f"{side.name}: {side.model}, {side.layout} layout, {shots}{read:,} tokens, {answers} of them the answer",
        *side.notes,
    ]
    student = any(token.compared for token in side.tokens)
    modes = sorted({mode for token in side.tokens for mode in token.compared})
    if side.encoder:
        lines += ["  the encoder reads", *_table(side.encoder, [], False, 0, full, side.shots), "  the decoder reads"]
    return [*lines, *_table(side.tokens, modes, student, side.folded, full, side.shots)]


def _table(tokens: list[Token], modes: list[str], student: bool, folded: int, full: bool, shots: int) -> list[str]:
    """A line a token: its place, its id, itself, and of an answer token which row or position predicts it and where."""
    what = "position" if student else "row"
    head = ["place", "id", "token"]
    if any(token.row is not None for token in tokens):
        head += [f"answer {what}", "read at", *(f"teacher's row ({mode})" for mode in modes)]
    rows: list[list[str]] = []
    for token in tokens:
        shown = repr(token.text)[1:-1] + " (special)" if token.special else repr(token.text)
        row = [str(token.place), str(token.id), shown]
        if token.row is not None:
            rest = ("none" if (at := token.compared.get(mode)) is None else str(at) for mode in modes)
            row += [str(token.row), str(token.read_at), *rest]
        rows.append([*row, *[""] * (len(head) - len(row))])
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    lines = [
        "  "
        + "  ".join(
            cell.ljust(w) if i == 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *rows]
    ]
    if folded and not full:
        lines[1 : folded + 1] = [f"  ... {shots} worked examples, {folded:,} tokens (--full shows them) ..."]
    return lines
