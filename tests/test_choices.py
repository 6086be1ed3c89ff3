"""Checks that a recomputed pass keeps what the forward pass chose: slots, pixels, the side of a ReLU or a clamp.

The inputs are full of ties that rounding alone breaks: slots that nothing was written to, sums that cancel, pixels that are
alike, gradients at the ends of a clamp. Chosen anew by other arithmetic they would fall on the other side. Under
TRITON_INTERPRET=1 the Triton kernels are tried.
"""

import math
import os

import pytest
import torch
from against_reference import Inputs, class_of
from torch.utils.checkpoint import checkpoint

import mann_kernels
from mann_kernels import MANN, MetaNet, _backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: The kernels that run here; the reference never takes a choice again but is held to the same.
NAMES = ("triton",) if INTERPRETED else ("cpp", "reference")
CASES = 2 if INTERPRETED else 20  # the interpreter is slow
SLOTS = (9, 33) if INTERPRETED else (9, 129, 257)
#: Multiples of these cancel but for rounding.
TENTHS = torch.arange(-3, 4, dtype=torch.float64) / 10
OPS_WITH_CHOICES = [op for op in _backend.OPS if class_of(op).movable]


def pick(generator, shape, values):
    return values[torch.randint(len(values), shape, generator=generator)]


def tied(op, seed):
    """Inputs of one call, float64, drawn so that many choices are ties."""
    tests, generator = class_of(op), torch.Generator().manual_seed(seed)
    options = dict(tests.options[seed % len(tests.options)])
    if op.endswith("sequence"):
        options["T"] = 7
    # as many as a matrix product rounds by groups of its own choice: that breaks the ties
    N, W, R = (SLOTS[seed % len(SLOTS)], 40, 4) if op.startswith(("lrua", "mann")) else (24, 31, 2)
    inputs = tests.inputs(seed % 3, 2, N, W, R, **options)
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if name in (
            "memory",
            "usage",
            "read_weights",
        ):  # as an episode starts; every slot but the first is like the others
            inputs[name] = torch.full_like(value, 1e-6 if name == "memory" else 0.0)
            if name != "memory":
                inputs[name][..., 0] = 1
        elif name == "grads":
            edges = torch.tensor([0.0, 1.0, -1.0]) * math.exp(-options.get("p", 7.0)) - torch.finfo(torch.float32).eps
            inputs[name] = pick(generator, value.shape, torch.cat([edges.double(), edges.double() * 1.5, TENTHS]))
        elif op.startswith(("augmented", "generate")):
            inputs[name] = pick(generator, value.shape, TENTHS)
    return inputs


