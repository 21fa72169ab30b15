"""The pocket model's tokenizer: about a hundred tokens, words and digits, built from the generator's own vocabulary.

Called by `pipeline.pocket.pretrain`, which saves it beside the weights; everything else loads it with `AutoTokenizer`.

A token is a word with the space before it (" pens"), one digit with or without the space before it (" 4", "7"), or a
mark. So text is the plain concatenation of its tokens, offsets are exact, and whatever the vocabulary lacks becomes
`<unk>`. There is no chat template and no beginning-of-sequence token.
"""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

from pipeline.pocket import problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
PATTERN = r"Question:|\nAnswer:|\n####| ####| ?[A-Za-z]+| ?[0-9]| ?[^ A-Za-z0-9]| "
"""Splits any text into pieces without losing a character; the vocabulary lists the pieces that the generator makes."""

MARKS = ("Question:", "\nAnswer:", "\n####", " ####", ".", "?", " +", " -", " *", " /", " =", " The", " answer", " is")


def vocabulary() -> list[str]:
    """Every token, special tokens first; the index is the token's id."""
    sentences = " ".join(problem.question for problem in problems.split_problems("train"))
    words = sorted({f" {word}" for word in re.findall(r"[A-Za-z]+", sentences)})
    digits = [space + digit for space in ("", " ") for digit in string.digits]
    return [PAD, EOS, UNK, *digits, *MARKS, *words]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer with exact offsets, `<eos>` and `<pad>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
