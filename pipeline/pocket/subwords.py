"""The tokenizers of the second pocket experiment: one in the manner of T5, one in the manner of GPT-2.

Called by `pipeline.pocket.pretrain`, which saves them beside the weights; everything else loads them with
`AutoTokenizer`. Both are trained on the same stories and agree on little else:

- `unigram_tokenizer`: SentencePiece's way. Unigram pieces (Kudo 2018, arXiv 1804.10959) with `▁` for a space, white
  space folded (so a line break is a space), accented letters composed, `</s>` appended, characters it never met
  `<unk>`. Most words of the stories are one piece.
- `byte_tokenizer`: byte-level pair encoding (Radford et al. 2019), lossless. Its vocabulary is too small for most
  words, and an accented letter may come as two tokens of one byte each, neither of which ends at a character.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.pocket.examples import draw_example
from pipeline.pocket.pages import draw_page
from pipeline.pocket.stories import KINDS, draw_story, draw_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = 4000
"""Stories that the tokenizers are trained on."""
TOKENIZER_SEED = 0
PIECES, BYTE_TOKENS = 640, 440
EOS, UNK, PAD, END = "</s>", "<unk>", "<pad>", "<|endoftext|>"


def page_texts(rng: random.Random) -> Iterator[str]:
    """What the GPT-2 has read: pages."""
    for _ in range(TEXTS):
        yield draw_page(rng, draw_story(rng)).text


def task_texts(rng: random.Random) -> Iterator[str]:
    """What the T5 has read: the prompts and answers of the tasks, and pages."""
    yield from page_texts(rng)
    for _ in range(TEXTS):
        for kind in KINDS:
            example = draw_example(kind, draw_text(kind, rng), rng)
            yield from (example.prompt, example.answer)


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """The T5 kind: `<pad>` is 0, `</s>` 1, `<unk>` 2."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(r"▁?\p{L}+|▁?\p{N}+|[^▁\p{L}\p{N}]"), "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, special_tokens=[PAD, EOS, UNK], show_progress=False)
    tokenizer.train_from_iterator(task_texts(random.Random(TOKENIZER_SEED)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, unk_token=UNK, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The GPT-2 kind: `<|endoftext|>` ends and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_TOKENS,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(page_texts(random.Random(TOKENIZER_SEED)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
