"""The transforms of torch.func: each is right, in plain PyTorch, or says why not."""

import pytest
import torch
from against_reference import class_of, on_gpu
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils._pytree import tree_leaves

import mann_kernels
from mann_kernels import MANN, MetaNet, _backend

pytestmark = pytest.mark.filterwarnings("ignore:.*plain PyTorch")
DEVICES = ["cpu", on_gpu("cuda")]


def mann(seed=0, **options):
    torch.manual_seed(seed)
    return MANN(6, hidden_size=7, num_slots=9, slot_size=4, num_heads=2, dtype=torch.float64, **options)


def by_position(function, names, rest):
    """`function` of its tensors, in the order of `names`."""
    return lambda *tensors: function(**dict(zip(names, tensors, strict=True)), **rest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", _backend.OPS)
def test_vmap(op, device):
    """Every operator over a batch of all its tensors, as one call for each."""
    tests, function = class_of(op), getattr(mann_kernels, op)
    for options in tests.options:
        first = tests.inputs(1, 2, 5, 3, 2, **options).on(device)
        names = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
        moved = {name: first[name] * 0.9 for name in names if first[name].is_floating_point()}
        calls = [first, {**first, **moved}]
        rest = {name: value for name, value in first.items() if name not in names}
        stacked = [torch.stack([inputs[name] for inputs in calls]) for name in names]
        batched = vmap(by_position(function, names, rest))(*stacked)
        for i, inputs in enumerate(calls):
            single = function(**inputs)
            if not isinstance(single, tuple):
                single, batched = (single,), batched if isinstance(batched, tuple) else (batched,)
            for a, b in zip(batched, single, strict=True):
                assert torch.allclose(a[i].double(), b.double(), rtol=1e-9, atol=1e-11), options


@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
def test_a_batch_of_models(controller):
    models = [mann(seed, controller=controller) for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    skeleton, x = mann(controller=controller).to("meta"), torch.randn(5, 3, 6, dtype=torch.float64)

    def run(parameters, buffers):
        output, state = functional_call(skeleton, (parameters, buffers), (x,))
        return output, state.memory

    output, memory = vmap(run)(parameters, buffers)
    for i, model in enumerate(models):
        want, want_state = model(x)
        assert torch.allclose(output[i], want, atol=1e-12)
        assert torch.allclose(memory[i], want_state.memory, atol=1e-12)


def test_functional_call_runs_the_kernels():
    one, other, x = mann(0), mann(1), torch.randn(5, 3, 6, dtype=torch.float64)
    with mann_kernels.backend("cpp"):
        output, _ = functional_call(one, dict(other.named_parameters()), (x,))
    assert torch.equal(output, other(x)[0])


def test_grad_and_gradients_per_example():
    model, x = mann(), torch.randn(5, 3, 6, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(model, parameters, (x,))[0].square().sum()

    parameters = dict(model.named_parameters())
    want = torch.autograd.grad(model(x)[0].square().sum(), list(parameters.values()))
    per_example = vmap(grad(lambda p, example: loss(p, example.unsqueeze(1))), (None, 1))(parameters, x)
    for got, each, exact in zip(grad(loss)(parameters, x).values(), per_example.values(), want, strict=True):
        assert torch.allclose(got, exact, atol=1e-11)
        assert torch.allclose(each.sum(0), exact, atol=1e-11)


def test_jacobians():
    inputs = class_of("lrua_step").inputs(1, 1, 5, 3, 2)

    def function(key):
        return mann_kernels.lrua_step(**{**inputs, "key": key})[0]

    key = inputs["key"]
    want = torch.autograd.functional.jacobian(function, key)
    assert want.abs().max() > 0.01
    assert torch.allclose(jacrev(function)(key), want, atol=1e-12)
    assert torch.allclose(jacfwd(function)(key), want, atol=1e-12)
    assert torch.allclose(jvp(function, (key,), (key,))[1], (want * key).sum((-3, -2, -1)), atol=1e-12)


def test_vmap_over_tasks_of_metanet():
    torch.manual_seed(0)
    metanet = MetaNet.omniglot(3, filters=4, dtype=torch.float64)
    x, query = torch.rand(2, 3, 1, 28, 28).double(), torch.rand(2, 4, 1, 28, 28).double()
    state = metanet.adapt(x, torch.arange(3).expand(2, 3))
    logits = vmap(lambda q, *fields: metanet.predict(q, type(state)(*fields)))(query, *state)
    assert torch.allclose(logits, metanet.predict(query, state), atol=1e-10)


def test_it_is_said_that_no_kernel_runs():
    _backend._warn_once.cache_clear()
    x = torch.randn(2, 1, 5, 3), torch.randn(2, 1, 2, 3)
    with pytest.warns(UserWarning, match=r"runs as plain PyTorch, slowly: the kernels have no rules for .* torch.func"):
        vmap(mann_kernels.content_address)(*x)
    with (
        mann_kernels.backend("cpp"),
        pytest.raises(RuntimeError, match="cannot run content_address: the kernels have no"),
    ):
        vmap(mann_kernels.content_address)(*x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", _backend.OPS)
def test_batched_backward_passes(op, device):
    """Transforms that torch.autograd makes of its own: vectorised Jacobians and Hessians, gradients in batches, dual numbers."""
    tests, function = class_of(op), getattr(mann_kernels, op)
    size = {"size": (3, 3)} if op == "augmented_conv2d" else {}
    for options in tests.options:
        inputs = tests.inputs(1, 2, 4, 2, 1, **options, **size, **({"T": 2} if op.endswith("sequence") else {})).on(
            device
        )
        names = [n for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and n != "usage"]
        rest = {name: value for name, value in inputs.items() if name not in names}
        tensors = tuple(inputs[name] for name in names)

        def scalar(*tensors, names=names, rest=rest):
            outputs = by_position(function, names, rest)(*tensors)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return torch.stack([output.sin().sum() for output in outputs if output.requires_grad])

        def compare(run, tensors=tensors, options=options):
            got = run(tensors)
            with mann_kernels.backend("reference"):
                want = run(tensors)
            for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
                assert (a is None) == (b is None)
                assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-10), options

        def batched(tensors, scalar=scalar):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            outputs = scalar(*leaves)
            batch = torch.randn(3, len(outputs), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
                device
            )
            return torch.autograd.grad(outputs, leaves, batch, is_grads_batched=True, allow_unused=True)

        def pushed(tensors, names=names, rest=rest):
            with forward_ad.dual_level():
                dual = [forward_ad.make_dual(tensor.detach(), torch.ones_like(tensor)) for tensor in tensors]
                outputs = tree_leaves(by_position(function, names, rest)(*dual))
                return [forward_ad.unpack_dual(output).tangent for output in outputs]

        compare(lambda tensors, scalar=scalar: jacobian(scalar, tensors, vectorize=True))
        compare(lambda tensors, scalar=scalar: jacobian(scalar, tensors, vectorize=True, create_graph=True))
        compare(batched)
        compare(pushed)


def test_vectorized_hessian():
    model, x = mann(), torch.randn(2, 2, 6, dtype=torch.float64)

    def loss(x):
        return model(x)[0].square().sum()

    assert torch.allclose(hessian(loss, x, vectorize=True), hessian(loss, x), atol=1e-10)
    assert torch.allclose(
        hessian(loss, x, vectorize=True, outer_jacobian_strategy="forward-mode"), hessian(loss, x), atol=1e-10
    )


def test_a_kernel_that_was_asked_for_does_not_run_on_dual_numbers():
    x = torch.randn(2, 2, 6, dtype=torch.float64)
    with forward_ad.dual_level(), mann_kernels.backend("cpp"), pytest.raises(RuntimeError, match="cannot run mann_seq"):
        mann()(forward_ad.make_dual(x, x))
