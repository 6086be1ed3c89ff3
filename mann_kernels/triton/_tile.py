"""Scalar functions, tiles of memory, and products of heads and tiles, of which the kernels with a memory are made.

A program works for one example. Slots come in tiles of BN, slot width is padded to BW and heads to BR, all powers of two, with
zeros. Numbers per head and slot are tensors [BR,BN], rows of the memory [BN,BW]; the products between them go head after head,
as sums over a tile in registers: nothing is padded further, nothing rounds to TF32, and no operand passes through shared
memory. Everything is computed in ACC, float32 or float64, whatever the storage type.

N, W and R are compile-time constants, so that the compiler sees alignment. Offsets within an example are 32 bits (`sizes`
refuses more), those of examples and steps 64. What one thread wrote to global memory another may read after
tl.debug_barrier(), not before.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def exp_minus_one(x):
    """Accurate near zero too: the rounding of e^x is divided out again (Kahan).

    Not far from zero: there e - 1 is accurate as it is, and the logarithm of an e^x with few bits left, or none, is not.
    """
    e = tl.exp(x)
    # where e is 1 the quotient has no value, and is not taken
    near = tl.where(e == 1.0, x, (e - 1.0) * (x / tl.log(e)))
    return tl.where(e < 0.5, e - 1.0, near)


@triton.jit
def tanh(x):
    e = exp_minus_one(-2.0 * tl.abs(x))
    return tl.where(x < 0, 1.0, -1.0) * (e / (e + 2.0))


@triton.jit
def log_of_one_plus(x):
    """Compute log(1 + x) for x >= 0, accurately near zero too."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def exact_dot(a, b, ACC: tl.constexpr):
    """a [M,K] @ b [K,N] without TF32."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def last_order(dtype: tl.constexpr):
    """A number that comes after all that order_of gives for this dtype."""
    if dtype == tl.float64:
        return tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    else:
        return tl.full((), 0x7FFFFFFF, tl.int32)


@triton.jit
def order_of(usage):
    """Integers, as wide as usage, in its order, NaN last; 0 and -0 are the same."""
    usage = tl.where(usage == usage, usage + 0.0, float("nan"))
    last = last_order(usage.dtype)
    bits = usage.to(last.dtype, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ last)


@triton.jit
def pick_row(values, h, BR):
    """Pick row h of values [BR,BN]."""
    return tl.sum(tl.where((tl.arange(0, BR) == h)[:, None], values, 0.0), axis=0)


@triton.jit
def put_row(values, h, row, BR):
    """values [BR,BN] with row h replaced."""
    return tl.where((tl.arange(0, BR) == h)[:, None], row[None, :], values)


@triton.jit
def load_row(ptr, h, W: tl.constexpr, ACC: tl.constexpr, BW: tl.constexpr):
    """Row h of [rows, W] as [BW], padded with zeros."""
    o_w = tl.arange(0, BW)
    return tl.load(ptr + h * W + o_w, mask=o_w < W, other=0.0).to(ACC)


@triton.jit
def load_rows(ptr, R, W: tl.constexpr, ACC: tl.constexpr, BR, BW: tl.constexpr):
    """[R,W] as [BR,BW], padded with zeros."""
    o_r, o_w = tl.arange(0, BR), tl.arange(0, BW)
    mask = (o_r < R)[:, None] & (o_w < W)[None, :]
    return tl.load(ptr + o_r[:, None] * W + o_w[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def load_tile(ptr, o_n, N: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr, BW: tl.constexpr):
    """Rows o_n [BN] of memory [N,W] as [BN,BW], padded with zeros."""
    o_w = tl.arange(0, BW)
    mask = (o_n < N)[:, None] & (o_w < W)[None, :]
    return tl.load(ptr + o_n[:, None] * W + o_w[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def store_tile(ptr, tile, o_n, N: tl.constexpr, W: tl.constexpr, BW: tl.constexpr):
    o_w = tl.arange(0, BW)
    mask = (o_n < N)[:, None] & (o_w < W)[None, :]
    tl.store(ptr + o_n[:, None] * W + o_w[None, :], tile, mask=mask)


@triton.jit
def load_heads(ptr, R, ACC: tl.constexpr, BR):
    """[R] as [BR], padded with zeros."""
    o_r = tl.arange(0, BR)
    return tl.load(ptr + o_r, mask=o_r < R, other=0.0).to(ACC)


@triton.jit
def load_strength(ptr, HAS_BETA: tl.constexpr, R, ACC: tl.constexpr, BR):
    """beta [R] as [BR]; 1 without."""
    beta = tl.full([BR], 1.0, ACC)
    if HAS_BETA:
        beta = load_heads(ptr, R, ACC, BR)
    return beta


@triton.jit
def load_slots(ptr, o_n, N: tl.constexpr, R, ACC: tl.constexpr, BR):
    """Columns o_n [BN] of [R,N] as [BR,BN], padded with zeros."""
    o_r = tl.arange(0, BR)
    mask = (o_r < R)[:, None] & (o_n < N)[None, :]
    return tl.load(ptr + o_r[:, None] * N + o_n[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def store_slots(ptr, values, o_n, N: tl.constexpr, R, BR):
    o_r = tl.arange(0, BR)
    mask = (o_r < R)[:, None] & (o_n < N)[None, :]
    tl.store(ptr + o_r[:, None] * N + o_n[None, :], values, mask=mask)


@triton.jit
def store_rows(ptr, rows, R, W: tl.constexpr, BR, BW: tl.constexpr):
    """Store rows [BR,BW] to [R,W]."""
    o_r, o_w = tl.arange(0, BR), tl.arange(0, BW)
    tl.store(ptr + o_r[:, None] * W + o_w[None, :], rows, mask=(o_r < R)[:, None] & (o_w < W)[None, :])


@triton.jit
def rows_by_tile(rows_ptr, tile, W: tl.constexpr, R, ACC: tl.constexpr,
                 BN: tl.constexpr, BW: tl.constexpr, BR):  # fmt: skip
    """rows [R,W] @ tile^T [BW,BN] -> [BR,BN]."""
    products = tl.zeros([BR, BN], ACC)
    for h in tl.range(0, R, disable_licm=True):
        row = load_row(rows_ptr, h, W, ACC, BW)
        products = put_row(products, h, tl.sum(tile * row[None, :], axis=1), BR)
    return products


@triton.jit
def slots_by_tile(slots, tile, R, ACC: tl.constexpr, BW: tl.constexpr, BR):
    """slots [BR,BN] @ tile [BN,BW] -> [BR,BW]."""
    products = tl.zeros([BR, BW], ACC)
    for h in tl.range(0, R, disable_licm=True):
        products = put_row(products, h, tl.sum(tile * pick_row(slots, h, BR)[:, None], axis=0), BR)
    return products


@triton.jit
def add_slots_by_rows(tile, slots, rows_ptr, W: tl.constexpr, R, ACC: tl.constexpr,
                      BW: tl.constexpr, BR):  # fmt: skip
    """tile [BN,BW] + slots^T [BN,BR] @ rows [R,W]."""
    for h in tl.range(0, R, disable_licm=True):
        tile += pick_row(slots, h, BR)[:, None] * load_row(rows_ptr, h, W, ACC, BW)[None, :]
    return tile


@triton.jit
def cosine_of(tile, key_ptr, eps: tl.constexpr, W: tl.constexpr, R, ACC: tl.constexpr,
              BN: tl.constexpr, BW: tl.constexpr, BR):  # fmt: skip
    """Eq. 2 for a tile: cosine and 1 / denominator [BR,BN], square sums of the rows [BN] and of the keys [BR]."""
    key = load_rows(key_ptr, R, W, ACC, BR, BW)
    key_square, square = tl.sum(key * key, axis=1), tl.sum(tile * tile, axis=1)
    inverse = 1.0 / tl.sqrt(key_square[:, None] * square[None, :] + eps)
    return rows_by_tile(key_ptr, tile, W, R, ACC, BN, BW, BR) * inverse, inverse, square, key_square


@triton.jit
def cosine_backward(dx, beta, tile, key_ptr, eps: tl.constexpr, W: tl.constexpr, R, ACC: tl.constexpr,
                    BN: tl.constexpr, BW: tl.constexpr, BR):  # fmt: skip
    """For x = beta * cosine and its gradient dx [BR,BN]: the gradient of the dot products [BR,BN], those of key [BR,BW] and beta
    [BR], and [BN] what to take off the gradient of each row, in units of that row. The cosine passes a gradient through the
    dot product, and through both norms."""
    cosine, inverse, square, key_square = cosine_of(tile, key_ptr, eps, W, R, ACC, BN, BW, BR)
    ddot = beta[:, None] * dx * inverse
    through_norm = ddot * cosine * inverse
    key = load_rows(key_ptr, R, W, ACC, BR, BW)
    dkey = slots_by_tile(ddot, tile, R, ACC, BW, BR) - tl.sum(through_norm * square[None, :], axis=1)[:, None] * key
    return ddot, dkey, tl.sum(dx * cosine, axis=1), tl.sum(through_norm * key_square[:, None], axis=0)


@triton.jit
def softmax(x, o_n, N: tl.constexpr):
    """Eq. 3 over the slots of the only tile: x [BR,BN], padding 0."""
    x = tl.where((o_n < N)[None, :], x, float("-inf"))
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def softmax_so_far(x, top, total, o_n, N: tl.constexpr):
    """The next tile of a softmax over many: e^(x - new maximum) [BR,BN], the new maximum and sum [BR], and what the sums so far
    were multiplied by."""
    x = tl.where((o_n < N)[None, :], x, float("-inf"))
    new_top = tl.maximum(top, tl.max(x, axis=1))
    e = tl.exp(x - new_top[:, None])
    scale = tl.exp(top - new_top)
    return e, new_top, total * scale + tl.sum(e, axis=1), scale


@triton.jit
def copy(source_ptr, target_ptr, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """`size` contiguous numbers; the types may differ."""
    for i0 in tl.range(0, size, BLOCK, disable_licm=True):
        o_i = i0 + tl.arange(0, BLOCK)
        tl.store(target_ptr + o_i, tl.load(source_ptr + o_i, mask=o_i < size, other=0.0).to(ACC), mask=o_i < size)


@triton.jit
def fill_zero(target_ptr, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    for i0 in tl.range(0, size, BLOCK, disable_licm=True):
        o_i = i0 + tl.arange(0, BLOCK)
        tl.store(target_ptr + o_i, tl.zeros([BLOCK], ACC), mask=o_i < size)


@triton.jit
def take(grad_ptr, target_ptr, size, PRESENT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """A gradient that may be absent."""
    if PRESENT:
        copy(grad_ptr, target_ptr, size, ACC, BLOCK)
    else:
        fill_zero(target_ptr, size, ACC, BLOCK)


@triton.jit
def length_of(length_ptr, T, HAS_LENGTHS: tl.constexpr):
    """The number of real steps of an example, in 0..T."""
    length = T
    if HAS_LENGTHS:
        length = tl.maximum(tl.minimum(tl.load(length_ptr), T), 0).to(tl.int32)
    return length
