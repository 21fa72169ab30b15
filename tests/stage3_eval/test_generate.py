"""The transformers engine: batches, padding, shared context, end token, adapters, memory. Oracle: transformers."""

from pathlib import Path

import pytest
import toys
from toy_adapters import write_adapter

from pipeline.errors import RunError
from stage3_eval.generate.hf import HFEngine

NEW = 12
NEVER = 1  # <|pad|>: a token the oracle may write too, but which ends nothing there


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    toys.tiny_qwen3(root)
    toys.tiny_tokenizer(root)
    return root


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("adapter") / str(seed) for seed in (1, 2)]
    for seed, folder in enumerate(folders):
        write_adapter(folder, model_folder, seed)
    return folders


def load(folder: Path):
    import torch

    from pipeline.models import load_causal_lm, locate

    return load_causal_lm(locate(str(folder)), "float32", "none", torch.device("cpu"))


@pytest.fixture(scope="module")
def model(model_folder):
    return load(model_folder)


@pytest.fixture(scope="module")
def prompts(model_folder) -> list[list[int]]:
    from pipeline.models import load_tokenizer, locate
    from pipeline.prompts import PromptBuilder

    builder = PromptBuilder(load_tokenizer(locate(str(model_folder))))
    return [builder.prompt_ids(row["question"][: 20 + 9 * i]) for i, row in enumerate(toys.rows(7))]


def alone(model, prompt, end_id):
    """What transformers' own generate writes for one unpadded prompt, its defaults for sampling turned off."""
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=end_id, pad_token_id=0)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, len(prompt) :].tolist()


def frequent(answers) -> int:
    """A token that random answers hold often, so that as an end token it ends some of them early."""
    written = [token for ids, _ in answers for token in ids[2:]]
    return max(sorted(set(written)), key=written.count)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_padded_batches_write_what_each_prompt_alone_gets(model, prompts, batch_size):
    free = HFEngine(model, batch_size).generate(prompts, None, NEW, NEVER)
    end_id = frequent(free)
    expected = [alone(model, prompt, end_id) for prompt in prompts]
    answers = HFEngine(model, batch_size).generate(prompts, None, NEW, end_id)
    assert [ids for ids, _ in answers] == expected
    assert [finished for _, finished in answers] == [ids[-1] == end_id for ids in expected]
    lengths = {len(ids) for ids in expected}
    assert len(lengths) > 2, "some answers must end early, or the end token is not tested"
    assert NEW in lengths


def test_an_answer_holds_the_end_token_once_at_its_end(model, prompts):
    end_id = frequent(HFEngine(model, 4).generate(prompts, None, NEW, NEVER))
    for ids, finished in HFEngine(model, 4).generate(prompts, None, NEW, end_id):
        assert end_id not in ids[:-1]
        assert finished == (ids[-1] == end_id)
        assert finished or len(ids) == NEW


def test_a_shared_context_is_computed_once_and_changes_nothing(model, prompts):
    context = prompts[-1] + prompts[-2]
    long = [context + prompt for prompt in prompts]
    engine = HFEngine(model, 4)
    lengths = []
    body = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        answers = engine.generate(long, None, NEW, NEVER)
    finally:
        body.remove()
    assert [ids for ids, _ in answers] == [alone(model, prompt, NEVER) for prompt in long]
    shared = [shape for shape in lengths if shape[1] >= len(context)]
    assert shared == [(1, shared[0][1])]  # once, for one row


def test_prompts_that_are_equal_keep_a_token_of_their_own(model, prompts):
    same = [prompts[-1]] * 3
    answers = HFEngine(model, 4).generate(same, None, NEW, NEVER)
    assert [ids for ids, _ in answers] == [alone(model, prompts[-1], NEVER)] * 3


def test_adapters_are_swapped_and_the_base_comes_back(model_folder, prompts, adapters):
    engine = HFEngine(load(model_folder), 4)
    base = engine.generate(prompts, None, NEW, NEVER)
    one = engine.generate(prompts, adapters[0], NEW, NEVER)
    two = engine.generate(prompts, adapters[1], NEW, NEVER)
    assert base != one != two != base
    assert engine.generate(prompts, None, NEW, NEVER) == base
    assert engine.generate(prompts, adapters[0], NEW, NEVER) == one
    alone_two = HFEngine(load(model_folder), 4).generate(prompts, adapters[1], NEW, NEVER)
    assert alone_two == two
    names = {name for name, _ in engine._base.named_parameters() if "lora_A" in name}
    assert len({name.split("lora_A.")[1].split(".")[0] for name in names}) == 1  # the others left the memory


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_acts_as_peft_says(model_folder, prompts, adapters):
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load(model_folder), str(adapters[0])).merge_and_unload()
    answers = HFEngine(load(model_folder), 3).generate(prompts, adapters[0], NEW, NEVER)
    assert [ids for ids, _ in answers] == [alone(merged, prompt, NEVER) for prompt in prompts]


class Cramped(HFEngine):
    """An engine whose device holds so many prompts and no more."""

    room = 2

    def _read(self, model, context, prompts, own):
        import torch

        if len(prompts) > self.room:
            raise torch.OutOfMemoryError(f"tried to allocate room for {len(prompts)}")
        return super()._read(model, context, prompts, own)


