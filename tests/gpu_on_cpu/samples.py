"""The sample kernels of sample_kernels.cu, run on the CPU: python samples.py LIBRARY CASE SEED prints what went wrong."""

import ctypes
import sys
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: int
    shared: int
    n: int
    given: int  # numbers that the kernel reads
    made: int  # and writes


#: By the first word of the kernel's name.
CASES = {
    "sums": Case((3, 1, 1), (64, 1, 1), 1, 8, 512, 3 * 512, 3),
    "exchange": Case((8, 1, 1), (64, 1, 1), 4, 0, 5, 8, 8),
    "product": Case((1, 1, 1), (32, 1, 1), 1, 0, 1, 16 * 16 + 16 * 8, 16 * 8),
    "copy": Case((1, 1, 1), (64, 1, 1), 1, 2048, 512, 512, 512),
    "collectives": Case((1, 1, 1), (64, 1, 1), 1, 0, 2, 64, 8 * 64),
    "hand on": Case((1, 1, 1), (64, 1, 1), 1, 0, 7, 64, 64),
    "numbers": Case((3, 2, 2), (5, 2, 4), 1, 0, 60, 60, 3 * 12 * 40),
    "order": Case((3, 1, 1), (64, 1, 1), 1, 0, 0, 1, 3 * 64),
}


def case_of(name):
    return next(case for start, case in CASES.items() if name.startswith(start))


def given(name, seed=0):
    return np.random.default_rng(seed).standard_normal(case_of(name).given).astype(np.float32)


def run(library: ctypes.CDLL, name: str, seed: int = 0, x=None, out=None, **changes):
    """What the kernel writes; RuntimeError with what it did wrong."""
    case = case_of(name)._replace(**changes)
    x = given(name) if x is None else x
    out = np.full(case.made, np.nan, np.float32) if out is None else out
    library.run_sample.restype = ctypes.c_char_p
    library.mann_cuda_on_cpu_seed(seed)
    three = ctypes.c_uint * 3
    said = library.run_sample(
        name.encode(), three(*case.grid), three(*case.block), case.cluster, case.shared,
        *(ctypes.c_void_p(array.ctypes.data) for array in (x, out)), case.n,
    )  # fmt: skip
    if said is not None:
        raise RuntimeError(said.decode())
    return out


if __name__ == "__main__":
    try:
        run(
            ctypes.CDLL(sys.argv[1]), sys.argv[2], int(sys.argv[3]), out=np.zeros(case_of(sys.argv[2]).made, np.float32)
        )
    except RuntimeError as error:
        sys.exit(f"error: {error}")
