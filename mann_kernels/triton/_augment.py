"""Activations with their slopes, and tile sizes, that the kernels of the two augmented layers have in common."""

import triton
import triton.language as tl

from mann_kernels.triton._tile import tanh

#: Rows, columns and depth of a matrix product. A float32 product without TF32 keeps its operands in registers: at a depth of
#: 32 two of the backward kernels spill.
TILES = {"BM": 32, "BN": 32, "BK": 16, "num_warps": 4}

# The numbers of the operators' argument `activation`.
RELU, GELU, TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation at x, and its slope. ReLU keeps NaN, as torch does."""
    if ACT == RELU:
        return tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, x * 0.0 + 1.0)
    elif ACT == GELU:
        below = 0.5 + 0.5 * tl.erf(x * 0.70710678118654752)
        return x * below, below + x * 0.39894228040143268 * tl.exp(-0.5 * x * x)
    elif ACT == TANH:
        # 1 - tanh^2 without the difference, in which the rounding of tanh would count twice
        e = tl.exp(-2.0 * tl.abs(x))
        return tanh(x), 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        return x, x * 0.0 + 1.0
