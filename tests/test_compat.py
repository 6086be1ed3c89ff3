"""The call conventions of nn.LSTM and of the dnc package, and weights by the names of tristandeleu/ntm-one-shot."""

import copy

import pytest
import torch
from test_tristandeleu import B, H, I, N, Plain, R, T, W
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from mann_kernels import MANN, compat
from mann_kernels.compat import DNC, LSTM, load_tristandeleu

SMALL = {"num_slots": 9, "slot_size": 4, "num_heads": 2}


def lstm(**options):
    torch.manual_seed(0)
    return LSTM(3, 6, **SMALL, **options)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"proj_size": 2}])
def test_shapes_are_those_of_an_lstm(options):
    ours, theirs = lstm(**options), torch.nn.LSTM(3, 6, **options)
    for shape in ((5, 4, 3), (5, 3)):
        (output, (h, c)), (want, (want_h, want_c)) = ours(torch.randn(shape)), theirs(torch.randn(shape))
        assert (output.shape, h.shape, c.shape[:-1]) == (want.shape, want_h.shape, want_c.shape[:-1])
    packed = pack_sequence([torch.randn(length, 3) for length in (2, 5, 3)], enforce_sorted=False)
    (output, (h, c)), (want, (want_h, _)) = ours(packed), theirs(packed)
    assert pad_packed_sequence(output)[0].shape == pad_packed_sequence(want)[0].shape
    assert torch.equal(output.sorted_indices, want.sorted_indices)
    assert (h.shape, c.shape[:2]) == (want_h.shape, want_h.shape[:2])


def test_two_halves_are_the_whole():
    layer = lstm()
    x = torch.randn(7, 4, 3)
    whole, (h, c) = layer(x)
    first, hx = layer(x[:4])
    second, (h2, c2) = layer(x[4:], hx)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close((h2, c2), (h, c))
    assert torch.equal(h2[0], second[-1]), "h_n is the last output"
    order = torch.tensor([2, 0, 3, 1])  # as a beam search does
    moved, _ = layer(x[4:, order], tuple(part[:, order].detach() for part in hx))
    torch.testing.assert_close(moved, second[:, order])
    _, hx = layer(x[:4, 1])
    again, _ = layer(x[4:, 1], hx)
    torch.testing.assert_close(again, second[:, 1])