def test_out_of_memory_halves_the_batch_and_goes_on(model, prompts, capsys):
    engine = Cramped(model, 7)
    assert engine.generate(prompts, None, NEW, NEVER) == HFEngine(model, 7).generate(prompts, None, NEW, NEVER)
    assert engine.batches.size == 1  # 7, 3, 1
    assert "out of memory with 7 prompts in a batch; going on with 3" in capsys.readouterr().out


def test_out_of_memory_with_one_prompt_is_said(model, prompts):
    engine = Cramped(model, 2)
    engine.room = 0
    with pytest.raises(RunError, match=r"a single prompt; lower eval\.max_new_tokens"):
        engine.generate(prompts, None, NEW, NEVER)


def test_other_runtime_errors_are_not_taken_for_a_full_memory(model):
    with pytest.raises(IndexError):
        HFEngine(model, 2).generate([[10**6], [3]], None, NEW, NEVER)


def test_an_adapter_folder_without_weights_is_refused(model, prompts, tmp_path):
    with pytest.raises(RunError, match=r"no adapter_model\.safetensors"):
        HFEngine(model, 2).generate(prompts, tmp_path, NEW, NEVER)


def test_an_adapter_of_another_model_is_refused(model_folder, prompts, tmp_path):
    other = toys.tiny_qwen3(tmp_path / "other", hidden=48)
    write_adapter(tmp_path / "adapter", other, 0)
    with pytest.raises(RunError, match="does not fit the student's model"):
        HFEngine(load(model_folder), 2).generate(prompts, tmp_path / "adapter", NEW, NEVER)


LABELS = [[[5, 0], [6, 7, 8, 0], [5, 9, 0]], [[5, 0]], [[7, 8, 0], [7, 0]]]


def plain_logprob(model, prompt, label):
    """The label's log-probability from the plain forward pass of one unpadded row."""
    import torch

    with torch.inference_mode():
        rows = model(input_ids=torch.tensor([[*prompt, *label]])).logits[0].log_softmax(-1)
    return sum(float(rows[len(prompt) - 1 + t, token]) for t, token in enumerate(label))


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_labels_are_as_likely_as_the_plain_forward_says(model, prompts, batch_size):
    found = HFEngine(model, batch_size).label_logprobs(prompts[:3], LABELS, None)
    for prompt, labels, values in zip(prompts, LABELS, found, strict=False):
        assert values == pytest.approx([plain_logprob(model, prompt, label) for label in labels], abs=1e-4)
    assert len({round(value, 3) for values in found for value in values}) == 6


@pytest.mark.parametrize("family", [toys.tiny_gpt2, toys.tiny_gpt_neox, toys.tiny_llama])
def test_labels_are_weighed_by_every_family(family, prompts, tmp_path):
    model = load(family(tmp_path))
    found = HFEngine(model, 4).label_logprobs(prompts[:3], LABELS, None)
    for prompt, labels, values in zip(prompts, LABELS, found, strict=False):
        assert values == pytest.approx([plain_logprob(model, prompt, label) for label in labels], abs=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_labels_are_weighed_under_an_adapter(model_folder, prompts, adapters):
    from peft import PeftModel

    engine = HFEngine(load(model_folder), 4)
    base = engine.label_logprobs(prompts[:3], LABELS, None)
    merged = PeftModel.from_pretrained(load(model_folder), str(adapters[0])).merge_and_unload()
    adapted = engine.label_logprobs(prompts[:3], LABELS, adapters[0])
    for prompt, labels, values in zip(prompts, LABELS, adapted, strict=False):
        assert values == pytest.approx([plain_logprob(merged, prompt, label) for label in labels], abs=1e-3)
    assert engine.label_logprobs(prompts[:3], LABELS, None) == base != adapted


def decode_steps(model, run) -> list[int]:
    """The rows of every forward pass that reads one token a row."""
    steps = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: steps.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return [rows for rows, columns in steps if columns == 1]


def test_prompts_that_wait_take_the_places_of_rows_that_have_ended(model, prompts):
    """Fewer steps than where each batch runs until its last row has ended, and the same answers."""
    many = [prompt[: len(prompt) - cut] for cut in range(3) for prompt in prompts]
    end_id = frequent(HFEngine(model, 4).generate(many, None, NEW, NEVER))
    expected = [alone(model, prompt, end_id) for prompt in many]
    engine, found = HFEngine(model, 4), []
    together = decode_steps(model, lambda: found.extend(engine.generate(many, None, NEW, end_id)))
    assert [ids for ids, _ in found] == expected
    longest_first = sorted(many, key=len, reverse=True)
    batches = [longest_first[i : i + 4] for i in range(0, len(many), 4)]
    apart = decode_steps(model, lambda: [engine.generate(batch, None, NEW, end_id) for batch in batches])
    assert max(together) == max(apart) == 4
    assert len(together) < len(apart)


def test_rows_of_a_model_with_a_sliding_window_are_not_joined(prompts, tmp_path):
    """It measures its window in columns of the cache, so there a batch runs to its end before the next one starts."""
    layers = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    model = load(toys.tiny_qwen3(tmp_path, **layers))
    end_id = frequent(HFEngine(model, 4).generate(prompts, None, NEW, NEVER))
    context = prompts[-1][:20]
    long = [context + prompt for prompt in prompts]
    found = HFEngine(model, 3).generate(long, None, NEW, end_id)
    assert [ids for ids, _ in found] == [alone(model, prompt, end_id) for prompt in long]
    assert len({len(ids) for ids, _ in found}) > 1
