"""The CUDA kernels of the augmented layers on the CPU: several of every tile, groups and chunks of examples, what they launch."""

import cuda_on_cpu
import pytest
import torch
from against_reference import class_of, matches, quantities, run
from mutant import cuda_mutant

import mann_kernels
from bench.operators import operators

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing())),
]
OPS = ("augmented_linear", "augmented_conv2d")
SHAPES = {case.name: (op, case.shape) for op in OPS for case in operators()[op].cases(False)}


@pytest.fixture(autouse=True)
def cuda():
    with cuda_on_cpu.cuda_on_cpu() as library:
        yield library


def conv(seed, L, C, O, S, **options):  # noqa: E741
    return class_of("augmented_conv2d").inputs(seed, L, C, O, S, **options)


def linear(seed, L, I, O, S, **options):  # noqa: E741
    return class_of("augmented_linear").inputs(seed, L, I, O, S, **options)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize(
    ("size", "kernel", "padding"), [((38, 21), 3, 1), ((19, 34), 2, 3), ((3, 33), 1, 0), ((17, 18), 5, 0)]
)
def test_tiles_of_an_image(size, kernel, padding, pool):
    matches(
        "augmented_conv2d", conv(1, 2, 3, 9, 2, size=size, kernel=kernel, padding=padding, pool=pool), torch.float32
    )


@pytest.mark.parametrize("size", [1, 2, 4, 7, 14])
def test_channels_in_chunks_and_slices(size):
    """At the paper's number of filters, and beyond what the examples of other tests have."""
    matches("augmented_conv2d", conv(2, 2, 40, 64, 5, size=(size, size), pool=True), torch.float32)


@pytest.mark.parametrize("size", [(2, 2), (9, 11), (14, 14)])
@pytest.mark.parametrize("kernel", [2, 3])
def test_tf32_where_it_is_allowed(size, kernel):
    """Without pooling, where another rounding may choose another pixel."""
    call = conv(8, 2, 21, 19, 3, size=size, kernel=kernel, activation="gelu")
    exact = quantities(mann_kernels.reference.augmented_conv2d, call)
    single = quantities(mann_kernels.augmented_conv2d, call.to(torch.float32))
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        tf32 = quantities(mann_kernels.augmented_conv2d, call.to(torch.float32))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert not torch.equal(tf32["output 0"], single["output 0"])
    for name, value in exact.items():
        assert (tf32[name] - value).abs().max() <= 2e-3 * value.abs().max(), name


@pytest.mark.parametrize(
    ("sizes", "options", "dtype"),
    [
        ((1, 33, 12, 2), {"size": (16, 16), "kernel": 5, "padding": 2}, torch.float32),
        ((2, 3, 4, 2), {"size": (12, 10), "kernel": 11, "padding": 5}, torch.float32),
        ((1, 9, 130, 2), {"size": (16, 16)}, torch.bfloat16),
        ((1, 40, 64, 2), {"size": (16, 16), "kernel": 1, "padding": 0}, torch.bfloat16),
    ],
)
def test_less_shared_memory(sizes, options, dtype):
    """What compute capability 8.6 has: smaller tiles, fewer slices, sums in several turns."""
    call = conv(9, *sizes, **options)
    with cuda_on_cpu.cuda_on_cpu(capability=86) as cuda:
        matches("augmented_conv2d", call, dtype)
        with cuda_on_cpu.recorded(cuda) as launches:
            run(mann_kernels.augmented_conv2d, call.to(dtype))
    assert all(f"MANN_TENSOR={int(dtype == torch.bfloat16)}" in launch.options for launch in launches)


def test_one_channel():
    """The gradient of its weights is shared out over the pixels."""
    for kind in ("mixture", "task shared"):
        matches("augmented_conv2d", conv(3, 2, 1, 20, 3, size=(28, 28), pool=True, kind=kind), torch.float32)


@pytest.mark.parametrize("kind", ["task mixture", "per task", "per example", "shared"])
def test_groups_of_examples(kind):
    """So many that a block takes several for the gradient of the weights, and a warp more rows than it has lanes for."""
    matches("augmented_conv2d", conv(4, 850, 2, 3, 11, size=(3, 2), kind=kind), torch.float32)


