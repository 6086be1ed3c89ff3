"""The most that the machine can do, measured: operations a second in a large matrix product, bytes a second in a large
copy."""

import functools
from typing import NamedTuple

import torch

from bench.counts import Work

#: Sides of the matrices and bytes of the copied tensor: enough that neither starting nor caches matter.
SIDE = {"cpu": 1024, "cuda": 8192}
COPIED = {"cpu": 2**27, "cuda": 2**30}
TIMES = 5


class Peak(NamedTuple):
    flops: float  # a second
    bandwidth: float  # bytes a second, those read and those written


@functools.cache
def peak(device, dtype: torch.dtype, threads: int) -> Peak:
    """The best of a few; measured once in a run for every device, dtype and number of threads."""
    side, elements = SIDE[device.type], COPIED[device.type] // dtype.itemsize
    # random numbers: a GPU multiplies zeros and ones faster, for want of heat
    a, b, out = (torch.randn(side, side, device=device.device, dtype=dtype) for _ in range(3))
    product = best(device, lambda: torch.mm(a, b, out=out))
    source, target = (torch.randn(elements, device=device.device, dtype=dtype) for _ in range(2))
    copy = best(device, lambda: target.copy_(source))
    return Peak(2 * side**3 / product * 1e3, 2 * elements * dtype.itemsize / copy * 1e3)


def best(device, function) -> float:
    """Milliseconds of the fastest of some calls, after one that is not counted."""
    device.measure(function)
    return min(device.measure(function) for _ in range(TIMES))


def least_ms(work: Work, peak: Peak) -> float:
    """Milliseconds that the machine needs for the work at least: the longer of computing and moving."""
    return max(work.flops / peak.flops, work.bytes / peak.bandwidth) * 1e3


def facts(device, dtypes, threads: int) -> dict:
    """Give the measured peaks by dtype, for the record of a run."""
    found = {}
    for name in dtypes:
        limit = peak(device, getattr(torch, name), threads)
        found[name] = {"product_gflop_s": limit.flops / 1e9, "copy_gb_s": limit.bandwidth / 1e9}
    return found
