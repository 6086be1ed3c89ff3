"""What compilers made of the kernels for GPUs that are not here, and how they are launched: nothing runs.

with compiled_for("sm_90") as kernels:
    ...  # operators, on CPU tensors
kernels[0].compiled.metadata.shared
"""

import contextlib
import ctypes
import functools
import importlib.util
import math
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

import mann_kernels
from mann_kernels import _backend
from mann_kernels.triton import _launch

#: Bytes of shared memory that one program may have (NVIDIA: the opt-in limit of the compute capability; AMD: LDS).
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Compiled(NamedTuple):
    """One launch of a Triton kernel."""

    compiled: Any  # what Triton's compiler made
    programs: int
    buffers: dict[str, torch.Tensor]  # the tensors among its arguments, by name


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
def compiled_for(target):
    """Within the block Triton's launches on CPU tensors compile for `target` and run nothing; yields the list of them."""
    found, launch, driver = [], JITFunction.run, _Compiler(target)

    def noted(kernel, *args, grid, **kwargs):
        compiled = launch(kernel, *args, grid=grid, **kwargs)
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        # other objects of the same memory: autograd copies a gradient that somebody else still holds
        buffers = {name: value.detach() for name, value in named.items() if isinstance(value, torch.Tensor)}
        found.append(Compiled(compiled, math.prod(grid), buffers))
        return compiled

    def missing_on_cpu(name, op, device, dtype):
        return None if (name, device) == ("triton", "cpu") else missing(name, op, device, dtype)

    kind = _launch.Gpu(driver.target.backend == "cuda", driver.target.warp_size)
    missing = _backend.missing
    with (
        mock.patch.object(_backend, "missing", missing_on_cpu),
        mock.patch.object(JITFunction, "run", noted),
        mock.patch.object(_launch, "gpu", return_value=kind),
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mann_kernels.backend("triton"),
    ):
        yield found


def resources_of(compiled):
    """Registers and spilled bytes of a thread, by ptxas or the AMD assembler, and the shared memory of a program."""
    shared = compiled.metadata.shared
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        return {"registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]), "spilled": spilled, "shared": shared}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        (used,) = resources(cubin).values()
    return {"registers": used.registers, "spilled": used.spilled, "shared": shared}


class Resources(NamedTuple):
    """What a kernel uses: registers and bytes of local memory of a thread, bytes of static shared memory of a block."""

    registers: int
    spilled: int
    shared: int


def resources(cubin: Path) -> dict[str, Resources]:
    """What cuobjdump, which comes with Triton, says that the kernels of a cubin use, by name."""
    command = [TOOLS / "cuobjdump", "--dump-resource-usage", cubin]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\n +REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    assert found, said
    return {
        name: Resources(int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in found
    }


def disassembled(cubin: Path) -> dict[str, str]:
    """The machine code of a cubin's kernels, by name."""
    command = [TOOLS / "nvdisasm", "--print-code", cubin]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {part.split(",")[0]: part for part in said.split(".section\t.text.")[1:]}


def nvrtc() -> list[Path]:
    """The libraries of NVRTC, from the package nvidia-cuda-nvrtc."""
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations or () if package else ()
    found = (sorted(Path(folder).glob("*/lib/libnvrtc*.so.1*")) for folder in folders)
    return [library for libraries in found for library in libraries if ".alt." not in library.name]


@functools.cache
def cuda_compiler() -> ctypes.CDLL:
    """The library of the CUDA kernels, which compiles them."""
    for library in sorted(nvrtc(), key=lambda path: "builtins" not in path.name):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(importlib.util.find_spec("mann_kernels._CUDA").origin)


def compile_for(capability: int, source: str, options: str) -> tuple[int, str]:
    """0 and the path of what NVRTC makes of a file of csrc/cuda for a compute capability, or 1 and what it says."""
    said, compiler = ctypes.create_string_buffer(100_000), cuda_compiler()
    failed = compiler.mann_cuda_compile(source.encode(), options.encode(), capability, said, ctypes.c_int64(len(said)))
    return failed, said.value.decode()
