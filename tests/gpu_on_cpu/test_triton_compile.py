"""The Triton kernels compiled for GPUs that are not here, as they are launched at the paper's shape: they compile, and fit."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from against_reference import Inputs, class_of, run
from compiled import SHARED_MEMORY, compiled_for, resources_of

import mann_kernels
from bench.mann import SHAPES
from bench.operators import operators
from mann_kernels import _backend

pytestmark = pytest.mark.compiles

OF_MANN = ("content_address", "lrua_write_weights", "memory_update", "lrua_step", "lrua_sequence", "mann_sequence")
TARGETS = [
    name if name in ("sm_90", "gfx942") else pytest.param(name, marks=pytest.mark.long) for name in SHARED_MEMORY
]


def call_of(op, batch=1, steps=2, **sizes):
    """A few examples at the paper's sizes; of an operator that is not MANN's, a case of its tests."""
    if op in OF_MANN:
        shape = dataclasses.replace(SHAPES["paper"], B=batch, T=steps, **sizes)
        return Inputs(operators()[op].inputs(shape, 0)).to(torch.float32)
    return class_of(op).inputs(0, 2, 128, 20, 1, **class_of(op).options[0]).to(torch.float32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", _backend.OPS)
def test_compiles_and_fits(op, target, request):
    for dtype in ("float32", "bfloat16") if request.config.getoption("--long") else ("float32",):
        with compiled_for(target) as kernels:
            run(getattr(mann_kernels, op), call_of(op).to(getattr(torch, dtype)))
        assert len(kernels) >= 2
        for compiled, *_ in kernels:
            label, found = f"{compiled.metadata.name}[{dtype}]", resources_of(compiled)
            assert found["shared"] <= SHARED_MEMORY[target], label
            if op in OF_MANN:
                assert found["spilled"] == 0, (label, found)
            if dtype == "float32":  # is computed in float32, which the interpreter cannot tell from TF32
                assert "tf32" not in compiled.asm.get("ptx", ""), label


@pytest.mark.parametrize("target", TARGETS)
def test_slots_that_are_counted_spill_nothing(target):
    with compiled_for(target) as kernels:
        run(mann_kernels.lrua_sequence, call_of("lrua_sequence", R=8))
    for compiled, *_ in kernels:
        assert resources_of(compiled)["spilled"] == 0, compiled.metadata.name


def test_batch_and_time_are_in_no_key():
    """One kernel for every number of examples and of steps, 1 and multiples of 16 too."""
    for op in ("lrua_step", "lrua_sequence", "mann_sequence"):
        made = set()
        for batch, steps in ((1, 1), (2, 3), (16, 16)):
            with compiled_for("sm_90") as kernels:
                run(getattr(mann_kernels, op), call_of(op, batch, steps))
            made |= {(compiled.metadata.name, compiled.hash) for compiled, *_ in kernels}
        # a step is a sequence of its own shape in its backward pass
        assert len(made) == 2, made