def test_gradients_go_through_the_state():
    layer, x = lstm(), torch.randn(4, 2, 3, requires_grad=True)
    _, hx = layer(x)
    layer(torch.randn(3, 2, 3), hx)[0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_an_lstms_initial_state_starts_a_fresh_memory():
    layer, x = lstm(), torch.randn(4, 2, 3)
    zeros = torch.zeros(1, 2, 6)
    assert torch.equal(layer(x, (zeros, zeros))[0], layer(x)[0])
    assert not torch.equal(layer(x, (zeros + 1, zeros + 1))[0], layer(x)[0])


def test_a_training_loop_written_for_an_lstm():
    """Truncated backpropagation, a deep copy, a state_dict: what such loops do."""
    layer = lstm()
    optimizer, hx = torch.optim.Adam(layer.parameters()), None
    before = copy.deepcopy(layer.state_dict())
    for _ in range(3):
        output, hx = layer(torch.randn(4, 2, 3), hx)
        hx = tuple(part.detach() for part in hx)
        optimizer.zero_grad()
        output.square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    lstm().load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LSTM(3, 6, num_layers=2), ValueError, "num_layers: got 2, want 1"),
        (lambda: LSTM(3, 6, bidirectional=True), ValueError, "bidirectional: got True, want False"),
        (lambda: LSTM(3, 6, controller="feedforward"), ValueError, "controller: got 'feedforward', want 'lstm'"),
        (lambda: lstm()(torch.ones(2, 1, 3), torch.ones(1)), TypeError, "hx: got Tensor, want a pair"),
        (
            lambda: lstm()(torch.ones(2, 1, 3), (torch.ones(1, 1, 6), torch.ones(1, 1, 5))),
            ValueError,
            "hx: got c of shape",
        ),
        (lambda: DNC(3, 6, rnn_type="gru"), ValueError, "rnn_type: got 'gru', want 'lstm'"),
        (lambda: DNC(3, 6)(torch.ones(2, 3)), ValueError, r"input: got shape \[2, 3\], want \[B, T, I\]"),
        (lambda: DNC(3, 6)(torch.ones(1, 2, 3), torch.ones(1)), TypeError, "hx: got Tensor, want"),
        (
            lambda: DNC(3, 6)(torch.ones(1, 2, 3), (None, {}, None)),
            ValueError,
            "hx: got a memory without memory, read_w",
        ),
        (lambda: DNC(3, 6)(torch.ones(1, 2, 3), None, False, False), ValueError, "pass_through_memory: got False"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_call_of_dnc(batch_first):
    torch.manual_seed(0)
    layer = DNC(3, 6, nr_cells=9, read_heads=2, cell_size=4, batch_first=batch_first)
    x = torch.randn(5, 7, 3)
    x = x if batch_first else x.transpose(0, 1)
    steps = 1 if batch_first else 0
    output, state = layer(x, (None, None, None), reset_experience=True, pass_through_memory=True)
    controller_hidden, memory, read_vectors = state
    assert output.shape == x.shape
    assert [tuple(part.shape) for part in controller_hidden[0]] == [(1, 5, 6), (1, 5, 6)]
    assert {name: tuple(value.shape) for name, value in memory.items()} == {
        "memory": (5, 9, 4), "read_weights": (5, 2, 9), "usage_vector": (5, 9),
    }  # fmt: skip
    assert read_vectors.shape == (5, 8)

    first, rest = x.split([4, 3], steps)
    begun, state = layer(first)
    torch.testing.assert_close(torch.cat([begun, layer(rest, state)[0]], steps), output)
    hidden, memory, reads = state
    torch.testing.assert_close(
        layer(rest, (hidden, [memory], reads))[0], layer(rest, state)[0]
    )  # as version 2.0 has it
    emptied, _ = layer(rest, state, reset_experience=True)
    torch.testing.assert_close(emptied, layer(rest, (hidden, None, None))[0])
    assert not torch.allclose(emptied, layer(rest, state)[0])
    assert torch.equal(layer(x)[0], layer(x)[0]), "an episode starts the same each time"


def arrays_of(plain):
    """As that code has them: numpy arrays, its own order of the gates, a last dimension of 1 for sigma."""
    values = {name: value.detach() for name, value in plain.weights.items()}

    def gates(value):  # i, f, cell, o -> f, i, o, cell
        i, f, cell, o = value.split(H, -1)
        return torch.cat([f, i, o, cell], -1)

    arrays = {name: gates(values[name]) for name in ("W_xh", "W_rh", "W_hh", "b_h")}
    arrays |= {name: values[name] for name in ("W_key", "b_key", "W_add", "b_add")}
    arrays |= {"W_sigma": values["W_sigma"][..., None], "b_sigma": values["b_sigma"][:, None]}
    return {name: value.numpy() for name, value in arrays.items()}


def test_weights_of_tristandeleu():
    draw = torch.Generator().manual_seed(0)
    plain = Plain(draw)
    mann = MANN.tristandeleu(I, hidden_size=H, num_slots=N, slot_size=W, num_heads=R, dtype=torch.float64)
    classify = torch.nn.Linear(H + R * W, 5, dtype=torch.float64)
    arrays = arrays_of(plain)
    load_tristandeleu(mann, arrays)
    x = torch.randn(T, B, I, generator=draw, dtype=torch.float64)
    want = torch.stack([plain.episode(x[:, b])[0] for b in range(B)], dim=1)
    torch.testing.assert_close(mann(x)[0], want, rtol=1e-9, atol=1e-11)  # as tests/test_tristandeleu.py

    outer = {"W_o": torch.randn(H + R * W, 5).numpy(), "b_o": [1.0, 2, 3, 4, 5]}
    load_tristandeleu(mann, arrays | outer, classify)
    torch.testing.assert_close(classify.weight, torch.as_tensor(outer["W_o"]).t().double())
    assert classify.bias.tolist() == outer["b_o"]

    for change, message in (
        ({"W_hh": arrays["W_hh"][:-1]}, r"arrays\['W_hh'\]: got shape \[5, 24\], want \[6, 24\]"),
        ({"W_odd": arrays["W_hh"]}, r"not known \['W_odd'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tristandeleu(mann, arrays | change)
    with pytest.raises(ValueError, match=r"missing \['W_key'\]"):
        load_tristandeleu(mann, {name: value for name, value in arrays.items() if name != "W_key"})
    with pytest.raises(ValueError, match=r"want one made by MANN\.tristandeleu"):
        load_tristandeleu(MANN(I, hidden_size=H), arrays)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"proj_size": 2}])
def test_the_attributes_of_an_lstm(options):
    """What nn.LSTM says of itself, this says too; and what is called on one can be called."""
    theirs, ours = torch.nn.LSTM(3, 5, **options), compat.LSTM(3, 5, num_slots=7, **options)
    constants = {
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    }
    assert constants >= set(torch.nn.LSTM.__constants__)
    for name in constants:
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
    assert ours.flatten_parameters() is None
    assert [p for layer in ours.all_weights for p in layer] == list(ours.parameters())
    before = ours.mann.weight_ih.clone()
    ours.reset_parameters()
    assert not torch.equal(ours.mann.weight_ih, before)


def test_the_attributes_of_dnc():
    """Every argument of its constructor, and the sizes that it makes of them."""
    import inspect

    given = {"input_size": 3, "hidden_size": 5, "nr_cells": 7, "read_heads": 2, "cell_size": 4, "batch_first": False}
    ours = compat.DNC(**given)
    for name, parameter in inspect.signature(compat.DNC.__init__).parameters.items():
        if name not in ("self", "device", "options"):
            assert getattr(ours, name) == given.get(name, parameter.default), name
    assert (ours.w, ours.r, ours.read_vectors_size, ours.output_size) == (4, 2, 8, 5)
    assert (ours.nn_input_size, ours.nn_output_size) == (11, 13)


def test_the_first_line_says_that_it_is_no_dnc():
    assert compat.DNC.__doc__.startswith("Not a DNC, but a MANN")
