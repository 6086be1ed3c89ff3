"""Bits that do not depend on the number of threads, at sizes where the batch really is split among them."""

import pytest
import torch
from against_reference import class_of, compare, run

import mann_kernels
from mann_kernels import _backend

#: The kernels stay on one thread below 2^17 multiply-adds; lrua_write_weights has B*N*R of them. B is odd, so parts are uneven.
B, N, W, R = 67, 300, 5, 7


def inputs_of(op, dtype):
    tests = class_of(op)
    return tests.inputs(1, B, N, W, R, **tests.options[-1]).to(dtype)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [op for op in _backend.OPS if op != "mann_sequence"])
def test_any_number_of_threads_gives_the_same_bits(op, dtype, set_threads):
    inputs, found = inputs_of(op, dtype), []
    for threads in (1, 2, 3):
        set_threads(threads)
        outputs, grads = run(getattr(mann_kernels, op), inputs)
        found.append([*outputs, *grads.values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_mann_sequence_repeats_at_any_number_of_threads(threads, set_threads):
    """The matrix products may round otherwise with other parts of the batch, but not from run to run."""
    set_threads(threads)
    inputs, found = inputs_of("mann_sequence", torch.float32), []
    for _ in range(3):
        outputs, grads = run(mann_kernels.mann_sequence, inputs)
        found.append([*outputs, *grads.values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    compare("mann_sequence", inputs, torch.float32)
