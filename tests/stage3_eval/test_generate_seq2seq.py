"""The encoder-decoder engine: padded batches, early ends, memory. Oracle: transformers' own generate."""

import pytest
import toys

from pipeline.errors import RunError
from stage3_eval.generate.seq2seq import Seq2SeqEngine

NEW = 12
NEVER = 2  # <|start|>: ends nothing where it is the end token and is not written


def load(folder):
    import torch

    from pipeline.models import load_seq2seq_lm, locate

    return load_seq2seq_lm(locate(str(folder)), "float32", "none", torch.device("cpu"))


@pytest.fixture(scope="module", params=[False, True], ids=["flan", "tied"])
def model(request, tmp_path_factory):
    # Weights this large make the answers differ from prompt to prompt.
    folder = tmp_path_factory.mktemp("model")
    return load(toys.tiny_t5(folder, initializer_factor=3.0, tie_word_embeddings=request.param))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list[list[int]]:
    from pipeline.prompts import PromptBuilder

    builder = PromptBuilder(toys.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")), seq2seq=True)
    return [builder.prompt_ids(row["question"][: 12 + 9 * i]) for i, row in enumerate(toys.rows(7))]


def alone(model, prompt, end_id):
    """What transformers' own generate writes for one unpadded prompt, its defaults turned off."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW, eos_token_id=end_id, pad_token_id=0, decoder_start_token_id=0
    )
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), generation_config=config)
    return out[0, 1:].tolist()


def frequent(answers) -> int:
    """A token that random answers hold often, so that as an end token it ends some of them early."""
    written = [token for ids, _ in answers for token in ids[2:]]
    return max(sorted(set(written)), key=written.count)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_padded_batches_write_what_transformers_generates(model, prompts, batch_size):
    end_id = frequent(Seq2SeqEngine(model, batch_size).generate(prompts, None, NEW, NEVER))
    expected = [alone(model, prompt, end_id) for prompt in prompts]
    answers = Seq2SeqEngine(model, batch_size).generate(prompts, None, NEW, end_id)
    assert [ids for ids, _ in answers] == expected
    assert [finished for _, finished in answers] == [ids[-1] == end_id for ids in expected]
    lengths = {len(ids) for ids in expected}
    assert len(lengths) > 1 and NEW in lengths, "some answers must end early, and some not"
    assert len({tuple(ids) for ids in expected}) > 3, "the prompts must matter"


@pytest.mark.parametrize("batch_size", [1, 7])
def test_labels_are_as_likely_as_the_plain_forward_says(model, prompts, batch_size):
    labels = [[[5, 1], [6, 7, 8, 1], [5, 9, 1]][: 1 + i % 3] for i in range(len(prompts))]
    found = Seq2SeqEngine(model, batch_size).label_logprobs(prompts, labels, None)
    for prompt, of, values in zip(prompts, labels, found, strict=True):
        assert values == pytest.approx([plain_logprob(model, prompt, label) for label in of], rel=1e-5)
    assert len({round(value, 3) for values in found for value in values}) == sum(map(len, labels))


def plain_logprob(model, prompt, label):
    """The label's log-probability from the plain forward pass of one unpadded row."""
    import torch

    with torch.inference_mode():
        out = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *label[:-1]]]))
    rows = out.logits[0].log_softmax(-1)
    return sum(float(rows[t, token]) for t, token in enumerate(label))


class Cramped(Seq2SeqEngine):
    """An engine whose device holds two prompts and no more."""

    def _encode(self, prompts):
        import torch

        if len(prompts) > 2:
            raise torch.OutOfMemoryError(f"tried to allocate room for {len(prompts)}")
        return super()._encode(prompts)


def test_out_of_memory_halves_the_batch_and_goes_on(model, prompts):
    engine = Cramped(model, 7)
    assert engine.generate(prompts, None, NEW, NEVER) == Seq2SeqEngine(model, 7).generate(prompts, None, NEW, NEVER)
    assert engine.batches.size == 1  # 7, 3, 1


def test_out_of_memory_with_one_prompt_is_said(model, prompts, monkeypatch):
    def full(self, prompts):
        raise MemoryError

    monkeypatch.setattr(Cramped, "_encode", full)
    with pytest.raises(RunError, match=r"a single prompt; lower eval\.max_new_tokens"):
        Cramped(model, 2).generate(prompts, None, NEW, NEVER)
