import copy
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import mann_kernels
from mann_kernels import MANN, ContentAddressing, MANNCell, MANNState

SIZES = {"hidden_size": 10, "num_slots": 12, "slot_size": 5, "num_heads": 2}
VARIANTS = [
    {"controller": "lstm"},
    {"controller": "feedforward"},
    {"controller": "lstm", "write": "add", "key_strength": True, "lru": "shared", "erase": "all"},
    {"controller": "feedforward", "write": "add", "key_strength": True, "squash": "identity"},
]


@pytest.fixture(params=VARIANTS, ids=str)
def mann(request):
    torch.manual_seed(0)
    return MANN(6, **SIZES, **request.param, dtype=torch.float64)


@pytest.fixture
def x():
    return torch.randn(7, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same_state(a, b):
    for name, one, other in zip(MANNState._fields, a, b, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def grads(mann, output):
    return torch.autograd.grad(
        (output * torch.arange(output.numel()).reshape(output.shape).cos()).sum(), mann.parameters()
    )


def test_kernels_and_reference_agree(mann, x):
    output, state = mann(x)
    with mann_kernels.backend("reference"):
        want, want_state = mann(x)
        want_grads = grads(mann, want)
    torch.testing.assert_close(output, want)
    same_state(state, want_state)
    for a, b in zip(grads(mann, output), want_grads, strict=True):
        torch.testing.assert_close(a, b)
    assert output.shape == (7, 3, 20)


def test_state_carries_on(mann, x):
    whole, last = mann(x)
    first, state = mann(x[:3])
    second, state = mann(x[3:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    same_state(state, last)
    state = pickle.loads(pickle.dumps(state.detach()))
    assert not state.memory.requires_grad
    assert state.to(torch.float32).memory.dtype == torch.float32


def test_batch_first_and_unbatched(mann, x):
    output, state = mann(x)
    mann.batch_first = True
    torch.testing.assert_close(mann(x.transpose(0, 1))[0].transpose(0, 1), output)
    mann.batch_first = False
    alone, alone_state = mann(x[:, 1])
    torch.testing.assert_close(alone, output[:, 1])
    same_state(alone_state, state.map(lambda field: field[1]))


def test_padding_changes_nothing(mann, x):
    lengths = [7, 4, 0]
    padded = x.clone()
    padded[4:, 1] = float("nan")
    padded[:, 2] = float("inf")
    output, state = mann(padded, lengths=lengths)
    assert (output[4:, 1] == 0).all()
    assert (output[:, 2] == 0).all()
    for b, length in enumerate(lengths):
        alone, alone_state = mann(x[:length, b])
        torch.testing.assert_close(output[:length, b], alone)
        same_state(alone_state, state.map(lambda field, b=b: field[b]))
    assert all(grad.isfinite().all() for grad in grads(mann, output))


@pytest.mark.parametrize("lengths", [[3, 7, 5], [7, 5, 5]])
def test_packed_sequence(mann, x, lengths):
    ordered = lengths == sorted(lengths, reverse=True)
    packed, state = mann(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=ordered))
    output, found = pad_packed_sequence(packed)
    assert found.tolist() == lengths
    want, want_state = mann(x, lengths=lengths)
    torch.testing.assert_close(output, want)
    same_state(state, want_state)


def test_cell_is_one_step(mann, x):
    cell = MANNCell(6, **SIZES, controller=mann.controller, **mann.head_options, **mann.memory_options, dtype=x.dtype)
    cell.load_state_dict(mann.state_dict())
    state, outputs = None, []
    for step in x:
        output, state = cell(step, state)
        outputs.append(output)
    want, want_state = mann(x)
    torch.testing.assert_close(torch.stack(outputs), want)
    same_state(state, want_state)


def test_module_manners(mann, x):
    twin = copy.deepcopy(mann)
    twin.reset_parameters()
    twin.load_state_dict(mann.state_dict())
    assert torch.equal(twin(x)[0], mann(x)[0])
    assert "num_slots=12" in repr(mann)
    called = torch.func.functional_call(mann, dict(twin.named_parameters()), (x,))
    assert torch.equal(called[0], mann(x)[0])
    assert mann(x[:0])[0].shape == (0, 3, 20)
    assert mann(x[:, :0])[0].shape == (7, 0, 20)


@pytest.mark.compiles
def test_compiles_in_one_graph(mann, x):
    compiled = torch.compile(mann, fullgraph=True, backend="aot_eager")
    for a, b in zip(grads(mann, compiled(x)[0]), grads(mann, mann(x)[0]), strict=True):
        torch.testing.assert_close(a, b)


def test_key_strength_starts_at_one(x):
    torch.manual_seed(0)
    with_strength = MANN(6, **SIZES, key_strength=True, dtype=torch.float64)
    without = MANN(6, **SIZES, dtype=torch.float64)
    kept = {name: value[:12] if "head" in name else value for name, value in with_strength.state_dict().items()}
    without.load_state_dict(kept)
    torch.testing.assert_close(with_strength(x)[0], without(x)[0])


def test_presets():
    paper, other = MANN.santoro(405), MANN.tristandeleu(405)
    assert paper.memory_options["decay"] == 0.99
    assert paper.head_options["write"] == "key"
    # 679,729 of the whole model less its output layer: the count of the public code with 405 inputs
    assert sum(parameter.numel() for parameter in other.parameters()) == 679_729 - 1_805


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: m(x[..., :5]), ValueError, r"x: got shape \[7, 3, 5\], want \[T, B, I\]"),
        (lambda m, x: m(x, lengths=[8, 1, 1]), ValueError, r"lengths: got \[8, 1, 1\], want each in 0..T with T=7"),
        (lambda m, x: m(x, lengths=[1]), ValueError, "lengths: got torch.int64"),
        (lambda m, x: m(x, m.initial_state(2)), ValueError, r"state.memory: got shape \[2, 12, 5\], want \(3, 12, 5\)"),
        (lambda m, x: m(x, (1, 2)), TypeError, "state: got tuple, want a MANNState"),
        (lambda m, x: m(x.long()), TypeError, "x: got dtype torch.int64, want a floating-point dtype"),
        (lambda m, x: m(x.float()), TypeError, "got dtype torch.float64, want torch.float32"),
        (lambda m, x: m("x"), TypeError, "x: got str, want a torch.Tensor"),
        (lambda m, x: MANN(6, num_heads=9, num_slots=8), ValueError, "num_heads: got 9, want at most num_slots=8"),
        (lambda m, x: MANN(6, controller="gru"), ValueError, "controller: got 'gru', want one of"),
        (lambda m, x: MANN(0), ValueError, "input_size: got 0, want at least 1"),
    ],
)
def test_bad_input(call, error, message, x):
    with pytest.raises(error, match=message):
        call(MANN(6, **SIZES, dtype=torch.float64), x)


