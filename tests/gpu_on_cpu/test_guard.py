"""The memory guard over the real kernels, and over kernels with one mistake planted in their source."""

import importlib
import sys

import pytest
import torch
from against_reference import class_of, run
from guard import GuardError, MemoryGuard
from mutant import mutant
from test_interpreter import inputs_of
from torch.utils._python_dispatch import TorchDispatchMode

import mann_kernels
from bench.harness import Work
from bench.mann import SHAPES
from bench.operators import operators
from mann_kernels import _backend, reference

SIZE = (2, 37, 5, 2)
#: Of a training step: forward, and backward, which for a layer are two, the gradient of x and that of the weights.
LAUNCHES = {"augmented_linear": 3, "augmented_conv2d": 3}


@pytest.mark.parametrize("tile", [128, 8192])  # of a memory
@pytest.mark.parametrize("op", _backend.OPS)
def test_every_access_is_sound(op, tile, monkeypatch, request):
    if tile == 128 and "memory" not in inputs_of(op, 1, SIZE):
        pytest.skip("has no memory")
    monkeypatch.setattr("mann_kernels.triton._launch.TILE", tile)
    options = class_of(op).options
    every = options if request.config.getoption("--long") else (options[0], options[-1])
    for each in every if tile == 8192 else options[-1:]:
        extra = {"T": 9} if op.endswith("sequence") and each is options[-1] else {}  # once past a restart
        with mann_kernels.backend("triton"), MemoryGuard() as guard:
            run(getattr(mann_kernels, op), inputs_of(op, 1, SIZE, **each, **extra).to(torch.float32))
        assert guard.launches == LAUNCHES.get(op, 2)


def test_a_step_reads_and_writes_memory_once():
    call = inputs_of("lrua_step", 1, SIZE).to(torch.float32)
    with mann_kernels.backend("triton"), torch.no_grad(), MemoryGuard() as guard:
        mann_kernels.lrua_step(**call)
    size = call["memory"].numel() * 4
    assert guard.loaded["memory_ptr"] == guard.stored["new_memory_ptr"] == size


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel on a GPU: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(result.alias_info is not None for result in func._schema.returns)
        self.count += not is_view and "empty" not in func.name()
        return func(*args, **(kwargs or {}))


def launches_of(function, work):
    """Forward and backward, of a training step."""
    with Launches() as forward:
        out = function(*work.tensors.values())[0]
    gradient = torch.ones_like(out)
    with Launches() as backward:
        out.backward(gradient)
    return forward.count, backward.count


def test_launches_of_an_episode():
    """At most 8 each way at the paper's sizes, whatever the length; the eager loop launches thousands."""
    bench = operators()["mann_sequence"]
    eager = launches_of(bench.eager, Work(bench, bench.inputs(SHAPES["single"], 0), torch.float32))
    short = Work(bench, bench.inputs(SHAPES["single"].at(4), 0), torch.float32)
    with mann_kernels.backend("triton"), MemoryGuard() as guard:
        ours = launches_of(mann_kernels.mann_sequence, short)
    print(f"launches forward and backward: {ours}, eager {eager}")
    assert guard.launches == 2  # one kernel of ours each way
    assert max(ours) <= 8
    assert sum(eager) > 5000


#: The file, what is right in it, and what is put in its place.
MUTATIONS = {
    "wrong mask": (
        "_tile.py",
        "mask = (o_n < N)[:, None] & (o_w < W)[None, :]\n    tl.store",
        "mask = (o_n < N)[:, None]\n    tl.store",
    ),
    "out-of-bounds row": (
        "lrua_step.py",
        "i_b = tl.program_id(0).to(tl.int64)",
        "i_b = tl.program_id(0).to(tl.int64) + 1",
    ),
    "race between programs": ("lrua_step.py", "new_memory_ptr + cells, N, W, ACC", "new_memory_ptr, N, W, ACC"),
    "missing barrier": (
        "_step.py",
        "tl.debug_barrier()  # before target_ptr",
        "pass",
    ),
    "missing store": ("lrua_step.py", "        usage_out(usage, x_ptr, new_usage_ptr + i_b * N, N, ACC, BU, BN)\n", ""),
}
FOUND = {
    "wrong mask": "two lanes write one element|out of bounds",
    "out-of-bounds row": "out of bounds",
    "race between programs": "race, write to what another program",
    "missing barrier": "no barrier between a read and a write",
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_mistake_is_named(name, tmp_path, monkeypatch):
    # only a memory of several tiles, in a sequence, is read and written in one place
    op, tile = ("lrua_sequence", 128) if name == "missing barrier" else ("lrua_step", 8192)
    package = mutant(tmp_path, *MUTATIONS[name])
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(f"{package}.{op}")
    monkeypatch.setitem(sys.modules, f"mann_kernels.triton.{op}", module)
    monkeypatch.setattr(f"{package}._launch.TILE", tile)
    call = inputs_of(op, 1, SIZE).to(torch.float32)
    want = getattr(reference, op)(**call)
    with mann_kernels.backend("triton"), torch.no_grad(), MemoryGuard():
        if name in FOUND:
            with pytest.raises(Exception, match=FOUND[name]) as caught:
                getattr(mann_kernels, op)(**call)
            assert GuardError.__name__ in repr(caught.value)
        else:  # what was never written is NaN, and differs from the reference
            got = mann_kernels.lrua_step(**call)
            assert not torch.allclose(got[2], want[2])
