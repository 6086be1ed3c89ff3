"""The table of what must run where, and the skips that are expected: conftest.py fails a run in which anything else was
skipped.

A kernel that is lost by mistake would otherwise be skipped as one that this machine cannot have.
"""

import importlib.util
import re
import shutil
from pathlib import Path

import torch

from mann_kernels import _backend, _library

GPU = torch.cuda.is_available()
#: A step runs them in one kernel; alone they are Triton's.
NO_CUDA_KERNEL = ("lrua_write_weights", "memory_update")
#: Implementation -> (where, the operators that it has there, in which dtypes).
MUST_RUN = {
    "cpp": ("cpu", _backend.OPS, ("float32", "float64", "bfloat16")),
    "triton": ("cuda", _backend.OPS, ("float32", "float64", "bfloat16", "float16")),
    "cuda": ("cuda", tuple(op for op in _backend.OPS if op not in NO_CUDA_KERNEL), ("float32", "bfloat16")),
}


CPUINFO = Path("/proc/cpuinfo")


def native() -> bool:
    """Say whether the library has the instruction set of one machine alone (MANN_NATIVE=1)."""
    best = _library.cpu_isa()
    try:
        return best is not None and _library.cpu_isa("baseline") != "baseline"
    finally:
        _library.cpu_isa(best)


#: Pattern of a reason -> whether this machine may skip for it.
EXPECTED = {
    "the package dnc is an extra": importlib.util.find_spec("dnc") is None,
    "could not import 'PIL": importlib.util.find_spec("PIL") is None,
    "this machine has no avx512$": "AVX512" not in torch.backends.cpu.get_cpu_capability(),
    "this machine has no avx512_bf16": not CPUINFO.exists() or "avx512_bf16" not in CPUINFO.read_text(),
    "this machine has no avx2": torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    "this machine has no": native(),
    "nn.LSTM in bfloat16": "AVX512" not in torch.backends.cpu.get_cpu_capability(),
    "under the interpreter alone": True,
    "has no memory|twice the shared memory that there is|has nothing to do with Triton": True,
    "needs nvcc": shutil.which("nvcc") is None,
    # on a GPU
    "one CUDA device": GPU and torch.cuda.device_count() == 1,
    "needs 16 GiB of free device memory": GPU and torch.cuda.mem_get_info()[0] < 2**34,
    "(cuda|triton) is the default there": GPU,
    "was asked for, but cannot run": GPU,  # unless it must, see must_run
    "no (CUDA|Triton) kernel": GPU,
    "there is a device": GPU,
}


def is_expected(reason: str) -> bool:
    """Say whether this machine may skip a test for this reason."""
    return any(here and re.search(pattern, reason) for pattern, here in EXPECTED.items())


def must_run(implementation: str, error: str) -> bool:
    """Say whether this machine must run the operator and dtype of an error "... was asked for, but cannot run ..."."""
    _, operators, dtypes = MUST_RUN[implementation]
    found, dtype = re.search(r"cannot run (\w+)", error), re.search(r"torch\.(\w+)", error)
    return found is not None and found[1] in operators and (dtype is None or dtype[1] in dtypes)