def test_content_addressing():
    layer = ContentAddressing(2, key_strength=True)
    memory, key = torch.randn(3, 7, 5), torch.randn(3, 2, 5)
    reads, weights = layer(memory, key)
    torch.testing.assert_close(weights, mann_kernels.content_address(memory, key))
    torch.testing.assert_close(reads, weights @ memory)
    reads.sum().backward()
    assert layer.beta.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="key: got shape"):
        layer(memory, key[:, :1])


@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_what_is_returned_may_be_written_to(controller, name):
    """Output and state in place, as with nn.LSTM: the gradients are those of the same operations out of place."""
    torch.manual_seed(0)
    for make in (MANN, MANNCell):
        layer = make(6, **SIZES, controller=controller, dtype=torch.float64)
        x = torch.randn(*((5, 3, 6) if make is MANN else (3, 6)), dtype=torch.float64)
        found = []
        for in_place in (True, False):
            with mann_kernels.backend(name):
                output, state = layer(x)
                fields = [output]
                if name != "reference":  # plain PyTorch keeps the last memory for its own backward pass
                    fields += [field for field in state if field is not None and field.requires_grad]
                if in_place:
                    for field in fields:
                        field.mul_(2).add_(1)
                else:
                    fields = [field * 2 + 1 for field in fields]
                loss = sum(field.square().sum() for field in fields)
                found.append(torch.autograd.grad(loss, list(layer.parameters())))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
