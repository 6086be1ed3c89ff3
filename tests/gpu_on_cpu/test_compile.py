"""The Triton kernels compiled for GPUs that are not here, as they are launched at the paper's shape: they compile, and fit."""

import json
import os
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

pytest.importorskip("triton")

import triton
from compiled import SHARED_MEMORY, compiled_for, resources_of
from report import OF_MANN, call_of
from stem import run

import mann_kernels
from mann_kernels import _backend

pytestmark = pytest.mark.compiles

#: By version of Triton, target and kernel: registers and spilled bytes of a thread, bytes of shared memory, and how many programs a
#: multiprocessor holds. Nothing may get worse unnoticed.
#: `pytest tests/gpu_on_cpu/test_compile.py --all-targets --write-budgets` measures them anew.
BUDGETS = Path(__file__).with_name("budgets.json")

IN_MAKE_TEST = ("sm_90", "gfx942")


def budget_of(target, label, found, write):
    """The budget noted for this version of Triton; with `write`, noted now."""
    budgets = json.loads(BUDGETS.read_text())
    if write:
        budgets.setdefault(triton.__version__, {}).setdefault(target, {})[label] = found
        BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    return budgets[triton.__version__][target][label]


@pytest.mark.parametrize("target", SHARED_MEMORY)
@pytest.mark.parametrize("stem", _backend.STEMS)
def test_compiles_and_fits(stem, target, request):
    everything, write = map(request.config.getoption, ("--all-targets", "--write-budgets"))
    if not everything and target not in IN_MAKE_TEST:
        pytest.skip("with --all-targets")
    for dtype in ("float32", "bfloat16") if everything else ("float32",):
        with compiled_for(target) as kernels:
            run(getattr(mann_kernels, stem), call_of(stem).to(getattr(torch, dtype)))
        assert len(kernels) >= 2
        for compiled, *_ in kernels:
            label, found = f"{compiled.metadata.name}[{dtype}]", resources_of(compiled, target)
            assert found["shared"] <= SHARED_MEMORY[target], label
            if stem in OF_MANN:
                assert found["spilled"] == 0, (label, found)
            budget = budget_of(target, label, found, write)
            # registers are handed out eight at a time; a step and a sequence share their backward kernel, with other options
            allowed = budget | {"registers": -(-budget["registers"] // 8) * 8, "programs": 99}
            more = {what: (found[what], budget[what]) for what in budget if found[what] > allowed[what]}
            assert not more, f"{label} on {target}: (found, budget) {more}"
            assert found.get("programs", 0) >= budget.get("programs", 0), label
            if dtype == "float32":  # is computed in float32, which the interpreter cannot tell from TF32
                assert "tf32" not in compiled.asm.get("ptx", ""), label


def test_batch_and_time_are_in_no_key():
    """One kernel for every number of examples and of steps, 1 and multiples of 16 too."""
    for stem in ("lrua_step", "lrua_sequence", "mann_sequence"):
        made = set()
        for batch, steps in ((1, 1), (2, 3), (16, 16)):
            with compiled_for("sm_90") as kernels:
                run(getattr(mann_kernels, stem), call_of(stem, batch, steps))
            made |= {(compiled.metadata.name, compiled.hash) for compiled, *_ in kernels}
        # a step is a sequence of its own shape in its backward pass
        assert len(made) == 2, made
