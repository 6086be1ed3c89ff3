"""How a kernel is launched: tile sizes and warps as a pure function of the shape, and the small change of arguments."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

#: Threads of a program. Counted in the compiled code of two steps of mann_sequence backward at the paper's shape: 256 threads take
#: 271 thousand warp instructions and 74 thousand turns of shared memory; 512 take 357 and 111, and leave 128 registers to a
#: thread that needs 240; 128 spill 1.6 KB a thread.
THREADS = 256

#: Elements of a tile of memory [BN,BW]: 32 for each thread. The paper's memory, 128 slots of 40 padded to 64, is one tile.
TILE = 8192

#: Steps between two copies of the memory that backward restarts from inside a segment: undoing writes rounds.
RESTART_EVERY = 8

#: What `sizes` says to the compiler, not to the kernel. Left to itself ptxas halves the registers of some kernels, and spills.
OPTIONS = ("num_warps", "maxnreg")


class Acc(NamedTuple):
    """The type that a kernel computes in, for torch and for Triton."""

    torch: torch.dtype
    triton: tl.dtype


def acc_of(dtype: torch.dtype) -> Acc:
    return Acc(torch.float64, tl.float64) if dtype == torch.float64 else Acc(torch.float32, tl.float32)


class Gpu(NamedTuple):
    """The facts about a GPU that launch sizes depend on."""

    nvidia: bool
    lanes: int  # threads of a warp: 64 on AMD's data-centre GPUs, else 32


def gpu() -> Gpu:
    """Look up the GPU in use."""
    if torch.version.hip is None:
        return Gpu(True, 32)
    return Gpu(False, torch.cuda.get_device_properties().warp_size)


def sizes(slots: int, width: int, heads: int, dtype: torch.dtype, gpu: Gpu) -> dict[str, int]:
    """Tile sizes BN of slots, BU of vectors over slots, BW of the slot width and BR of heads, and what the compiler is told.

    Tile sizes are powers of two. A memory that fits one tile stays in registers for a whole episode.

    Raises:
        ValueError: for a memory of more numbers than 32-bit offsets reach.
    """
    if slots * width >= 2**31:
        raise ValueError(f"memory: got N={slots} slots of width W={width}, want N*W < 2**31 on a GPU")
    wide, padded = triton.next_power_of_2(width), triton.next_power_of_2(slots)
    rows = max(1, (TILE // 2 if dtype == torch.float64 else TILE) // wide)
    found = {
        "BN": min(padded, rows),
        "BU": padded if padded <= rows else min(padded, 2 * THREADS),
        "BW": wide,
        "BR": triton.next_power_of_2(heads),
        "num_warps": THREADS // gpu.lanes,
    }
    return found | ({"maxnreg": 255} if gpu.nvidia else {})


def launch(kernel, slots: int, width: int, heads: int, dtype: torch.dtype) -> dict[str, int]:
    """Pick those of `sizes` that the kernel takes, on the GPU in use."""
    found = sizes(slots, width, heads, dtype, gpu())
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
