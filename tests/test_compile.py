"""torch.compile and torch.export: no graph break, one graph for every length, and a file that runs in another process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from against_reference import on_gpu
from torch._dynamo.utils import counters

from mann_kernels import MANN, MANNCell, MetaNet

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.compiles
DEVICES = ["cpu", on_gpu("cuda")]
LAYERS = {
    "lstm": {},
    "feedforward": {"controller": "feedforward"},
    "every option": {"write": "add", "key_strength": True, "lru": "shared", "erase": "all", "batch_first": True},
}


def mann(**options):
    torch.manual_seed(0)
    return MANN(6, hidden_size=7, num_slots=9, slot_size=4, num_heads=2, **options)


def forget_graphs():
    torch._dynamo.reset()
    counters.clear()


def loss_and_grads(layer, *args):
    output, state = layer(*args)
    loss = output.square().sum() + state.memory.sum()
    return output, torch.autograd.grad(loss, list(layer.parameters()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_one_graph_for_every_length(options, device):
    """Two graphs for T in 7, 20, 50, 64, the first for T = 7 alone; marked as dynamic, one. The numbers are the eager ones."""
    layer = mann(**options).to(device)
    for dynamic, graphs in ((None, 2), (True, 1)):
        forget_graphs()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for T in (7, 20, 50, 64):
            x = torch.randn(T, 5, 6, device=device)
            x = x.transpose(0, 1) if options.get("batch_first") else x
            output, grads = loss_and_grads(compiled, x)
            want, want_grads = loss_and_grads(layer, x)
            assert torch.equal(output, want)
            assert all(map(torch.equal, grads, want_grads))
        assert counters["stats"]["unique_graphs"] == graphs


def test_one_graph_for_every_batch():
    forget_graphs()
    layer = mann()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for B in (3, 5, 8, 16):
        x = torch.randn(4, B, 6)
        assert torch.equal(compiled(x)[0], layer(x)[0])
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_no_graph_break(with_state, with_lengths):
    layer = mann()
    state = layer.initial_state(3) if with_state else None
    lengths = torch.tensor([5, 0, 3]) if with_lengths else None
    torch._dynamo.reset()
    explained = torch._dynamo.explain(layer)(torch.randn(5, 3, 6), state, lengths)
    assert (explained.graph_break_count, explained.graph_count) == (0, 1)


def test_no_graph_break_in_a_cell_or_metanet():
    torch.manual_seed(0)
    cell = MANNCell(6, hidden_size=7, num_slots=9, slot_size=4, num_heads=2)
    metanet = MetaNet.omniglot(3, filters=4)
    images = torch.rand(3, 1, 28, 28)
    state = metanet.adapt(images, torch.arange(3)).detach()
    for function, args in ((cell, (torch.randn(3, 6),)), (metanet.predict, (images, state))):
        torch._dynamo.reset()
        explained = torch._dynamo.explain(function)(*args)
        assert (explained.graph_break_count, explained.graph_count) == (0, 1)
        torch._dynamo.reset()
        got, want = torch.compile(function, fullgraph=True, backend="aot_eager")(*args), function(*args)
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("device", DEVICES)
def test_inductor_compiles_a_training_step(device):
    """The layer between others, under autocast, by the compiler that users have."""
    torch._dynamo.reset()
    layer, classify = mann().to(device), torch.nn.Linear(7 + 8, 3, device=device)
    x, y = torch.randn(5, 4, 6, device=device), torch.randint(3, (5, 4), device=device)

    def loss(x, y):
        with torch.autocast(device, torch.bfloat16):
            logits = classify(layer(torch.tanh(x))[0])
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    parameters = [*layer.parameters(), *classify.parameters()]
    want = torch.autograd.grad(loss(x, y), parameters)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, y), parameters)
    for a, b in zip(got, want, strict=True):  # both round to bfloat16, not in the same places
        assert (a - b).norm() < 0.05 * b.norm() + 1e-4


class Predict(torch.nn.Module):
    def __init__(self, metanet):
        super().__init__()
        self.metanet = metanet

    def forward(self, query_x, state):
        return self.metanet.predict(query_x, state)


def test_export_with_a_state_and_back(tmp_path):
    layer = mann()
    T, B = (torch.export.Dim(name, min=1, max=1000) for name in "TB")
    state = layer.initial_state(3)
    shapes = {"x": {0: T, 1: B}, "state": type(state)(*[{0: B}] * 6)}
    program = torch.export.export(layer, (torch.randn(7, 3, 6), state), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "mann.pt2")
    loaded = torch.export.load(tmp_path / "mann.pt2").module()
    x, (_, state) = torch.randn(20, 5, 6), layer(torch.randn(2, 5, 6))
    output, after = loaded(x, state)
    want, want_after = layer(x, state)
    assert isinstance(after, type(state))
    assert torch.equal(output, want)
    assert all(map(torch.equal, after, want_after))


def test_export_of_metanet():
    torch.manual_seed(0)
    metanet = MetaNet.omniglot(3, filters=4)
    state = metanet.adapt(torch.rand(3, 1, 28, 28), torch.arange(3)).detach()
    shapes = ({0: torch.export.Dim("L", min=2, max=1000)}, type(state)(*[None] * 3))
    program = torch.export.export(Predict(metanet), (torch.rand(4, 1, 28, 28), state), dynamic_shapes=shapes)
    query = torch.rand(9, 1, 28, 28)
    assert torch.equal(program.module()(query, state), metanet.predict(query, state))


FRESH = """
import sys, torch, mann_kernels
import torch._inductor.codecache  # the loader of torch 2.10 uses it without importing it
x, want = torch.load(sys.argv[2])
output, state = torch._inductor.aoti_load_package(sys.argv[1])(x)
assert torch.allclose(output, want, atol=1e-6), (output - want).abs().max()
print(type(state).__name__)
"""


def test_a_compiled_package_runs_in_a_fresh_process(tmp_path):
    layer, package = mann(), tmp_path / "mann.pt2"
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("T", min=1, max=1000), 1: torch.export.Dim("B", min=1, max=1000)},)
        program = torch.export.export(layer, (torch.randn(7, 3, 6),), dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        x = torch.randn(20, 5, 6)
        torch.save((x, layer(x)[0]), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, package, tmp_path / "expected.pt"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "MANNState", done.stderr
