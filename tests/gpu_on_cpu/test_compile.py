"""The Triton kernels compiled for GPUs that are not here, as they are launched at the paper's shape: they compile, and fit."""

import contextlib
import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

pytest.importorskip("triton")

import triton
from emulated import emulated
from occupancy import occupancy
from report import OF_MANN, call_of
from stem import run
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

import mann_kernels
from mann_kernels import _backend
from mann_kernels.triton import _launch

pytestmark = pytest.mark.compiles

#: By version of Triton, target and kernel: registers and spilled bytes of a thread, bytes of shared memory, and how many programs a
#: multiprocessor holds. Nothing may get worse unnoticed.
#: `pytest tests/gpu_on_cpu/test_compile.py --all-targets --write-budgets` measures them anew.
BUDGETS = Path(__file__).with_name("budgets.json")

#: Bytes of shared memory that one program may have (NVIDIA: the opt-in limit of the compute capability; AMD: LDS).
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}
IN_MAKE_TEST = ("sm_90", "gfx942")


class _Compiler:
    """What Triton asks of a GPU driver; it loads nothing and runs nothing."""

    def __init__(self, target):
        self.target = (
            GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
        )
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 10**9},
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
        )
        self.launcher_cls = lambda source, metadata: lambda *arguments: None

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # Triton keeps compiled kernels by device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def compiled_for(target, monkeypatch):
    """Within the block Triton's launches on CPU tensors compile for `target` and run nothing; yields the list of what they made."""
    found, launch, driver = [], JITFunction.run, _Compiler(target)

    def noted(kernel, *args, **kwargs):
        found.append(launch(kernel, *args, **kwargs))
        return found[-1]

    with emulated("sm_90"), mann_kernels.backend("triton"), monkeypatch.context() as patch:
        triton.runtime.driver.set_active(driver)
        patch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", None)
        patch.setattr(JITFunction, "run", noted)
        kind = _launch.Gpu(driver.target.backend == "cuda", driver.target.warp_size)
        patch.setattr(_launch, "gpu", lambda: kind)
        yield found


def resources_of(compiled, target, folder):
    """What ptxas, or the AMD assembler, gave each thread of a kernel; how many programs that lets in."""
    shared = compiled.metadata.shared
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        return {"registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]), "spilled": spilled, "shared": shared}
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--dump-resource-usage", folder / "kernel.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    programs = occupancy(target, 32 * compiled.metadata.num_warps, registers, shared).programs
    return {"registers": registers, "spilled": spilled, "shared": shared, "programs": programs}


def budget_of(target, label, found, write):
    """The budget noted for this version of Triton; with `write`, noted now."""
    budgets = json.loads(BUDGETS.read_text())
    if write:
        budgets.setdefault(triton.__version__, {}).setdefault(target, {})[label] = found
        BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    return budgets[triton.__version__][target][label]


@pytest.mark.parametrize("target", SHARED_MEMORY)
@pytest.mark.parametrize("stem", _backend.STEMS)
def test_compiles_and_fits(stem, target, request, tmp_path, monkeypatch):
    everything, write = map(request.config.getoption, ("--all-targets", "--write-budgets"))
    if not everything and target not in IN_MAKE_TEST:
        pytest.skip("with --all-targets")
    for dtype in ("float32", "bfloat16") if everything else ("float32",):
        with compiled_for(target, monkeypatch) as kernels:
            run(getattr(mann_kernels, stem), call_of(stem).to(getattr(torch, dtype)))
        assert len(kernels) >= 2
        for compiled in kernels:
            label, found = f"{compiled.metadata.name}[{dtype}]", resources_of(compiled, target, tmp_path)
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


def test_batch_and_time_are_in_no_key(monkeypatch):
    """One kernel for every number of examples and of steps, 1 and multiples of 16 too."""
    for stem in ("lrua_step", "lrua_sequence", "mann_sequence"):
        made = set()
        for batch, steps in ((1, 1), (2, 3), (16, 16)):
            with compiled_for("sm_90", monkeypatch) as kernels:
                run(getattr(mann_kernels, stem), call_of(stem, batch, steps))
            made |= {(compiled.metadata.name, compiled.hash) for compiled in kernels}
        # a step is a sequence of its own shape in its backward pass
        assert len(made) == 2, made
