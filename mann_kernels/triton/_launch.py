"""How a kernel is launched: tile sizes and warps as a pure function of the shape, and the small change of arguments."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

#: Elements of a tile of memory [BN,BW]. A float32 product without TF32 keeps its operands in registers: with 2048 elements the
#: backward kernels spill 1.4 KB a thread on sm_90 at 4 warps and 160 bytes at 8, with 1024 at 8 warps at most 64 bytes.
TILE = 1024


#: Steps between two copies of the memory that backward restarts from inside a segment: undoing writes rounds.
RESTART_EVERY = 8


class Acc(NamedTuple):
    """What a kernel computes in."""

    torch: torch.dtype
    triton: tl.dtype


def acc_of(dtype: torch.dtype) -> Acc:
    return Acc(torch.float64, tl.float64) if dtype == torch.float64 else Acc(torch.float32, tl.float32)


def launch(slots: int, width: int, heads: int) -> dict[str, int]:
    """BN, BW and BR, each a power of two of at least 16, the least that a matrix product takes, and num_warps."""
    wide = max(16, triton.next_power_of_2(width))
    rows = max(16, triton.next_power_of_2(heads))
    tile = max(16, min(triton.next_power_of_2(slots), TILE // max(wide, rows)))
    return {"BN": tile, "BW": wide, "BR": rows, "num_warps": 8}


def contiguous(*tensors):
    """Each tensor contiguous; None stays None."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def pointer(tensor, instead):
    """A kernel takes a pointer for an absent argument too, and does not follow it."""
    return instead if tensor is None else tensor
