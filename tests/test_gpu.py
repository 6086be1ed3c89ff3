"""What a GPU adds: streams, graphs, launches, sizes. The same bodies run on the CPU, where a replay is the call itself."""

import contextlib

import pytest
import torch
from against_reference import DEVICES, class_of, matches, on_gpu, run

import mann_kernels
from bench import devices, harness
from bench.mann import SHAPES, Shape
from bench.operators import operators
from mann_kernels import _backend

#: (B, N, W, R): as many slots as there may be, and rows and heads as wide; each beside odd sizes.
LARGE = ((1, 65_536, 20, 2), (1, 65_537, 3, 3), (2, 40, 512, 16), (1, 67, 513, 17))
SEQUENCES = ("lrua_sequence", "mann_sequence")


def inputs_of(op, seed, size, **options):
    tests = class_of(op)
    return tests.inputs(seed, *size, **(dict(tests.options[0]) | options))


def few_steps(op):
    return {"T": 2} if op in SEQUENCES else {}


def replays_of(device, make):
    """What make() returns, on a GPU as graphs."""
    return devices.Cuda().graphs(make) if device == "cuda" else make()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", [op for op, bench in operators().items() if bench.suite == "mann"])
def test_large_sizes(op, device):
    for seed, size in enumerate(LARGE):
        matches(op, inputs_of(op, seed, size, **few_steps(op)).on(device), torch.float32)


@pytest.mark.parametrize(("device", "elements"), [("cpu", 2**12), on_gpu("cuda", 2**31)])
def test_offsets_beyond_32_bits(device, elements):
    """The last example of a batch of more elements than an int32 counts, against the same example alone."""
    N, W = 64, 32
    B = elements // (N * W) + 2
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 8 * elements:
        pytest.skip("needs 16 GiB of free device memory")
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    memory, key, gate = normal(B, N, W), normal(B, 1, W), normal(B, 1)
    usage, weights = normal(B, N).abs(), normal(B, 1, N)
    with torch.no_grad():
        for function, arguments in (
            (mann_kernels.content_address, (memory, key)),
            (mann_kernels.lrua_step, (memory, usage, weights, key, gate)),
        ):
            whole, alone = (function(*some) for some in (arguments, [tensor[-1:] for tensor in arguments]))
            pairs = zip(whole, alone, strict=True) if isinstance(whole, tuple) else [(whole, alone)]
            assert all(torch.equal(a[-1:], b) for a, b in pairs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", SEQUENCES)
def test_a_replay_follows_its_inputs(op, device):
    """Forward and training step captured with some numbers, replayed with others."""
    first = inputs_of(op, 3, (3, 37, 5, 2), T=6, lengths=True).to(torch.float32).on(device)
    second = inputs_of(op, 3, (3, 37, 5, 2), T=6, lengths=True).to(torch.float32).on(device)
    for name, value in second.items():
        if isinstance(value, torch.Tensor):
            second[name] = value.flip(0) if name == "lengths" else value * 1.5
    kept = {}

    def training_step(leaves):
        outputs = getattr(mann_kernels, op)(**leaves)
        wanted = {k: v for k, v in leaves.items() if isinstance(v, torch.Tensor) and v.requires_grad}
        loss = sum(output.square().sum() for output in outputs if output.requires_grad)
        return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, list(wanted.values()))]

    def make():
        leaves = kept["leaves"] = first.with_grad()

        def forward():
            with torch.no_grad():
                kept["forward"] = getattr(mann_kernels, op)(**leaves)

        def train():
            kept["train"] = training_step(leaves)

        return forward, train

    forward, train = replays_of(device, make)
    with torch.no_grad():
        for name, leaf in kept["leaves"].items():
            if isinstance(leaf, torch.Tensor):
                leaf.copy_(second[name])
    forward()
    train()
    want = training_step(second.with_grad())
    for got in (kept["forward"], kept["train"]):
        for a, b in zip(got, want, strict=False):
            torch.testing.assert_close(a, b)
    assert len(kept["train"]) == len(want)