def loss_of(outputs, per_slot=True):
    """On every output; without per_slot one that slots which change places leave as it is, and so are finite differences."""
    generator, loss = torch.Generator().manual_seed(5), 0.0
    for output in outputs:
        weight = torch.randn(512, generator=generator, dtype=torch.float64).to(output.dtype)
        if not output.requires_grad:
            continue
        if per_slot:
            loss = loss + (output.square() * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()
        in_slots = output.shape[-1] in SLOTS  # sums over them stay when they change places
        loss = loss + (output.square().sum(-1) if in_slots else output.square() @ weight[: output.shape[-1]]).sum()
    return loss


def gradients(op, inputs, names, *, create_graph=False, per_slot=True):
    outputs = getattr(mann_kernels, op)(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = [inputs[name] for name in names]
    grads = torch.autograd.grad(loss_of(outputs, per_slot), tensors, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(tensors, grads, strict=True)]


def differentiable(inputs):
    return [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.requires_grad]


def assert_same(a, b, name, tolerance):
    assert (a - b).abs().max() <= tolerance * max(1e-3, a.abs().max()), f"{name}: {a} and {b}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPS_WITH_CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_with_a_graph_is_the_gradient(name, op, dtype):
    with mann_kernels.backend(name):
        for seed in range(CASES):
            inputs = tied(op, seed).to(dtype).with_grad()
            names = differentiable(inputs)
            plain, with_graph = (gradients(op, inputs, names, create_graph=graph) for graph in (False, True))
            for which, a, b in zip(names, plain, with_graph, strict=True):
                assert_same(a, b, f"seed {seed}, {which}", 1e-9 if dtype == torch.float64 else 1e-4)


def halves(op, inputs):
    """(inputs, what moves): an augmented layer has ties on one side while the other moves."""
    if not op.startswith("augmented"):
        return [(inputs, [name for name in class_of(op).movable if inputs.get(name) is not None])]
    found = []
    for names in (("weight", "bias"), ("fast", "mix")):
        drawn = Inputs(inputs)
        for n, name in enumerate(name for name in names if inputs.get(name) is not None):
            generator = torch.Generator().manual_seed(n)
            # away from all ties: in a pool too, the moving side decides then
            drawn[name] = torch.randn(inputs[name].shape, generator=generator, dtype=torch.float64)
        found.append((drawn, [name for name in names if inputs.get(name) is not None]))
    return found


@pytest.mark.parametrize("op", OPS_WITH_CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_finite_differences_of_the_first(name, op):
    step = 1e-6
    with mann_kernels.backend(name):
        for seed in range(CASES // 2):
            for inputs, moved in halves(op, tied(op, seed)):
                inputs = inputs.with_grad()
                per_example = ("memory", "read_weights")
                names = [which for which in differentiable(inputs) if which not in per_example]
                generator = torch.Generator().manual_seed(seed)
                along = {w: torch.randn(inputs[w].shape, generator=generator, dtype=torch.float64) for w in moved}
                first = gradients(op, inputs, names, create_graph=True, per_slot=False)
                v = [torch.randn(grad.shape, generator=generator, dtype=torch.float64) for grad in first]
                product = sum((grad * part).sum() for grad, part in zip(first, v, strict=True))
                second = torch.autograd.grad(product, [inputs[w] for w in moved], allow_unused=True)
                got = sum((grad * along[w]).sum() for w, grad in zip(moved, second, strict=True) if grad is not None)

                def at(distance, inputs=inputs, along=along, names=names, v=v):
                    near = {w: (inputs[w].detach() + distance * along[w]).requires_grad_() for w in along}
                    grads = gradients(op, Inputs({**inputs, **near}), names, per_slot=False)
                    return sum((grad * part).sum().item() for grad, part in zip(grads, v, strict=True))

                want = (at(step) - at(-step)) / (2 * step)
                assert float(got) == pytest.approx(want, rel=1e-5, abs=1e-5), f"seed {seed}"


@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_is_carried_on(name, controller):
    """Two calls, a loss on the output of the second and on the state between them, with and without a graph."""
    for seed, slots in enumerate(SLOTS):
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            torch.manual_seed(seed)
            layer = MANN(6, 12, slots, controller=controller).to(dtype)
            x = torch.randn(12, 3, 6).to(dtype)
            weight = torch.randn(3, slots, 40).to(dtype)

            def loss(layer=layer, x=x, weight=weight):
                _, state = layer(x[:8])
                return layer(x[8:], state)[0].square().sum() + (state.memory * weight).sum()

            with mann_kernels.backend(name):
                plain = torch.autograd.grad(loss(), list(layer.parameters()))
                with_graph = torch.autograd.grad(loss(), list(layer.parameters()), create_graph=True)
            for a, b in zip(plain, with_graph, strict=True):
                assert_same(a, b, f"{slots} slots", tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_recomputed(name):
    """torch.utils.checkpoint runs a pass again: on the implementation of the first time, or it is said."""
    torch.manual_seed(0)
    layer = MANN(4, 6, 33).double()
    x, weight = torch.randn(8, 2, 4).double(), torch.randn(2, 33, 40).double()

    def run(x):
        with mann_kernels.backend(name):
            output, state = layer(x)
        return output.square().sum() + (state.memory * weight).sum()

    want = torch.autograd.grad(run(x), list(layer.parameters()))
    got = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), list(layer.parameters()))
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not INTERPRETED, reason="two kernels run on one device under the interpreter alone")
def test_recomputed_by_another_kernel():
    layer, x = MANN(4, 6, 9, 3, 2), torch.randn(3, 2, 4)
    with mann_kernels.backend("cpp"):
        loss = checkpoint(lambda x: layer(x)[0].sum(), x, use_reentrant=False)
    with mann_kernels.backend("triton"), pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_metanet_on_images_that_are_alike(name):
    """Blank images: equal pixels in every pool, gradients of zero, ReLUs at zero."""
    torch.manual_seed(0)
    metanet = MetaNet.omniglot(3, filters=4, second_order=True, hidden_size=4).double()
    support, labels, query = torch.zeros(3, 1, 28, 28).double(), torch.arange(3), torch.rand(4, 1, 28, 28).double()
    support[0, :, 4:9] = 0.1

    def loss():
        return metanet(support, labels, query).logsumexp(-1).sum()

    with mann_kernels.backend(name):
        parameters = [p for n, p in metanet.named_parameters() if not n.startswith("embedding_head")]
        plain = torch.autograd.grad(loss(), parameters, allow_unused=True)
        with_graph = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
    for a, b in zip(plain, with_graph, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same(a, b, "metanet", 1e-9)
