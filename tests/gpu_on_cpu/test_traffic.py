"""What the compiled kernels move at the paper's sizes, counted by the PTX machine: global memory once, no bank conflicts."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

pytest.importorskip("triton")

import triton
from emulated import emulated
from stem import Inputs, run

import mann_kernels
from bench.stems import SHAPES, inputs

pytestmark = pytest.mark.compiles

STEPS = 3
OPERATORS = ("content_address", "lrua_write_weights", "memory_update", "lrua_step", "lrua_sequence", "mann_sequence")


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(scope="module")
def launches():
    """stem -> (Stats of forward and backward, bytes each must move at least): one example of the paper's sizes, float32."""
    found = {}
    for stem in OPERATORS:
        call = Inputs(inputs(stem, SHAPES["single"].at(STEPS))).to(torch.float32)
        with emulated("sm_90") as stats, mann_kernels.backend("triton"):
            outputs, grads = run(getattr(mann_kernels, stem), call)
        ideal = [
            nbytes(call.values()) + nbytes(outputs),
            nbytes(call.values()) + nbytes(outputs) + nbytes(grads.values()),
        ]
        if stem == "mann_sequence":
            ideal = ideal_of_mann(call, outputs)
        if stem.endswith(
            "sequence"
        ):  # backward notes read weights and overwritten rows of each step, and reads them again
            ideal[1] += 2 * STEPS * (SHAPES["single"].N + SHAPES["single"].W) * SHAPES["single"].R * 4
        found[stem] = list(zip(stats, ideal, strict=True))
    return found


def ideal_of_mann(call, outputs):
    """The recurrent weights come by at every step, and in the backward pass those of the heads twice; the input projection and the
    weights' gradients are matrix products outside."""
    recurrent, head = nbytes([call["weight_hh"]]), nbytes([call["weight_head"], call["bias_head"]])
    state = nbytes(call[name] for name in ("h", "c", "reads", "memory", "usage", "read_weights"))
    gates = STEPS * call["weight_hh"].shape[0] * 4
    heads = STEPS * call["weight_head"].shape[0] * 4
    forward = STEPS * (recurrent + head) + 2 * gates + state + nbytes(outputs)
    return [forward, STEPS * (recurrent + 2 * head) + 2 * gates + heads + 2 * state + 2 * nbytes(outputs)]


@pytest.mark.parametrize("stem", OPERATORS)
def test_global_bytes(launches, stem):
    """At most 1.2 times what goes in and out, scratch included. Rows of a key that every warp asks for count once: they come from
    the first-level cache. The recurrent weights do not fit there and count at every step."""
    for stats, ideal in launches[stem]:
        names = set(stats.loaded) | set(stats.stored)
        moved = {name: stats.distinct_loaded[name] + stats.distinct_stored[name] for name in names}
        moved |= {name: stats.loaded[name] for name in names if name.startswith("weight_h")}
        assert sum(moved.values()) <= 1.2 * ideal, (stats.kernel.name, ideal, moved)


@pytest.mark.parametrize("stem", ["lrua_step", "lrua_sequence", "mann_sequence"])
def test_the_memory_stays_in_registers(launches, stem):
    """However many steps: it is loaded once and stored once."""
    for stats, _ in launches[stem]:
        memory = SHAPES["single"].N * SHAPES["single"].W * 4
        moved = {name: (stats.loaded[name], stats.stored[name]) for name in stats.global_bytes if "memory" in name}
        assert all(pair in ((memory, 0), (0, memory)) for pair in moved.values()), moved
        assert sum(map(sum, moved.values())) == memory * (2 if "fwd" in stats.kernel.name else 3)


@pytest.mark.parametrize("stem", OPERATORS)
def test_bank_conflicts(launches, stem):
    """None that the source could avoid: all are in the way Triton 3.7 adds up across warps, and Triton 3.9 has none."""
    for stats, _ in launches[stem]:
        assert all(place.startswith("standard.py:") for place in stats.conflicts_at), stats.conflicts_at
        if triton.__version__ >= "3.9":
            assert stats.bank_conflicts == 0
