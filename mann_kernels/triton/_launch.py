"""How a kernel is launched: tile sizes and warps as a pure function of the shape, and the small change of arguments."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

#: Threads of a program. Two tiles of memory and their products are 96 registers of a thread, vectors and addresses as many again:
#: 512 threads would leave 128 to each, and the backward kernels spill.
THREADS = 256

#: Elements of a tile of memory [BN,BW]: 32 for each thread. The paper's memory, 128 slots of 40 padded to 64, is one tile.
TILE = 8192

#: Steps between two copies of the memory that backward restarts from inside a segment: undoing writes rounds.
RESTART_EVERY = 8


#: What `sizes` says to the compiler, not to the kernel. Left to itself ptxas halves the registers of some kernels, and spills.
OPTIONS = ("num_warps", "maxnreg")


class Acc(NamedTuple):
    """What a kernel computes in."""

    torch: torch.dtype
    triton: tl.dtype


def acc_of(dtype: torch.dtype) -> Acc:
    return Acc(torch.float64, tl.float64) if dtype == torch.float64 else Acc(torch.float32, tl.float32)


def lanes() -> int:
    """Threads of a warp of the GPU in use: 32, or 64 on AMD's data-centre GPUs."""
    return torch.cuda.get_device_properties().warp_size if torch.version.hip else 32


def sizes(slots: int, width: int, heads: int, dtype: torch.dtype, lanes: int) -> dict[str, int]:
    """Tile sizes BN of slots, BU of vectors over slots, BW of the slot width and BR of heads, and num_warps.

    Tile sizes are powers of two. A memory that fits one tile stays in registers for a whole episode.
    """
    if slots * width >= 2**31:
        raise ValueError(f"memory: got N={slots} slots of width W={width}, want N*W < 2**31 on a GPU")
    wide, padded = triton.next_power_of_2(width), triton.next_power_of_2(slots)
    rows = max(1, (TILE // 2 if dtype == torch.float64 else TILE) // wide)
    return {
        "BN": min(padded, rows),
        "BU": padded if padded <= rows else min(padded, 2 * THREADS),
        "BW": wide,
        "BR": triton.next_power_of_2(heads),
        "num_warps": THREADS // lanes,
    } | ({"maxnreg": 255} if lanes == 32 else {})


def launch(kernel, slots: int, width: int, heads: int, dtype: torch.dtype) -> dict[str, int]:
    """Those of `sizes` that the kernel takes, on the GPU in use."""
    found = sizes(slots, width, heads, dtype, lanes())
    return {name: size for name, size in found.items() if name in kernel.arg_names or name in OPTIONS}


def aligned(numbers: int) -> int:
    """Rounded up, so that the scratch of every example starts where vector loads may."""
    return -(-numbers // 16) * 16


def contiguous(*tensors):
    """Each tensor contiguous; None stays None."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def pointer(tensor, instead):
    """A kernel takes a pointer for an absent argument too, and does not follow it."""
    return instead if tensor is None else tensor
