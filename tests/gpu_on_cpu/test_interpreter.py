"""The Triton kernels on the CPU, under Triton's interpreter, against the reference: source semantics, every option and gradient.

Run with TRITON_INTERPRET=1, which Triton reads when a kernel is defined, so in a process of its own.
"""

import pytest
import torch
from against_reference import class_of, compare, lay_out_backwards, matches, saturate, some_of, tie, zero_rows

import mann_kernels
from mann_kernels import _backend

#: (B, N, W, R): odd, more heads than 16 needs padding for, several tiles of slots, the least there is.
SIZES = ((2, 7, 5, 2), (1, 150, 20, 6), (1, 1, 1, 1))
DTYPES = (
    torch.float32,
    torch.bfloat16,
    *(pytest.param(d, marks=pytest.mark.long) for d in (torch.float64, torch.float16)),
)


@pytest.fixture(autouse=True)
def _triton():
    with mann_kernels.backend("triton"):
        yield


def inputs_of(op, seed, size, **options):
    tests = class_of(op)
    if op.endswith("sequence"):
        options.setdefault("T", 3)
    return tests.inputs(seed, *size, **(dict(tests.options[0]) | options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", _backend.OPS)
def test_matches_reference(op, dtype, request):
    for seed, size, options in some_of(class_of(op).options, SIZES, dtype, request):
        matches(op, inputs_of(op, seed, size, **options), dtype)


@pytest.mark.parametrize("op", _backend.OPS)
def test_ties_and_zero_rows(op):
    for change in (tie, zero_rows):
        inputs = inputs_of(op, 2, (2, 9, 4, 3), **({"T": 1} if op.endswith("sequence") else {}))
        change(inputs)
        matches(op, inputs, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("slots", "heads"), [(1, 1), (7, 7), (64, 2), (128, 16), (200, 3), (9000, 16)])
def test_the_choice_of_slots(slots, heads, dtype):
    """Counted where heads are many and slots few, else by rounds, over one tile or several; NaN last, ties to the lowest index."""
    generator = torch.Generator().manual_seed(slots)
    special = torch.tensor([0.0, -0.0, 1.0, -1.5, float("inf"), -float("inf"), float("nan")], dtype=dtype)
    drawn = torch.rand(slots, generator=generator, dtype=torch.float64).to(dtype) + 2
    tied = special[torch.randint(len(special), (slots,), generator=generator)]
    usage = torch.stack([tied, torch.full_like(drawn, float("nan")), drawn, torch.cat([special, drawn])[:slots]])
    zeros = torch.zeros(len(usage), heads, slots, dtype=dtype)
    _, least_used = mann_kernels.lrua_write_weights(usage, zeros, zeros[..., 0])
    assert torch.equal(least_used, usage.sort(stable=True).indices[:, :heads].int())


@pytest.mark.parametrize("op", _backend.OPS)
def test_non_contiguous_inputs(op):
    inputs = inputs_of(op, 1, (3, 7, 5, 2), **class_of(op).options[-1])
    lay_out_backwards(inputs)
    matches(op, inputs, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", ["mann_sequence", "summarize_gradients"])
def test_saturated_gates(op, dtype):
    inputs = inputs_of(op, 2, (2, 9, 4, 3))
    saturate(inputs)
    matches(op, inputs, dtype)


@pytest.mark.parametrize("op", _backend.OPS)
def test_empty_batch(op):
    compare(op, inputs_of(op, 0, (0, 5, 3, 2)), torch.float32)


@pytest.mark.parametrize("op", ["lrua_sequence", "mann_sequence"])
@pytest.mark.parametrize("every", [1, 3, 256])
def test_segments_and_restarts(op, every, monkeypatch):
    import importlib

    monkeypatch.setattr(importlib.import_module(f"mann_kernels.ops.{op}"), "CHECKPOINT_EVERY", every)
    compare(op, inputs_of(op, 2, (2, 12, 6, 2), T=10, lengths=True), torch.float32)
    compare(op, inputs_of(op, 2, (2, 12, 6, 2), T=0), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["content_address", "memory_update", "lrua_step", "lrua_sequence", "mann_sequence"])
def test_memory_of_many_tiles(op, dtype, monkeypatch):
    """What does not fit one tile goes another way through the kernels."""
    monkeypatch.setattr("mann_kernels.triton._launch.TILE", 128)
    options = class_of(op).options
    for each in options[dtype != torch.float32 :: len(options) - 1]:
        matches(op, inputs_of(op, 1, (2, 37, 5, 3), **each), dtype)


@pytest.mark.parametrize("size", [(1, 65_536, 3, 2), (1, 40, 512, 16)])
@pytest.mark.parametrize("op", ["content_address", "lrua_step"])
def test_large(op, size):
    """As many slots and as wide as promised, on the tiles a GPU would use."""
    compare(op, inputs_of(op, 1, size, **class_of(op).options[-1]), torch.float32)


@pytest.mark.parametrize(("op", "most"), [("generate_fast_weights", 64), ("summarize_gradients", 61)])
def test_hidden_units_of_the_generators(op, most):
    """What is the most there is runs, and one more is a clear error; the blocks go around the programs of backward."""
    compare(op, inputs_of(op, 1, (1, 21, most, 2)), torch.float32)
    with pytest.raises(ValueError, match=f"at most {most} hidden units"):
        compare(op, inputs_of(op, 1, (1, 3, most + 1, 2)), torch.float32)


@pytest.mark.parametrize("op", ["generate_fast_weights", "summarize_gradients"])
def test_programs_take_several_blocks(op, monkeypatch):
    monkeypatch.setattr("mann_kernels.triton._coordinates.PROGRAMS", 3)
    matches(op, inputs_of(op, 1, (5, 33, 6, 3)), torch.float32)
