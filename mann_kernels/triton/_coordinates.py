"""Features, tiles and sizes of the kernels that put every coordinate of a gradient through one small network.

A program takes a block of BP coordinates; a row of a tile [BP,BD] is a coordinate, its columns are hidden units. Backward, a
program goes over every PROGRAMS-th block and keeps its own sums of the weight gradients, which are added up in order at the
end: which program takes which block depends on nothing but their number, so results repeat bit for bit.
"""

import math

import triton
import triton.language as tl

#: Coordinates of a block. A float32 product without TF32 keeps its operands in registers: with 16 coordinates and 32 hidden
#: units, 4 warps hold the backward kernels without spilling on all five targets; 8 warps, or 32 coordinates, do not.
BLOCK = 16
#: Columns of the widest tile of hidden units that fits every chip.
WIDEST = 64
#: Programs of a backward kernel, about three for each multiprocessor of the largest chips. Each has its own sums.
PROGRAMS = 512


def launch(hidden: int, beside: int, p: float) -> dict[str, float]:
    """BP, BD (for `hidden` units and so many columns beside them), the numbers of the preprocessing, warps and stages."""
    wide = max(16, triton.next_power_of_2(hidden + beside))
    if wide > WIDEST:
        raise ValueError(f"the Triton kernels take at most {WIDEST - beside} hidden units (D), got {hidden}")
    # Four gates' weights of 64 x 64 and loads ahead of time do not fit the shared memory of every chip together.
    how = {"num_warps": 4} if wide <= 32 else {"num_warps": 8, "num_stages": 1}
    return {"BP": BLOCK, "BD": wide, "POWER": p, "SCALE": math.exp(p), **how}


def programs_of(count: int) -> int:
    return min(PROGRAMS, triton.cdiv(count, BLOCK))


@triton.jit
def load_matrix(matrix_ptr, rows, columns, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """[rows,columns] -> [BM,BN], filled with zeros."""
    o_m, o_n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    return tl.load(matrix_ptr + o_m * columns + o_n, mask=(o_m < rows) & (o_n < columns), other=0.0).to(ACC)


@triton.jit
def features(g, POWER: tl.constexpr, SCALE: tl.constexpr):
    """The gradient preprocessing; NaN passes."""
    magnitude = tl.log(tl.abs(g) + 1.1920928955078125e-07) / POWER
    sign = g * SCALE
    sign = tl.where(sign > 1.0, 1.0, sign)
    return tl.where(magnitude < -1.0, -1.0, magnitude), tl.where(sign < -1.0, -1.0, sign)


@triton.jit
def between_ends(g, POWER: tl.constexpr, SCALE: tl.constexpr):
    """Where a gradient passes either feature."""
    size = tl.abs(g) + 1.1920928955078125e-07
    return tl.log(size) / POWER >= -1.0, tl.abs(g) * SCALE <= 1.0


@triton.jit
def features_backward(g, dmagnitude, dsign, POWER: tl.constexpr, SCALE: tl.constexpr):
    """Take the gradient of g from the gradients of its two features."""
    size = tl.abs(g) + 1.1920928955078125e-07
    slope = dmagnitude / (size * POWER)
    slope = tl.where(g > 0.0, slope, tl.where(g < 0.0, -slope, 0.0))
    of_magnitude, of_sign = between_ends(g, POWER, SCALE)
    return tl.where(of_magnitude, slope, 0.0) + tl.where(of_sign, dsign * SCALE, 0.0)