@pytest.mark.parametrize("kind", ["task mixture", pytest.param("per example", marks=pytest.mark.long)])
def test_chunks_of_tasks(kind, cuda):
    """So many weights that not all tasks are taken at once."""
    examples = 58 if kind == "per example" else 29
    call = conv(5, examples, 40, 300, 1, size=(1, 1), kernel=3, kind=kind, bias=False)
    call["x"], call["weight"], call["fast"] = (
        torch.cat([call[name]] * 2, dim) for name, dim in (("x", -3), ("weight", -3), ("fast", -3))
    )
    with cuda_on_cpu.recorded(cuda) as launches:
        run(mann_kernels.augmented_conv2d, call.to(torch.float32))
    assert len(launches) == 2 * 2 + 2 * 2 + 1
    matches("augmented_conv2d", call, torch.float32)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((140, 7, 5, 2), {"kind": "per example"}),
        ((600, 3, 5, 9), {"kind": "task mixture", "activation": "gelu"}),
        ((40, 130, 135, 7), {}),
        ((70, 65, 200, 3), {"kind": "per task"}),
    ],
)
def test_tiles_of_a_product(sizes, options):
    """Small tiles and large ones, several of each."""
    matches("augmented_linear", linear(6, *sizes, **options), torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_any_schedule(op, cuda):
    """Whichever thread comes first: the same bits."""
    call = (conv if op == "augmented_conv2d" else linear)(7, 5, 9, 12, 3).to(torch.float32)
    first = quantities(getattr(mann_kernels, op), call)
    for seed in range(1, 6):
        cuda.mann_cuda_on_cpu_seed(seed)
        again = quantities(getattr(mann_kernels, op), call)
        assert all(torch.equal(first[name], again[name]) for name in first)


EARLY = {
    "conv": (conv, (2, 5, 9, 3), {"size": (9, 6), "pool": True}),
    "conv, a weight of a task": (conv, (2, 5, 9, 1), {"kind": "per task", "activation": "gelu"}),
    "linear": (linear, (40, 130, 20, 3), {}),
}


@pytest.mark.parametrize("name", EARLY)
def test_launches_that_start_early(name, cuda):
    """Before the launch ahead has written anything: nothing is read that it makes."""
    make, sizes, options = EARLY[name]
    op = "augmented_conv2d" if make is conv else "augmented_linear"
    call = make(7, *sizes, **options).to(torch.float32)
    assert cuda_on_cpu.same_when_early(cuda, lambda: quantities(getattr(mann_kernels, op), call))


#: By what is read too early: of which layer, the file, what is right there, what is wrong.
TOO_EARLY = {
    "weights": (
        "augmented_conv2d",
        "augmented_conv2d_tile.h",
        "        if (chunk == 0) wait_for_previous(); // it laid out the weights\n"
        "        load.weights(stage(chunk) + D::kChunk * D::kPlane, chunk * D::kChunk, left(chunk));\n",
        "        load.weights(stage(chunk) + D::kChunk * D::kPlane, chunk * D::kChunk, left(chunk));\n"
        "        if (chunk == 0) wait_for_previous();\n",
    ),
    "gradients of the examples' weights": (
        "augmented_conv2d",
        "augmented_conv2d_backward.cu",
        "wait_for_previous(); // it made the gradients",
        "//",
    ),
    "parts of the sums": (
        "augmented_conv2d",
        "augmented_conv2d_backward.cu",
        "    wait_for_previous();\n    sum_parts(args);\n",
        "    sum_parts(args);\n    wait_for_previous();\n",
    ),
    "parts of dmix": ("augmented_linear", "augmented_linear_backward.cu", "    wait_for_previous();\n", ""),
}


@pytest.mark.parametrize("what", TOO_EARLY)
def test_reading_too_early_is_seen(what, cuda, tmp_path):
    op, *change = TOO_EARLY[what]
    width = 15 + list(TOO_EARLY).index(what)  # of its own, so that nothing compiled before is taken for it
    call = (conv if op == "augmented_conv2d" else linear)(7, 2, 5, width, 3).to(torch.float32)
    wrong = cuda_on_cpu.kernels_from(cuda_mutant(tmp_path, *change), cuda, tmp_path)
    with wrong, cuda_on_cpu.early(cuda), pytest.raises((AssertionError, RuntimeError)) as seen:
        matches(op, call, torch.float32)
    assert seen.type is AssertionError or "never waits for the launch" in str(seen.value)


def launches_of(cuda, name):
    """What a training step at one of the paper's shapes launches."""
    op, shape = SHAPES[name]
    bench = operators()[op]
    inputs = {key.replace("hidden", "x"): value.float() for key, value in bench.inputs(shape, 0).items()}
    leaves = {key: value.requires_grad_(shape.C > 1 or key != "x") for key, value in inputs.items()}
    with cuda_on_cpu.recorded(cuda) as launches:
        getattr(mann_kernels, op)(**leaves, **bench.options).sum().backward()
    return launches


@pytest.mark.parametrize("name", SHAPES)
def test_launches(cuda, name):
    """Few, and none that leaves most of a large device idle for long."""
    launches = launches_of(cuda, name)
    assert len(launches) == (3 if name.startswith("fc") else 5)
    for launch in launches:
        blocks = eval(launch.blocks.replace("x", "*"))
        if launch.kernel.endswith(("conv2d", "_first")) or (launch.kernel.endswith("_second") and name != "conv 28"):
            assert blocks >= (50 if name == "conv 28" else 100), launch
        assert int(launch.shared_bytes) <= 112 * 1024, launch  # two to a multiprocessor
