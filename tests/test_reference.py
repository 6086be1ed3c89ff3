"""The reference against numbers worked out by hand, and the checks against results that are wrong on purpose."""

import math

import pytest
import torch
from against_reference import OnePercentOff, class_of, compare, outputs_of

import mann_kernels
from mann_kernels import _backend, reference
from mann_kernels.reference.generate_fast_weights import preprocess_gradients
from mann_kernels.testing import assert_accurate


def tensor(*values):
    """A batch of one."""
    return torch.tensor([values], dtype=torch.float64)


def equal(actual, expected):
    # eps inside the root moves a cosine of these sizes by less than 1e-6
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_content_address_by_hand():
    """Cosines 1, 0 and 0 (an all-zero row): a softmax of ratio e to 1, with strength log 2 of ratio 2 to 1."""
    memory, key = tensor([1.0, 0.0], [0.0, 1.0], [0.0, 0.0]), tensor([3.0, 0.0])
    equal(reference.content_address(memory, key), tensor([math.e, 1.0, 1.0]) / (math.e + 2))
    equal(reference.content_address(memory, key, tensor(math.log(2))), tensor([0.5, 0.25, 0.25]))


def test_lrua_write_weights_by_hand():
    """Slots 1 and 3 are least used, and tied; a gate of 0 is half and half."""
    usage, gate = tensor(0.3, 0.1, 0.2, 0.1), tensor(0.0, 0.0)
    read_weights = tensor([1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0])
    own, slots = reference.lrua_write_weights(usage, read_weights, gate)
    shared, _ = reference.lrua_write_weights(usage, read_weights, gate, lru="shared")
    assert slots.tolist() == [[1, 3]]
    equal(own, tensor([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]))
    equal(shared, tensor([0.5, 0.5, 0.0, 0.5], [0.0, 0.5, 0.5, 0.5]))


def test_memory_update_by_hand():
    memory = tensor([1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0])
    weights = tensor([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5])
    arguments = memory, weights, tensor([10.0, 0.0], [0.0, 10.0]), torch.tensor([[1, 3]])
    equal(reference.memory_update(*arguments), tensor([6.0, 2.0], [5.0, 0.0], [5.0, 11.0], [7.0, 13.0]))
    every = reference.memory_update(*arguments, erase="all")
    equal(every, tensor([6.0, 2.0], [5.0, 0.0], [5.0, 11.0], [0.0, 5.0]))


#: Of two slots of width 1, slot 1 is least used: erased, and written at half strength; positive rows all have cosine 1.
STATE = {"memory": tensor([2.0], [4.0]), "usage": tensor(1.0, 0.0), "read_weights": tensor([1.0, 0.0])}


def test_lrua_step_by_hand():
    reads, memory, usage, read_weights = reference.lrua_step(**STATE, key=tensor([3.0]), gate=tensor(0.0))
    equal(memory, tensor([3.5], [1.5]))
    equal(read_weights, tensor([0.5, 0.5]))
    equal(reads, tensor([2.5]))
    equal(usage, tensor(1.99, 1.0))


@pytest.mark.parametrize("lengths", [None, [2], [5], [1], [0], [-1]])
def test_lrua_sequence_by_hand(lengths):
    key, gate = torch.stack([tensor([3.0]), tensor([2.0])]), torch.stack([tensor(0.0)] * 2)
    lengths = None if lengths is None else torch.tensor(lengths)
    reads, memory, usage, _ = reference.lrua_sequence(**STATE, key=key, gate=gate, lengths=lengths)
    steps = 2 if lengths is None else lengths.clamp(0, 2).item()
    equal(reads, torch.stack([tensor([r if t < steps else 0.0]) for t, r in enumerate([2.5, 2.75])]))
    equal(memory, (tensor([2.0], [4.0]), tensor([3.5], [1.5]), tensor([4.0], [1.5]))[steps])
    equal(usage, (tensor(1.0, 0.0), tensor(1.99, 1.0), tensor(2.7201, 2.24))[steps])


