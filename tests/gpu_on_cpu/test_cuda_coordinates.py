"""The CUDA kernels that put coordinates through a network, on the CPU: every size of network, many steps, many tiles of a warp."""

import cuda_on_cpu
import pytest
import torch
from against_reference import class_of, compare, matches, quantities, run
from coordinates import far_from_edges

import mann_kernels

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing())),
]
OPS = ("generate_fast_weights", "summarize_gradients")
#: Hidden units: one; less than a part; what registers hold all sums of; apart in shared memory; not; the most.
HIDDEN = (1, 7, 20, 24, 33, 64)


@pytest.fixture(autouse=True)
def cuda():
    with cuda_on_cpu.cuda_on_cpu() as library:
        yield library


def inputs_of(op, seed, count, hidden, steps, dtype=torch.float64):
    """`count` coordinates (of each of `steps` gradients), rounded to dtype, and no choice near an edge."""
    inputs = class_of(op).inputs(seed, 1, 2 * count + 60, hidden, steps)
    inputs = inputs.to(dtype).to(torch.float64)
    grads = inputs["grads"].reshape(steps, -1) if op == "summarize_gradients" else inputs["grads"].flatten()
    inputs["grads"] = far_from_edges(grads, inputs, count)
    return inputs


@pytest.mark.parametrize("dtype", cuda_on_cpu.DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("op", OPS)
def test_every_network(op, hidden, dtype):
    for seed, (count, steps) in enumerate(((1, 1), (37, 5), (50, 9))):
        matches(op, inputs_of(op, seed, count, hidden, steps, dtype), dtype)


@pytest.mark.parametrize("op", OPS)
def test_less_shared_memory(op):
    """What compute capability 8.6 has, for the most hidden units."""
    with cuda_on_cpu.cuda_on_cpu(capability=86):
        matches(op, inputs_of(op, 8, 50, 64, 3, torch.float32), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_more_tiles_than_warps(op, dtype, monkeypatch):
    """By the letter of the tolerance rule; 132 multiprocessors have 12 warps each, or 8."""
    compare(op, inputs_of(op, 3, 30_000, 5, 2, dtype), dtype)


def test_states_of_many_steps(cuda):
    """They do not fit shared memory."""
    call = inputs_of("summarize_gradients", 4, 37, 20, 17)
    with cuda_on_cpu.recorded(cuda) as launches:
        run(mann_kernels.summarize_gradients, call.to(torch.float32))
    assert all("MANN_STATES_IN_SHARED=0" in launch.options for launch in launches)
    matches("summarize_gradients", call, torch.float32)


@pytest.mark.parametrize("hidden", [6, 33])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op, hidden):
    """The kernels' own source in float64."""
    call = inputs_of(op, 5, 3, hidden, 3).with_grad()
    names = [name for name, value in call.items() if isinstance(value, torch.Tensor)]

    def function(*values):
        return getattr(mann_kernels, op)(**call | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, [call[name] for name in names], atol=1e-6, fast_mode=hidden > 6)


@pytest.mark.parametrize("hidden", [20, 33])
@pytest.mark.parametrize("op", OPS)
def test_any_schedule(op, hidden, cuda):
    """Whichever thread comes first: the same bits."""
    call = inputs_of(op, 6, 50, hidden, 3).to(torch.float32)
    first = quantities(getattr(mann_kernels, op), call)
    for seed in range(1, 8):
        cuda.mann_cuda_on_cpu_seed(seed)
        again = quantities(getattr(mann_kernels, op), call)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("op", OPS)
def test_launches_that_start_early(op, cuda):
    """Before the launch ahead has written anything: nothing is read that it makes."""
    call = inputs_of(op, 7, 50, 20, 3).to(torch.float32)
    assert cuda_on_cpu.same_when_early(cuda, lambda: quantities(getattr(mann_kernels, op), call))


@pytest.mark.parametrize("op", OPS)
def test_no_coordinates(op):
    """The weights' gradients are zero."""
    compare(op, class_of(op).inputs(0, 0, 5, 20, 3), torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", OPS)
def test_what_is_not_finite_stays_where_it_is(op, value):
    """NaN reaches the fast weight of its coordinate and no other. An infinite gradient saturates the gates of d."""
    call = inputs_of(op, 7, 50, 20, 3)
    call["grads"][..., 21] = value
    found = getattr(mann_kernels, op)(**call.to(torch.float32))
    finite = found.isfinite()
    assert finite[..., [i for i in range(50) if i != 21]].all()
    assert finite[..., 21].all() == (op == "summarize_gradients" and value == float("inf"))


@pytest.mark.parametrize("op", OPS)
def test_too_many_hidden_units(op):
    with pytest.raises(RuntimeError, match="at most 64 hidden units"):
        getattr(mann_kernels, op)(**class_of(op).inputs(0, 1, 3, 65, 2).to(torch.float32))
