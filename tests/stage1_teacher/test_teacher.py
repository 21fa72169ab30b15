"""The causal teacher: a shared context changes the cost and nothing else."""

import pytest
import torch
import toys

from pipeline.errors import ModelError
from pipeline.models import ModelSource, check_head, load_causal_lm
from stage1_teacher.teacher import CausalTeacher, TeacherInput

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toys.tiny_qwen3(tmp_path_factory.mktemp("teacher"), vocab_size=320)


@pytest.fixture(scope="module")
def sequences():
    draw = torch.Generator().manual_seed(3)
    context = torch.randint(4, 320, (40,), generator=draw).tolist()
    inputs = []
    for own in (9, 14, 5):
        ids = context + torch.randint(4, 320, (own,), generator=draw).tolist()
        inputs.append(TeacherInput(ids, first_row=len(context) + 2))
    return context, inputs


def full_forward(model, item):
    """The wanted rows from one whole forward of one sequence, head in float32."""
    with torch.inference_mode():
        hidden = model.base_model(input_ids=torch.tensor([item.input_ids]), use_cache=False).last_hidden_state[0]
        rows = hidden[item.first_row : len(item.input_ids) - 1].float()
        return torch.nn.functional.linear(rows, model.get_output_embeddings().weight.float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_context_and_batching_equal_the_full_forward(folder, sequences, dtype):
    context, inputs = sequences
    model = load_causal_lm(ModelSource(str(folder), None), dtype, "none", CPU)
    teacher = CausalTeacher(model)
    expected = torch.cat([full_forward(model, item) for item in inputs])
    shared = torch.cat(list(teacher.answer_logits(inputs, context)))
    plain = torch.cat(list(teacher.answer_logits(inputs, [])))
    assert shared.dtype == torch.float32
    if dtype == "float32":
        torch.testing.assert_close(shared, expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(plain, expected, rtol=0, atol=2e-5)
    else:  # other batch shapes may round otherwise: one bfloat16 step of logits near 8
        torch.testing.assert_close(shared, expected, rtol=0, atol=0.1)


def test_one_sequence_over_its_context_is_the_full_forward(folder, sequences):
    context, inputs = sequences
    model = load_causal_lm(ModelSource(str(folder), None), "float32", "none", CPU)
    shared = torch.cat(list(CausalTeacher(model).answer_logits(inputs[:1], context)))
    torch.testing.assert_close(shared, full_forward(model, inputs[0]), rtol=0, atol=5e-6)  # bitwise on some processors


def test_the_context_is_read_once(folder, sequences):
    context, inputs = sequences
    model = load_causal_lm(ModelSource(str(folder), None), "float32", "none", CPU)
    teacher = CausalTeacher(model)
    tokens_read = []
    teacher.body.register_forward_pre_hook(
        lambda module, args, kwargs: tokens_read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for _ in range(3):
        list(teacher.answer_logits(inputs, context))
    assert tokens_read.count(len(context)) == 1
    assert tokens_read[1:] == [3 * 13] * 3  # three sequences of at most 14 own tokens, the last never read


def test_rows_come_in_chunks_and_the_head_sees_no_other(folder, sequences):
    context, inputs = sequences
    teacher = CausalTeacher(load_causal_lm(ModelSource(str(folder), None), "float32", "none", CPU))
    teacher.rows_per_chunk = 4
    chunks = list(teacher.answer_logits(inputs, context))
    assert [len(chunk) for chunk in chunks] == [4, 4, 4, 4, 3]
    assert sum(map(len, chunks)) == sum(item.rows for item in inputs)


def test_nf4_runs_on_this_machine_and_is_repeatable(tmp_path, sequences):
    context, inputs = sequences
    logits = []
    folder = toys.tiny_qwen3(tmp_path, hidden=64)  # bitsandbytes quantises in blocks of 64
    for _ in range(2):
        model = load_causal_lm(ModelSource(str(folder), None), "float32", "nf4", CPU)
        logits.append(torch.cat(list(CausalTeacher(model).answer_logits(inputs, context))))
    assert torch.equal(logits[0], logits[1])
    exact = load_causal_lm(ModelSource(str(folder), None), "float32", "none", CPU)
    difference = (logits[0] - torch.cat(list(CausalTeacher(exact).answer_logits(inputs, context)))).abs().max()
    assert difference > 0.01  # 4 bits are not 32


def test_a_family_that_rescales_its_logits_is_refused(folder):
    model = load_causal_lm(ModelSource(str(folder), None), "float32", "none", CPU)
    inner = model.lm_head.forward
    check_head(model)
    model.forward = _scaled(model.forward)
    with pytest.raises(ModelError, match="cannot be taken apart"):
        check_head(model)
    assert model.lm_head.forward == inner


def _scaled(forward):
    def scaled(**inputs):
        out = forward(**inputs)
        out.logits = out.logits * 1.5
        return out

    return scaled
