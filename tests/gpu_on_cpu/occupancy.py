"""How many programs of a kernel one multiprocessor holds, by NVIDIA's own calculator, which runs on the host; how many clusters.

The calculator is the header cuda_occupancy.h, of the package nvidia-cuda-runtime-cu12 or beside nvcc.
"""

import ctypes
import functools
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCE = r"""
#include <cstddef>
#include <climits>
#include "cuda_occupancy.h"

extern "C" int occupancy(const int *device, int threads, int registers, size_t shared, int *result) {
    cudaOccDeviceProp gpu;
    gpu.computeMajor = device[0];
    gpu.computeMinor = device[1];
    gpu.maxThreadsPerBlock = 1024;
    gpu.maxThreadsPerMultiprocessor = device[2];
    gpu.regsPerBlock = gpu.regsPerMultiprocessor = 65536;
    gpu.warpSize = 32;
    gpu.sharedMemPerBlock = 49152;
    gpu.sharedMemPerMultiprocessor = device[3];
    gpu.sharedMemPerBlockOptin = device[4];
    gpu.reservedSharedMemPerBlock = 1024;
    gpu.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = INT_MAX;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = device[4];
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult found;
    int error = cudaOccMaxActiveBlocksPerMultiprocessor(&found, &gpu, &kernel, &state, threads, shared);
    result[0] = found.activeBlocksPerMultiprocessor;
    result[1] = (int)found.limitingFactors;
    return error;
}
"""

#: Threads and bytes of shared memory of a multiprocessor, and bytes that one program may have.
#: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities
DEVICES = {
    "sm_80": (2048, 167_936, 166_912),
    "sm_86": (1536, 102_400, 101_376),
    "sm_89": (1536, 102_400, 101_376),
    "sm_90": (2048, 233_472, 232_448),
    "sm_100": (2048, 233_472, 232_448),
    "sm_120": (1536, 102_400, 101_376),
}
LIMITS = {1: "warps", 2: "registers", 4: "shared memory", 8: "blocks", 16: "barriers"}


class Occupancy(NamedTuple):
    programs: int  # that one multiprocessor holds at once
    warps: int
    fraction: float  # of the warps it could hold
    limited_by: str


def header() -> Path | None:
    """The folder of cuda_occupancy.h."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [packages / "cuda_runtime/include", *packages.glob("cu1*/include")]
    if nvcc := shutil.which("nvcc"):
        folders += [
            Path(nvcc).resolve().parents[1] / "include",
            *Path(nvcc).resolve().parents[1].glob("targets/*/include"),
        ]
        folders.append(Path("/usr/local/cuda/include"))
    return next((folder for folder in folders if (folder / "cuda_occupancy.h").exists()), None)


@functools.cache
def _calculator():
    folder = header()
    if folder is None:
        raise RuntimeError("no cuda_occupancy.h (pip install nvidia-cuda-runtime-cu12)")
    with tempfile.TemporaryDirectory() as build:
        source, library = Path(build, "occupancy.cpp"), Path(build, "occupancy.so")
        source.write_text(SOURCE)
        compiler = shutil.which("g++") or shutil.which("c++") or "clang++"
        command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{folder}", source, "-o", library]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library)).occupancy


def occupancy(target: str, threads: int, registers: int, shared: int) -> Occupancy:
    """For programs of `threads` threads with `registers` registers each and `shared` bytes of shared memory."""
    number = int(target.removeprefix("sm_"))
    device = (ctypes.c_int * 5)(number // 10, number % 10, *DEVICES[target])
    result = (ctypes.c_int * 2)()
    error = _calculator()(device, threads, registers, ctypes.c_size_t(shared), result)
    if error:
        raise ValueError(f"{threads} threads, {registers} registers, {shared} bytes on {target}: error {error}")
    programs, factors = result
    warps = programs * -(-threads // 32)
    limits = ", ".join(name for bit, name in LIMITS.items() if factors & bit)
    return Occupancy(programs, warps, warps * 32 / DEVICES[target][0], limits)


#: Multiprocessors of each group (GPC) of them; a cluster stands in one. An H100 SXM has 132, in 8 groups of 18 of which some are
#: switched off (NVIDIA H100 Tensor Core GPU Architecture, white paper); which ones differs from chip to chip: one way to have 132.
GROUPS = {"sm_90": (18, 18, 16, 16, 16, 16, 16, 16)}
MOST_BLOCKS = 8  # of a cluster, on every GPU that has them


def clusters(target: str, blocks: int, programs: int) -> int:
    """How many clusters of `blocks` blocks run at once, where a multiprocessor holds `programs` of them.

    The blocks of a cluster stand on multiprocessors of one group: each group holds whole clusters only. The driver says the same
    by cudaOccupancyMaxActiveClusters, which needs a GPU.
    """
    if not 1 <= blocks <= MOST_BLOCKS:
        raise ValueError(f"blocks: got {blocks}, want 1 to {MOST_BLOCKS}")
    return sum(group * programs // blocks for group in GROUPS[target])
