"""One time step of the memory of one example, forward and backward: what every kernel with a memory is made of.

A program works for one example. Slots come in tiles of BN; heads and slot width are padded to BR and BW, whose padding holds
zeros. Everything is computed in ACC, float32 or float64, whatever the storage type. What one thread wrote to global memory
another may read after tl.debug_barrier(), not before.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def exp_minus_one(x):
    """Accurate near zero too: the rounding of e^x is divided out again (Kahan)."""
    e = tl.exp(x)
    log = tl.log(e)
    return tl.where(e == 1.0, x, tl.where(e == 0.0, -1.0, (e - 1.0) * (x / tl.where(log == 0.0, 1.0, log))))


@triton.jit
def tanh(x):
    e = exp_minus_one(-2.0 * tl.abs(x))
    return tl.where(x < 0, 1.0, -1.0) * (e / (e + 2.0))


@triton.jit
def log_of_one_plus(x):
    """For x >= 0, accurate near zero too."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def exact_dot(a, b, ACC: tl.constexpr):
    """a [M,K] @ b [K,N] without TF32."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def order_of(usage):
    """int64 numbers in the order of usage, NaN last; 0 and -0 are the same."""
    usage = tl.where(usage == usage, usage + 0.0, float("nan"))
    if usage.dtype == tl.float64:
        bits = usage.to(tl.int64, bitcast=True)
        return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFFFFFFFFFF)
    else:
        bits = usage.to(tl.int32, bitcast=True)
        return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def choose_slots(usage_ptr, slots_ptr, N, R, ACC: tl.constexpr, BN: tl.constexpr):
    """The R slots of least usage [N], ascending, ties to the lowest index -> slots int32 [R] (eq. 6).

    Head after head: the least (usage, index) that comes after the one before. No write to usage, no sort.
    """
    last = tl.full((), -0x7FFFFFFFFFFFFFFF, tl.int64)
    last_slot = tl.full((), -1, tl.int32)
    for h in range(0, R):
        best = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
        best_slot = tl.full((), 0x7FFFFFFF, tl.int32)
        for n0 in range(0, N, BN):
            o_n = n0 + tl.arange(0, BN)
            order = order_of(tl.load(usage_ptr + o_n, mask=o_n < N, other=0.0).to(ACC))
            left = (o_n < N) & ((order > last) | ((order == last) & (o_n > last_slot)))
            order = tl.where(left, order, 0x7FFFFFFFFFFFFFFF)
            lowest = tl.min(order, axis=0)
            slot = tl.min(tl.where(left & (order == lowest), o_n, 0x7FFFFFFF), axis=0)
            better = lowest < best  # a tie keeps the earlier tile
            best_slot = tl.where(better, slot, best_slot)
            best = tl.where(better, lowest, best)
        tl.store(slots_ptr + h, best_slot)
        last = best
        last_slot = best_slot


@triton.jit
def own_slots(slots, o_n, SHARED: tl.constexpr, ACC: tl.constexpr):
    """1 where a head writes to a least-used slot: slots [BR] (-1: no head), o_n [BN] -> [BR,BN]."""
    own = (slots[:, None] == o_n[None, :]).to(ACC)
    if SHARED:
        own = tl.where(slots[:, None] >= 0, tl.sum(own, axis=0)[None, :], 0.0)
    return own


@triton.jit
def erased_slots(slots, o_n, ERASE_ALL: tl.constexpr, BR: tl.constexpr):
    """Whether a slot is erased before the write: bool [BN]."""
    hit = slots[:, None] == o_n[None, :]
    if not ERASE_ALL:
        hit = hit & (tl.arange(0, BR)[:, None] == 0)
    return tl.max(hit.to(tl.int32), axis=0) > 0


@triton.jit
def load_rows(ptr, rows, columns, ACC: tl.constexpr, BROWS: tl.constexpr, BCOLUMNS: tl.constexpr):
    """[rows, columns] of contiguous memory as [BROWS,BCOLUMNS], padded with zeros."""
    o_i, o_j = tl.arange(0, BROWS), tl.arange(0, BCOLUMNS)
    mask = (o_i < rows)[:, None] & (o_j < columns)[None, :]
    return tl.load(ptr + o_i[:, None] * columns + o_j[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def store_rows(ptr, value, rows, columns, BROWS: tl.constexpr, BCOLUMNS: tl.constexpr):
    o_i, o_j = tl.arange(0, BROWS), tl.arange(0, BCOLUMNS)
    mask = (o_i < rows)[:, None] & (o_j < columns)[None, :]
    tl.store(ptr + o_i[:, None] * columns + o_j[None, :], value, mask=mask)


@triton.jit
def copy(source_ptr, target_ptr, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """`size` contiguous numbers; the types may differ."""
    for i0 in range(0, size, BLOCK):
        o_i = i0 + tl.arange(0, BLOCK)
        tl.store(target_ptr + o_i, tl.load(source_ptr + o_i, mask=o_i < size, other=0.0).to(ACC), mask=o_i < size)


@triton.jit
def fill_zero(target_ptr, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    for i0 in range(0, size, BLOCK):
        o_i = i0 + tl.arange(0, BLOCK)
        tl.store(target_ptr + o_i, tl.zeros([BLOCK], ACC), mask=o_i < size)


@triton.jit
def similarity(key, key_square, m, beta, eps, ACC: tl.constexpr):
    """Eq. 2 for a tile: key [BR,BW], m [BN,BW] -> beta * cosine, cosine, 1 / denominator [BR,BN], square sums [BN]."""
    dots = exact_dot(key, tl.trans(m), ACC)
    square = tl.sum(m * m, axis=1)
    inverse = 1.0 / tl.sqrt(key_square[:, None] * square[None, :] + eps)
    cosine = dots * inverse
    return beta[:, None] * cosine, cosine, inverse, square


@triton.jit
def step_forward(
    source_ptr,  # [N,W] memory before the step
    target_ptr,  # [N,W] memory after it, out; may be source_ptr
    usage_ptr,  # [N] before the step
    new_usage_ptr,  # [N] out; may be usage_ptr
    previous_ptr,  # [R,N] read weights of the previous step
    weights_ptr,  # [R,N] read weights, out
    x_ptr,  # [R,N] of ACC: the similarities; may be weights_ptr
    key_ptr,  # [R,W]
    add_ptr,  # [R,W]
    gate_ptr,  # [R], before the sigmoid
    beta_ptr,  # [R]
    slots_ptr,  # int32 [R], the least-used slots: out with CHOOSE, else in
    rows_ptr,  # [R,W] out without CHOOSE: what stood in those slots
    N,
    W,
    R,
    decay,
    eps,
    CHOOSE: tl.constexpr,  # False: the step is taken again, for its weights, memory and overwritten rows
    HAS_BETA: tl.constexpr,
    SHARED: tl.constexpr,
    ERASE_ALL: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BR: tl.constexpr,
):
    """One step in one pass over the memory; returns reads [BR,BW] (with CHOOSE)."""
    o_r, o_w = tl.arange(0, BR), tl.arange(0, BW)
    m_r, m_w = o_r < R, o_w < W
    m_rw = m_r[:, None] & m_w[None, :]
    if CHOOSE:
        choose_slots(usage_ptr, slots_ptr, N, R, ACC, BN)
        tl.debug_barrier()
    slots = tl.load(slots_ptr + o_r, mask=m_r, other=-1)
    if not CHOOSE:
        rows = tl.load(source_ptr + slots[:, None].to(tl.int64) * W + o_w[None, :], mask=m_rw, other=0.0)
        tl.store(rows_ptr + o_r[:, None] * W + o_w[None, :], rows, mask=m_rw)
        tl.debug_barrier()
    key = load_rows(key_ptr, R, W, ACC, BR, BW)
    add = load_rows(add_ptr, R, W, ACC, BR, BW)
    gate = sigmoid(tl.load(gate_ptr + o_r, mask=m_r, other=0.0).to(ACC))
    beta = tl.full([BR], 1.0, ACC)
    if HAS_BETA:
        beta = tl.load(beta_ptr + o_r, mask=m_r, other=1.0).to(ACC)
    key_square = tl.sum(key * key, axis=1)
    top = tl.full([BR], float("-inf"), ACC)
    total = tl.zeros([BR], ACC)
    reads = tl.zeros([BR, BW], ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        m_n = o_n < N
        at = o_r[:, None].to(tl.int64) * N + o_n[None, :]
        m_rn = m_r[:, None] & m_n[None, :]
        tile = o_n[:, None].to(tl.int64) * W + o_w[None, :]
        m_nw = m_n[:, None] & m_w[None, :]
        # eq. 7
        previous = tl.load(previous_ptr + at, mask=m_rn, other=0.0).to(ACC)
        write = gate[:, None] * previous + (1.0 - gate[:, None]) * own_slots(slots, o_n, SHARED, ACC)
        # eq. 8, on the erased memory
        m = tl.load(source_ptr + tile, mask=m_nw, other=0.0).to(ACC)
        m = tl.where(erased_slots(slots, o_n, ERASE_ALL, BR)[:, None], 0.0, m) + exact_dot(tl.trans(write), add, ACC)
        tl.store(target_ptr + tile, m, mask=m_nw)
        # eq. 2 to 4; the softmax is corrected as larger similarities come
        x, _, _, _ = similarity(key, key_square, m, beta, eps, ACC)
        tl.store(x_ptr + at, x, mask=m_rn)
        x = tl.where(m_n[None, :], x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, axis=1))
        e = tl.exp(x - new_top[:, None])
        scale = tl.exp(top - new_top)
        total = total * scale + tl.sum(e, axis=1)
        if CHOOSE:
            reads = reads * scale[:, None] + exact_dot(e, m, ACC)
        top = new_top
    tl.debug_barrier()
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        m_n = o_n < N
        at = o_r[:, None].to(tl.int64) * N + o_n[None, :]
        m_rn = m_r[:, None] & m_n[None, :]
        x = tl.load(x_ptr + at, mask=m_rn, other=float("-inf"))
        weights = tl.where(m_r[:, None], tl.exp(x - top[:, None]) / total[:, None], 0.0)
        tl.store(weights_ptr + at, weights, mask=m_rn)
        if CHOOSE:  # eq. 5
            previous = tl.load(previous_ptr + at, mask=m_rn, other=0.0).to(ACC)
            write = gate[:, None] * previous + (1.0 - gate[:, None]) * own_slots(slots, o_n, SHARED, ACC)
            usage = tl.load(usage_ptr + o_n, mask=m_n, other=0.0).to(ACC)
            usage = decay * usage + tl.sum(weights, axis=0) + tl.sum(write, axis=0)
            tl.store(new_usage_ptr + o_n, usage, mask=m_n)
    tl.debug_barrier()
    return reads / total[:, None]


@triton.jit
def step_backward(
    memory_ptr,  # [N,W] in: after the step; out: before it
    dmemory_ptr,  # [N,W] likewise, its gradient
    dweights_ptr,  # [R,N] in: of this step's read weights; destroyed
    dprevious_ptr,  # [R,N] out: of the previous step's read weights
    dreads,  # [BR,BW]
    weights_ptr,  # [R,N] read weights of the step
    previous_ptr,  # [R,N] of the previous step
    key_ptr,  # [R,W]
    add_ptr,  # [R,W]
    gate_ptr,  # [R], before the sigmoid
    beta_ptr,  # [R]
    slots_ptr,  # int32 [R]
    rows_ptr,  # [R,W], what stood in the least-used slots before the step
    dkey_ptr,  # [R,W] out
    dadd_ptr,  # [R,W] out
    dgate_ptr,  # [R] out
    dbeta_ptr,  # [R] out
    N,
    W,
    R,
    eps,
    HAS_BETA: tl.constexpr,
    HAS_ADD: tl.constexpr,  # False: the key is what is written, and dkey takes the gradient of both
    SHARED: tl.constexpr,
    ERASE_ALL: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BR: tl.constexpr,
):
    """Backward of step_forward; the writes are undone."""
    o_r, o_w = tl.arange(0, BR), tl.arange(0, BW)
    m_r, m_w = o_r < R, o_w < W
    m_rw = m_r[:, None] & m_w[None, :]
    slots = tl.load(slots_ptr + o_r, mask=m_r, other=-1)
    key = load_rows(key_ptr, R, W, ACC, BR, BW)
    add = load_rows(add_ptr, R, W, ACC, BR, BW)
    gate = sigmoid(tl.load(gate_ptr + o_r, mask=m_r, other=0.0).to(ACC))
    beta = tl.full([BR], 1.0, ACC)
    if HAS_BETA:
        beta = tl.load(beta_ptr + o_r, mask=m_r, other=1.0).to(ACC)
    key_square = tl.sum(key * key, axis=1)
    # the read: dw = dr M^T, and its mean under the softmax
    mean = tl.zeros([BR], ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        m_n = o_n < N
        at = o_r[:, None].to(tl.int64) * N + o_n[None, :]
        m_rn = m_r[:, None] & m_n[None, :]
        tile = o_n[:, None].to(tl.int64) * W + o_w[None, :]
        m = tl.load(memory_ptr + tile, mask=m_n[:, None] & m_w[None, :], other=0.0).to(ACC)
        dweights = tl.load(dweights_ptr + at, mask=m_rn, other=0.0) + exact_dot(dreads, tl.trans(m), ACC)
        tl.store(dweights_ptr + at, dweights, mask=m_rn)
        mean += tl.sum(tl.load(weights_ptr + at, mask=m_rn, other=0.0).to(ACC) * dweights, axis=1)
    tl.debug_barrier()
    dkey, dadd = tl.zeros([BR, BW], ACC), tl.zeros([BR, BW], ACC)
    dbeta, dkey_factor, dgate = tl.zeros([BR], ACC), tl.zeros([BR], ACC), tl.zeros([BR], ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        m_n = o_n < N
        at = o_r[:, None].to(tl.int64) * N + o_n[None, :]
        m_rn = m_r[:, None] & m_n[None, :]
        tile = o_n[:, None].to(tl.int64) * W + o_w[None, :]
        m_nw = m_n[:, None] & m_w[None, :]
        m = tl.load(memory_ptr + tile, mask=m_nw, other=0.0).to(ACC)
        dm = tl.load(dmemory_ptr + tile, mask=m_nw, other=0.0).to(ACC)
        weights = tl.load(weights_ptr + at, mask=m_rn, other=0.0).to(ACC)
        dx = weights * (tl.load(dweights_ptr + at, mask=m_rn, other=0.0) - mean[:, None])
        # the cosine: through the dot product, and through both norms
        _, cosine, inverse, square = similarity(key, key_square, m, beta, eps, ACC)
        ddot = beta[:, None] * dx * inverse
        through_norm = ddot * cosine * inverse
        dbeta += tl.sum(dx * cosine, axis=1)
        dkey += exact_dot(ddot, m, ACC)
        dkey_factor += tl.sum(through_norm * square[None, :], axis=1)
        dm += exact_dot(tl.trans(weights), dreads, ACC) + exact_dot(tl.trans(ddot), key, ACC)
        dm -= tl.sum(through_norm * key_square[:, None], axis=0)[:, None] * m
        # the write
        own = own_slots(slots, o_n, SHARED, ACC)
        previous = tl.load(previous_ptr + at, mask=m_rn, other=0.0).to(ACC)
        write = gate[:, None] * previous + (1.0 - gate[:, None]) * own
        dadd += exact_dot(write, dm, ACC)
        dwrite = exact_dot(add, tl.trans(dm), ACC)
        dgate += tl.sum(dwrite * (previous - own), axis=1)
        tl.store(dprevious_ptr + at, gate[:, None] * dwrite, mask=m_rn)
        tl.store(memory_ptr + tile, m - exact_dot(tl.trans(write), add, ACC), mask=m_nw)
        dm = tl.where(erased_slots(slots, o_n, ERASE_ALL, BR)[:, None], 0.0, dm)
        tl.store(dmemory_ptr + tile, dm, mask=m_nw)
    dkey -= dkey_factor[:, None] * key
    if HAS_ADD:
        store_rows(dadd_ptr, dadd, R, W, BR, BW)
    else:
        dkey += dadd
    store_rows(dkey_ptr, dkey, R, W, BR, BW)
    tl.store(dgate_ptr + o_r, dgate * gate * (1.0 - gate), mask=m_r)
    if HAS_BETA:
        tl.store(dbeta_ptr + o_r, dbeta, mask=m_r)
    tl.debug_barrier()
    rows = tl.load(rows_ptr + o_r[:, None] * W + o_w[None, :], mask=m_rw, other=0.0)
    tl.store(memory_ptr + slots[:, None].to(tl.int64) * W + o_w[None, :], rows, mask=m_rw)
    tl.debug_barrier()
