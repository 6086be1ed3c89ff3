"""The CUDA kernels on the CPU, from their own source, against the reference: every option and gradient, many schedules."""

import cuda_on_cpu
import pytest
import torch
from against_reference import class_of, compare, matches, quantities, some_of, tie, zero_rows

import mann_kernels

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing())),
]

#: (B, N, W, R): odd, no multiple of a tile of examples; more slots than threads of a warp; the least there is; more than one tile.
SIZES = ((3, 7, 5, 2), (1, 150, 20, 6), (1, 1, 1, 1), (9, 5, 3, 1))
OPS = (
    "content_address", "lrua_step", "lrua_sequence", "mann_sequence", "augmented_linear", "augmented_conv2d",
    "generate_fast_weights", "summarize_gradients",
)  # fmt: skip
SEEDS = range(20)


@pytest.fixture(autouse=True)
def cuda():
    with cuda_on_cpu.cuda_on_cpu() as library:
        yield library


def inputs_of(op, seed, size, **options):
    tests = class_of(op)
    if op.endswith("sequence"):
        options.setdefault("T", 3)
    return tests.inputs(seed, *size, **(dict(tests.options[0]) | options))


def test_all_of_them_are_here(cuda):
    """Every kernel, forward and backward."""
    beside = {"generate_fast_weights_sides"}
    assert cuda_on_cpu.kernels() == beside | {name for op in OPS for name in (op, f"{op}_backward")}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.long)], ids=str
)
@pytest.mark.parametrize("op", OPS)
def test_matches_reference(op, dtype, request):
    for seed, size, options in some_of(class_of(op).options, SIZES, dtype, request):
        matches(op, inputs_of(op, seed, size, **options), dtype)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("op", OPS)
def test_any_schedule(op, seed, cuda):
    """Whichever thread comes first: right, and the same bits."""
    call = inputs_of(op, 1, SIZES[0], **class_of(op).options[-1]).to(torch.float32)
    first = quantities(getattr(mann_kernels, op), call)
    cuda.mann_cuda_on_cpu_seed(seed)
    again = quantities(getattr(mann_kernels, op), call)
    assert all(torch.equal(first[name], again[name]) for name in first)
    matches(op, call.to(torch.float64), torch.float32)


@pytest.mark.parametrize("op", OPS[4:])  # those of the memory have their forms tried in files of their own
def test_gradcheck(op):
    """The kernels' own source in float64."""
    assert torch.autograd.gradcheck(*class_of(op)._scalar("cpu"), atol=1e-6)


@pytest.mark.parametrize("change", [tie, zero_rows])
@pytest.mark.parametrize("op", OPS)
def test_ties_and_zero_rows(op, change):
    call = inputs_of(op, 2, (2, 9, 4, 3), **({"T": 1} if op.endswith("sequence") else {}))
    change(call)
    matches(op, call, torch.float64)


@pytest.mark.parametrize("slots", [4000, 6000])
@pytest.mark.parametrize("op", ["content_address", "lrua_step"])
def test_more_than_shared_memory_has_room_for(op, slots):
    """For the memory (256,000 bytes and more); for the numbers per slot of the backward pass too (312,000)."""
    matches(op, inputs_of(op, 3, (1, slots, 16, 1)), torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_empty_batch(op):
    compare(op, inputs_of(op, 0, (0, 5, 3, 2)), torch.float32)


@pytest.mark.parametrize("every", [1, 3, 256])
def test_segments_and_restarts(every, monkeypatch):
    import importlib

    monkeypatch.setattr(importlib.import_module("mann_kernels.ops.mann_sequence"), "CHECKPOINT_EVERY", every)
    compare("mann_sequence", inputs_of("mann_sequence", 2, (2, 12, 6, 2), T=10, lengths=True), torch.float32)
    compare("mann_sequence", inputs_of("mann_sequence", 2, (2, 12, 6, 2), T=0), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_paper_size(dtype):
    """Eight blocks, or four, with all of the recurrent weights in shared memory."""
    inputs = class_of("mann_sequence").inputs(49, 8, 128, 40, 4, T=2, H=200)
    matches("mann_sequence", inputs, dtype)


@pytest.mark.parametrize("op", OPS)
def test_the_kernel_is_what_runs(op):
    """And nothing falls back where it cannot."""
    with pytest.raises(RuntimeError, match=f"cannot run {op}: no CUDA kernel"):
        getattr(mann_kernels, op)(**class_of(op).small.to(torch.float16))
