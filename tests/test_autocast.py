"""Inside torch.autocast: which type each operator computes in, and that training goes on as without."""

import pytest
import torch
from against_reference import class_of, on_gpu, run

import mann_kernels
from mann_kernels import MANN, MetaNet, _backend

LOW = ("augmented_linear", "augmented_conv2d")
PLACES = [
    ("cpu", torch.bfloat16),
    ("cpu", torch.float16),
    on_gpu("cuda", torch.bfloat16),
    on_gpu("cuda", torch.float16),
]


def drawn(op):
    tests = class_of(op)
    return tests.inputs(1, 3, 7, 5, 2, **tests.options[0])


def rounded(inputs, dtype):
    """The numbers of these inputs that `dtype` has, in float32."""
    return inputs.to(dtype).to(torch.float32)


@pytest.mark.filterwarnings("ignore:.*plain PyTorch")
@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("op", _backend.OPS)
def test_the_type_an_operator_computes_in(op, device, dtype):
    """The same bits as the call without autocast whose tensors have that type, gradients included."""
    function, tests = getattr(mann_kernels, op), class_of(op)
    for options in tests.options:
        inputs = rounded(tests.inputs(1, 3, 7, 5, 2, **options), dtype).on(device)

        def in_autocast(**given):
            with torch.autocast(device, dtype):
                return function(**given)

        if (
            op == "mann_sequence"
        ):  # x enters through a product in the low type: here exact, as all of it is in that type
            inputs["weight_ih"], inputs["x"] = inputs["weight_ih"] * 0, inputs["x"] * 0
        wanted = dtype if op in LOW else torch.float32
        outputs, grads = run(in_autocast, inputs)
        same, same_grads = run(function, inputs.to(wanted))
        for a, b in zip(outputs, same, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        for name, grad in grads.items():
            assert grad.dtype == torch.float32
            if op != "mann_sequence":
                assert torch.equal(grad, same_grads[name].float()), name


@pytest.mark.parametrize("op", _backend.OPS)
def test_tensors_of_the_low_type_are_welcome(op):
    """What a linear layer under autocast hands on need not be cast by the user."""
    inputs = drawn(op).to(torch.float32)
    name = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.is_floating_point()][-1]
    inputs[name] = inputs[name].bfloat16()
    with pytest.raises(TypeError, match="dtype"):
        getattr(mann_kernels, op)(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        getattr(mann_kernels, op)(**inputs)


def test_float64_stays():
    inputs = drawn("mann_sequence")
    want = run(mann_kernels.mann_sequence, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(mann_kernels.mann_sequence, inputs)
    assert all(torch.equal(a, b) for a, b in zip(want[0], got[0], strict=True))
    assert all(torch.equal(want[1][name], got[1][name]) for name in want[1])


def test_the_products_of_mann_sequence_are_in_the_low_type():
    """The input projection rounds to bfloat16, and so do the weight gradients; what the loop computes does not."""
    inputs = drawn("mann_sequence").to(torch.float32)

    def in_autocast(**given):
        with torch.autocast("cpu", torch.bfloat16):
            return mann_kernels.mann_sequence(**given)

    outputs, grads = run(in_autocast, inputs)
    exact, exact_grads = run(mann_kernels.mann_sequence, inputs)
    error = (outputs[0] - exact[0]).abs().max() / exact[0].abs().max()
    assert 1e-5 < error < 0.02
    for name in ("weight_ih", "weight_hh", "weight_head", "x"):
        assert torch.equal(grads[name], grads[name].bfloat16().float()), f"gradient of {name}: not a bfloat16 product"
        error = (grads[name] - exact_grads[name]).norm() / exact_grads[name].norm()
        assert error < 0.05, name
    assert not torch.equal(grads["memory"], grads["memory"].bfloat16().float())


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("op", ["mann_sequence", "lrua_step", "content_address", "augmented_linear"])
def test_a_backward_pass_inside_autocast_is_the_same(op, create_graph):
    inputs = drawn(op).to(torch.float32)

    def grads(within):
        given = inputs.with_grad()
        leaves = [v for v in given.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        with torch.autocast("cpu", torch.bfloat16):
            out = getattr(mann_kernels, op)(**given)
            loss = (out[0] if isinstance(out, tuple) else out).float().square().sum()
            if within:
                return torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)
        return torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)

    for a, b in zip(grads(True), grads(False), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_addressing_is_in_float32_in_every_layer(controller, backend):
    mann = MANN(6, hidden_size=8, num_slots=9, slot_size=4, num_heads=2, controller=controller)
    with torch.autocast("cpu", torch.bfloat16), mann_kernels.backend(backend):
        output, state = mann(torch.randn(5, 3, 6))
        again, _ = mann(torch.randn(5, 3, 6), state)
    assert {field.dtype for field in state if field is not None} == {torch.float32}
    (output.float().sum() + again.float().sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in mann.parameters())
    assert (state.read_weights.sum(-1) - 1).abs().max() < 1e-6  # of bfloat16 numbers they would add up to 1 +- 0.01


@pytest.mark.parametrize("second_order", [False, True])
def test_metanet(second_order):
    torch.manual_seed(0)
    metanet = MetaNet.omniglot(3, filters=8, second_order=second_order)
    x, y, query = torch.rand(3, 1, 28, 28), torch.arange(3), torch.rand(6, 1, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        logits = metanet(x, y, query)
        loss = torch.nn.functional.cross_entropy(logits, y.repeat(2))
    loss.backward()
    exact = torch.nn.functional.cross_entropy(metanet(x, y, query), y.repeat(2))
    assert abs(loss - exact) < 0.05
    used = [p for p in metanet.parameters() if p.grad is not None]
    assert len(used) > 10
    assert all(p.grad.isfinite().all() for p in used)


def recall_loss(dtype, scaler=None, updates=250):
    """Mean loss of the last 50 updates: name the symbol that was shown first, after five others."""
    torch.manual_seed(0)
    mann = MANN(4, hidden_size=24, num_slots=10, slot_size=6, num_heads=1)
    classify = torch.nn.Linear(24 + 6, 4)
    parameters = [*mann.parameters(), *classify.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(updates):
        symbols = torch.randint(4, (6, 16), generator=generator)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            output, _ = mann(torch.nn.functional.one_hot(symbols, 4).float())
            loss = torch.nn.functional.cross_entropy(classify(output[-1]).float(), symbols[0])
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    return losses


def test_training_in_bfloat16_reaches_the_loss_of_float32():
    exact, low = recall_loss(None), recall_loss(torch.bfloat16)
    assert exact[0] > 1.2
    assert sum(exact[-50:]) / 50 < 0.3, "the task was not learned: nothing is compared"
    assert sum(low[-50:]) / 50 < sum(exact[-50:]) / 50 + 0.1


def test_a_gradient_scaler_skips_what_overflows_and_trains():
    """From a scale so large that float16 products overflow, the scaler comes down and training goes on."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    losses = recall_loss(torch.float16, scaler, updates=150)
    assert scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-20:]) < sum(losses[:20]) * 0.8
