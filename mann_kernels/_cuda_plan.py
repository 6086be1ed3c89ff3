"""In which form mann_sequence runs on a GPU: a pure function of the sizes, and the one that the CUDA kernels themselves use.

python -c "from mann_kernels._cuda_plan import mann_sequence; print(mann_sequence(N=128, W=40, R=4, H=200))"
"""

import ctypes
from typing import NamedTuple

import torch

from mann_kernels import _library

#: Bytes of shared memory that a block may have, with compute capability 9.0 and 10.0.
SHARED_LIMIT = 232_448


class Plan(NamedTuple):
    """Of the cluster kernels; the bytes of a block are also known where they are too many."""

    cluster: int  # blocks of a cluster, and examples that it takes; 0: the sizes do not fit
    forward_bytes: int  # of shared memory in each block
    backward_bytes: int

    @property
    def missing(self) -> str | None:
        """Why the cluster kernels do not run; None if they do."""
        if self.cluster:
            return None
        most = max(self.forward_bytes, self.backward_bytes)
        return f"the sizes do not fit a cluster of 8 blocks, which would need {most} bytes of shared memory in each"


def mann_sequence(
    *,
    N: int,
    W: int,
    R: int,
    H: int,
    write_add: bool = False,
    key_strength: bool = False,
    dtype: torch.dtype = torch.float32,
    shared_limit: int = SHARED_LIMIT,
) -> Plan:
    """The plan for these sizes, on a device whose blocks may have so many bytes of shared memory; needs the CUDA extension."""
    assert _library.cuda_plan is not None, _library.cuda_missing
    found = (ctypes.c_int64 * 2)()
    cluster = _library.cuda_plan(
        dtype == torch.bfloat16, N, W, R, H, write_add, key_strength, ctypes.c_int64(shared_limit), found
    )
    return Plan(cluster, *found)


def missing(**options) -> str | None:
    """Why there is no such plan, for the options of `mann_sequence`; None if there is one."""
    return mann_sequence(**options).missing


#: What torch.compiler.assume_constant_result does, which would import all of the compiler: it does not look inside.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