def test_mann_sequence_without_reads_is_nn_lstm():
    """With no weight on the reads the controller is an LSTM, and the memory is driven by the heads of its h."""
    inputs = class_of("mann_sequence").inputs(1, 3, 7, 5, 2)
    hidden, size, heads, width = 9, 3, 2, 5
    inputs["weight_hh"][:, hidden:] = 0
    lstm = torch.nn.LSTM(size, hidden, dtype=torch.float64)
    weights = (inputs["weight_ih"], inputs["weight_hh"][:, :hidden], inputs["bias"], torch.zeros_like(inputs["bias"]))
    with torch.no_grad():
        for parameter, weight in zip(lstm.parameters(), weights, strict=True):
            parameter.copy_(weight)
    want, (h, c) = lstm(inputs["x"], (inputs["h"][None], inputs["c"][None]))
    output, *state = reference.mann_sequence(**inputs)
    torch.testing.assert_close(output[..., :hidden], want)
    torch.testing.assert_close(state[0], h[0])
    torch.testing.assert_close(state[1], c[0])
    head = want @ inputs["weight_head"].mT + inputs["bias_head"]
    key, gate = torch.tanh(head[..., : heads * width]).reshape(-1, 3, heads, width), head[..., heads * width :]
    memory = (inputs[name] for name in ("memory", "usage", "read_weights"))
    reads, *after = reference.lrua_sequence(*memory, key, gate)
    torch.testing.assert_close(output[..., hidden:], reads.flatten(-2))
    for a, b in zip(state[3:], after, strict=True):
        torch.testing.assert_close(a, b)


def test_generate_fast_weights_by_hand():
    """One unit a layer. Features (-1/2, 1) and (-1/2, -1) above e^-7, (-1, 1/2) below, (0, 1) at one."""
    grads = tensor(math.exp(-3.5), -math.exp(-3.5), math.exp(-7) / 2, 1.0)
    one = torch.ones(1, dtype=torch.float64)
    weights = tensor(1.0, 1.0), 0.5 * one, tensor(2.0), -one, tensor(-3.0), 4 * one
    # max(x + y + 1/2, 0), then max(2 x - 1, 0), then 4 - 3 x
    want = torch.tensor([[4 - 3.0, 4.0, 4.0, 4 - 3 * 2.0]], dtype=torch.float64)
    torch.testing.assert_close(reference.generate_fast_weights(grads, *weights), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4])
def test_summarize_gradients_is_nn_lstm(steps):
    """The coordinates are the batch of an nn.LSTM with a linear layer on its last hidden state."""
    inputs = class_of("summarize_gradients").inputs(1, 3, 7, 5, steps)
    lstm = torch.nn.LSTM(2, 5, dtype=torch.float64)
    bias = inputs["bias"]
    with torch.no_grad():
        for parameter, weight in zip(
            lstm.parameters(), (inputs["weight_ih"], inputs["weight_hh"], bias, torch.zeros_like(bias)), strict=True
        ):
            parameter.copy_(weight)
    features = preprocess_gradients(inputs["grads"], 7.0).flatten(1, 2)
    want = torch.nn.functional.linear(lstm(features)[0][-1], inputs["weight_out"], inputs["bias_out"])
    torch.testing.assert_close(reference.summarize_gradients(**inputs), want.view(3, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", _backend.OPS)
def test_the_checks_can_fail(op, dtype):
    """1 % on any one gradient or output is an error, and it is named."""
    function, tests = getattr(mann_kernels, op), class_of(op)
    inputs = tests.inputs(1, 3, 7, 5, 2, **tests.options[-1])
    compare(op, inputs, dtype)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "usage":
            with pytest.raises(AssertionError, match=f"gradient of {name}:"):
                compare(
                    op,
                    inputs,
                    dtype,
                    lambda name=name, **call: function(**{**call, name: OnePercentOff.apply(call[name])}),
                )

    def off(**call):
        first, *rest = outputs_of(function, call)
        return (first * 1.01, *rest)

    with pytest.raises(AssertionError, match="output 0:"):
        compare(op, inputs, dtype, off)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1.5])
def test_one_wrong_element_is_seen(wrong):
    exact = torch.ones(4, dtype=torch.float64)
    actual = exact.float()
    assert_accurate(actual, exact.float(), exact)
    actual[2] = wrong
    with pytest.raises(AssertionError, match="result: error"):
        assert_accurate(actual, exact.float(), exact)
    if not math.isfinite(wrong):  # and a NaN or infinity that is missing
        with pytest.raises(AssertionError, match="result: error"):
            assert_accurate(exact.float(), actual, actual.double())