@pytest.mark.parametrize("device", ["cpu", on_gpu("cuda")])
def test_a_replay_of_metanet_follows_its_inputs(device):
    """The whole update, forward and backward, captured with one task and replayed with another."""
    torch.manual_seed(0)
    metanet = mann_kernels.MetaNet.omniglot(3, filters=4).to(device)
    labels, tasks = torch.arange(3, device=device), torch.rand(2, 3 + 5, 1, 28, 28).to(device)
    images, kept = tasks[0].clone(), {}

    def update():
        logits = metanet(images[:3], labels, images[3:])
        return logits.detach(), *torch.autograd.grad(logits.square().sum(), metanet.base_learner.parameters())

    def make():
        return (lambda: kept.update(got=update()),)

    (replay,) = replays_of(device, make)
    images.copy_(tasks[1])
    replay()
    for got, want in zip(kept["got"], update(), strict=True):
        torch.testing.assert_close(got, want)
    images.copy_(tasks[0])
    assert not torch.allclose(update()[0], kept["got"][0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", _backend.OPS)
def test_follows_the_current_stream(op, device):
    """Inputs that arrive late on another stream: a kernel launched anywhere else would read what was there before."""
    late = inputs_of(op, 1, (3, 37, 5, 2)).to(torch.float32).on(device)
    want, _ = run(getattr(mann_kernels, op), late)
    now = type(late)({k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v for k, v in late.items()})
    ballast = torch.ones(4096 if device == "cuda" else 8, 4096 if device == "cuda" else 8, device=device)
    stream = torch.cuda.Stream() if device == "cuda" else None
    if stream is not None:
        torch.cuda.synchronize()
    with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
        for _ in range(20):
            ballast = ballast @ ballast * 1e-4
        for name, value in now.items():
            if isinstance(value, torch.Tensor):
                value.copy_(late[name])
        got, _ = run(getattr(mann_kernels, op), now)
    if stream is not None:
        stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("device", ["cpu", on_gpu("cuda:1")])
@pytest.mark.parametrize("op", _backend.OPS)
def test_another_device(op, device):
    """Tensors on a device that is not the current one."""
    if device != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    matches(op, inputs_of(op, 1, (3, 37, 5, 2)).on(device), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", _backend.OPS)
def test_nothing_waits_for_the_device(op, device):
    """A training step only launches: torch raises where the host would wait."""
    bench = operators()[op]
    work = harness.Work(bench, bench.inputs(bench.verified[0], 0), torch.float32, device)
    work.train(bench.kernel())
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        work.train(bench.kernel())
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def launched(device, function):
    """What function() returns, and the names of the kernels it launches; on the CPU, of the operators it calls."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    kind = torch.autograd.DeviceType.CPU
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        kind = torch.autograd.DeviceType.CUDA
    with torch.profiler.profile(activities=activities) as profile:
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
    return result, [
        event.name for event in profile.events() if event.device_type == kind and not event.is_user_annotation
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("T", "B"), [(50, 1), (50, 16), (7, 16)])
def test_launches_of_an_episode(device, T, B, monkeypatch):
    """At the paper's sizes so many kernels each way, whatever the length, ours among them."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # a kernel for each empty tensor
    shape = SHAPES["paper"].at(T)
    drawn = operators()["mann_sequence"].inputs(Shape(shape.T, B, shape.I, shape.H, shape.N, shape.W, shape.R), 0)
    work = harness.Work(operators()["mann_sequence"], drawn, torch.float32, device)
    work.train(mann_kernels.mann_sequence)
    outputs, forward = launched(device, lambda: mann_kernels.mann_sequence(*work.tensors.values()))
    _, backward = launched(device, lambda: torch.autograd.grad(outputs[0], work.leaves, work.gradient))
    for names in (forward, backward):
        assert any("mann_sequence" in name for name in names), names
        if device == "cuda":
            # cuBLAS may do a product in parts, in kernels of their own: that is the product's, and the library's choice
            split = [name for name in names if "splitk" in name.lower().replace("_", "")]
            # the backward pass of the CUDA kernel takes the heads' product again
            assert len(names) - len(split) <= (2 if names is forward else 9), "\n".join(names)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", SEQUENCES)
def test_a_training_step_needs_less_memory_than_the_loop(op, device):
    place = devices.Cuda() if device == "cuda" else devices.Cpu()
    shape, bench = SHAPES["wide"], operators()[op]
    work = harness.Work(bench, bench.inputs(Shape(24, 2, 8, 16, shape.N, shape.W, shape.R), 0), torch.float32, device)
    kinds = (getattr(mann_kernels, op), bench.eager)
    ours, eager = (harness.peak_mb(work, function, place) for function in kinds)
    assert ours * 3 < eager


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
def test_a_layer_trains(controller, device):
    """Steps of Adam with lengths and a carried state, next to the same steps with the reference."""
    op, losses = {"lstm": "mann_sequence", "feedforward": "lrua_sequence"}[controller], {}
    for backend in ("reference", _backend.default(op, device, torch.float32)[0]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 12, "num_slots": 20, "slot_size": 6, "num_heads": 2}
        mann = mann_kernels.MANN(5, **sizes, controller=controller).to(device)
        x, target = torch.randn(7, 3, 5).to(device), torch.randn(7, 3, 24).to(device) * 0.3
        optimizer = torch.optim.Adam(mann.parameters(), 0.02)
        losses[backend], state = [], None
        for _ in range(8):
            with mann_kernels.backend(backend):
                output, state = mann(x, state, lengths=[7, 4, 6])
                loss = (output - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            state = state.detach()
            losses[backend].append(loss.item())
    reference, kernels = losses.values()
    assert kernels == pytest.approx(reference, rel=1e-3)
    assert kernels[-1] < kernels[0]
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 4, 6]), enforce_sorted=False)
    unpacked, _ = torch.nn.utils.rnn.pad_packed_sequence(mann(packed)[0])
    torch.testing.assert_close(unpacked, mann(x, lengths=[7, 4, 6])[0])
