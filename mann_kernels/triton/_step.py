"""One time step of the memory of one example, forward and backward.

Where one tile holds the whole memory (N <= BN), the memory, the read weights and the usage stay in registers from step to step,
as tensors m [BN,BW], weights [BR,BN] and usage [BN]. Where it does not, they stand in global memory, in practice in the
second-level cache, and come by in tiles at every step; those tensors are then placeholders of one element.
"""

import triton
import triton.language as tl

from mann_kernels.triton._tile import (
    add_slots_by_rows,
    copy,
    cosine_backward,
    cosine_of,
    fill_zero,
    last_order,
    load_heads,
    load_row,
    load_slots,
    load_strength,
    load_tile,
    order_of,
    rows_by_tile,
    sigmoid,
    slots_by_tile,
    softmax,
    softmax_so_far,
    store_rows,
    store_slots,
    store_tile,
)


@triton.jit
def memory_in(source_ptr, work_ptr, N: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr,
              BN: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    """A memory [N,W] into registers where one tile holds it, else into work_ptr."""
    if N <= BN:
        m = load_tile(source_ptr, tl.arange(0, BN), N, W, ACC, BW)
    else:
        copy(source_ptr, work_ptr, N * W, ACC, BN * BW)
        m = tl.zeros([1, 1], ACC)
    return m


@triton.jit
def memory_zero(work_ptr, N: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    if N <= BN:
        m = tl.zeros([BN, BW], ACC)
    else:
        fill_zero(work_ptr, N * W, ACC, BN * BW)
        m = tl.zeros([1, 1], ACC)
    return m


@triton.jit
def memory_out(m, work_ptr, target_ptr, N: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr,
               BN: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    """Store a tile of memory."""
    if N <= BN:
        store_tile(target_ptr, m, tl.arange(0, BN), N, W, BW)
    else:
        copy(work_ptr, target_ptr, N * W, ACC, BN * BW)


@triton.jit
def weights_in(source_ptr, work_ptr, N: tl.constexpr, R, ACC: tl.constexpr,
               BN: tl.constexpr, BR):  # fmt: skip
    """Read weights [R,N] into registers where one tile holds them, else into work_ptr."""
    if N <= BN:
        weights = load_slots(source_ptr, tl.arange(0, BN), N, R, ACC, BR)
    else:
        copy(source_ptr, work_ptr, R * N, ACC, BN * BR)
        weights = tl.zeros([1, 1], ACC)
    return weights


@triton.jit
def weights_zero(work_ptr, N: tl.constexpr, R, ACC: tl.constexpr, BN: tl.constexpr, BR):
    if N <= BN:
        weights = tl.zeros([BR, BN], ACC)
    else:
        fill_zero(work_ptr, R * N, ACC, BN * BR)
        weights = tl.zeros([1, 1], ACC)
    return weights


@triton.jit
def weights_out(weights, work_ptr, target_ptr, N: tl.constexpr, R, ACC: tl.constexpr,
                BN: tl.constexpr, BR):  # fmt: skip
    """Store read or write weights."""
    if N <= BN:
        store_slots(target_ptr, weights, tl.arange(0, BN), N, R, BR)
    else:
        copy(work_ptr, target_ptr, R * N, ACC, BN * BR)


@triton.jit
def usage_in(source_ptr, work_ptr, N: tl.constexpr, ACC: tl.constexpr, BU: tl.constexpr, BN: tl.constexpr):
    """Usage [N] into registers where one tile holds it, else into work_ptr."""
    if N <= BN:
        o_n = tl.arange(0, BN)
        usage = tl.load(source_ptr + o_n, mask=o_n < N, other=0.0).to(ACC)
    else:
        copy(source_ptr, work_ptr, N, ACC, BU)
        usage = tl.zeros([1], ACC)
    return usage


@triton.jit
def usage_out(usage, work_ptr, target_ptr, N: tl.constexpr, ACC: tl.constexpr, BU: tl.constexpr, BN: tl.constexpr):
    """Store a tile of usage."""
    if N <= BN:
        o_n = tl.arange(0, BN)
        tl.store(target_ptr + o_n, usage, mask=o_n < N)
    else:
        copy(work_ptr, target_ptr, N, ACC, BU)


@triton.jit
def slots_by_rank(order, N: tl.constexpr, ACC: tl.constexpr, BU: tl.constexpr, BR):
    """Slot [BR] of each rank: how many slots come before it by (order [BU], index)."""
    o_u = tl.arange(0, BU)
    order = tl.where(o_u < N, order, last_order(ACC))
    ahead = (order[:, None] < order[None, :]) | ((order[:, None] == order[None, :]) & (o_u[:, None] < o_u[None, :]))
    rank = tl.sum(ahead.to(tl.int32), axis=0)
    return tl.sum(tl.where(rank[None, :] == tl.arange(0, BR)[:, None], o_u[None, :], 0), axis=1)


@triton.jit
def least_after(order, o_n, last, last_slot, N: tl.constexpr, ACC: tl.constexpr):
    """The least (order, place) of a tile that comes after (last, last_slot), last_order where none does."""
    left = (o_n < N) & ((order > last) | ((order == last) & (o_n > last_slot)))
    return tl.min(tl.where(left, order, last_order(ACC)), axis=0, return_indices=True)


@triton.jit
def slots_by_rounds(order, usage_ptr, N: tl.constexpr, R, ACC: tl.constexpr, BU: tl.constexpr, BR):
    """Head after head: the least (order, index) that comes after the one before. No write to usage, no sort."""
    o_r, o_u = tl.arange(0, BR), tl.arange(0, BU)
    slots = tl.zeros([BR], tl.int32)
    last, last_slot = -last_order(ACC), tl.full((), -1, tl.int32)
    for h in tl.range(0, R, disable_licm=True):
        best, best_slot = least_after(order, o_u, last, last_slot, N, ACC)
        for n0 in range(BU, N, BU):
            o_n = n0 + o_u
            later = order_of(tl.load(usage_ptr + o_n, mask=o_n < N, other=0.0).to(ACC))
            lowest, place = least_after(later, o_n, last, last_slot, N, ACC)
            better = lowest < best  # a tie keeps the earlier tile
            best_slot = tl.where(better, n0 + place, best_slot)
            best = tl.where(better, lowest, best)
        slots = tl.where(o_r == h, best_slot, slots)
        last = best
        last_slot = best_slot
    return slots


@triton.jit
def choose_slots(usage, usage_ptr, slots_ptr, N: tl.constexpr, R, ACC: tl.constexpr,
                 BU: tl.constexpr, BR):  # fmt: skip
    """The R slots of least usage, ascending, ties to the lowest index -> slots int32 [BR], -1 where there is no head; and to
    slots_ptr [R] (eq. 6). The first BU of the usages [N] are usage [BU], the others come from usage_ptr."""
    o_r = tl.arange(0, BR)
    # in compiled code a round waits three times for all warps, and what it costs is what 2,048 comparisons do
    if N <= BU and BR > 1 and BU * BU <= 2048 * BR:
        slots = slots_by_rank(order_of(usage), N, ACC, BU, BR)
    else:
        slots = slots_by_rounds(order_of(usage), usage_ptr, N, R, ACC, BU, BR)
    slots = tl.where(o_r < R, slots, -1)
    tl.store(slots_ptr + o_r, slots, mask=o_r < R)
    return slots


@triton.jit
def own_slots(slots, o_n, SHARED: tl.constexpr, ACC: tl.constexpr):
    """1 where a head writes to a least-used slot: slots [BR] (-1: no head), o_n [BN] -> [BR,BN]."""
    own = (slots[:, None] == o_n[None, :]).to(ACC)
    if SHARED:
        own = tl.where(slots[:, None] >= 0, tl.sum(own, axis=0)[None, :], 0.0)
    return own


@triton.jit
def erased_slots(slots, o_n, ERASE_ALL: tl.constexpr, BR):
    """Say for each slot, bool [BN], whether it is erased before the write."""
    hit = slots[:, None] == o_n[None, :]
    if not ERASE_ALL:
        hit = hit & (tl.arange(0, BR)[:, None] == 0)
    return tl.max(hit.to(tl.int32), axis=0) > 0


@triton.jit
def write_weights_of(gate, previous, slots, o_n, SHARED: tl.constexpr, ACC: tl.constexpr):
    """Eq. 7 for a tile: sigmoid(gate) [BR], previous read weights [BR,BN] -> [BR,BN]."""
    return gate[:, None] * previous + (1.0 - gate[:, None]) * own_slots(slots, o_n, SHARED, ACC)


@triton.jit
def erase_and_write(tile, write, slots, o_n, add_ptr, ERASE_ALL: tl.constexpr, W: tl.constexpr, R,
                    ACC: tl.constexpr, BW: tl.constexpr, BR):  # fmt: skip
    """Eq. 8 for a tile, on the erased memory."""
    tile = tl.where(erased_slots(slots, o_n, ERASE_ALL, BR)[:, None], 0.0, tile)
    return add_slots_by_rows(tile, write, add_ptr, W, R, ACC, BW, BR)


@triton.jit
def keep_rows(m, source_ptr, rows_ptr, slots_ptr, N: tl.constexpr, W: tl.constexpr, R,
              ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    """The rows of the least-used slots to rows_ptr [R,W]."""
    o_w = tl.arange(0, BW)
    for h in tl.range(0, R, disable_licm=True):
        slot = tl.load(slots_ptr + h)
        if N <= BN:
            row = tl.sum(tl.where((tl.arange(0, BN) == slot)[:, None], m, 0.0), axis=0)
        else:
            row = load_row(source_ptr, slot, W, ACC, BW)
        tl.store(rows_ptr + h * W + o_w, row, mask=o_w < W)
    tl.debug_barrier()


@triton.jit
def step_forward(
    m, previous, usage,  # in registers: memory, read weights and usage before the step
    source_ptr, target_ptr,  # [N,W] memory before the step and after it; may be one
    previous_ptr, weights_ptr,  # [R,N] read weights before the step, and of it
    x_ptr,  # [R,N] of ACC; may be weights_ptr
    usage_ptr, new_usage_ptr,  # [N] before the step and after it
    key_ptr, add_ptr, gate_ptr, beta_ptr,  # [R,W], [R,W], [R] before the sigmoid, [R]
    slots_ptr,  # int32 [R], the least-used slots: out with CHOOSE, else in
    rows_ptr,  # [R,W] out without CHOOSE: what stood in those slots
    N: tl.constexpr, W: tl.constexpr, R, decay: tl.constexpr, eps: tl.constexpr,
    CHOOSE: tl.constexpr,  # False: the step is recomputed, for its weights, memory and overwritten rows
    HAS_BETA: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr, ACC: tl.constexpr,
    BU: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR,
):  # fmt: skip
    """One step in one pass over the memory; returns memory, read weights and usage after it, and reads [BR,BW] (with CHOOSE)."""
    o_r, o_u = tl.arange(0, BR), tl.arange(0, BU)
    if CHOOSE:
        if N <= BN:
            slots = choose_slots(usage, usage_ptr, slots_ptr, N, R, ACC, BU, BR)
        else:
            first = tl.load(usage_ptr + o_u, mask=o_u < N, other=0.0).to(ACC)
            slots = choose_slots(first, usage_ptr, slots_ptr, N, R, ACC, BU, BR)
    else:
        keep_rows(m, source_ptr, rows_ptr, slots_ptr, N, W, R, ACC, BN, BW)
        slots = tl.load(slots_ptr + o_r, mask=o_r < R, other=-1)
    gate = sigmoid(load_heads(gate_ptr, R, ACC, BR))
    beta = load_strength(beta_ptr, HAS_BETA, R, ACC, BR)
    reads = tl.zeros([BR, BW], ACC)
    if N <= BN:
        o_n = tl.arange(0, BN)
        write = write_weights_of(gate, previous, slots, o_n, SHARED, ACC)
        m = erase_and_write(m, write, slots, o_n, add_ptr, ERASE_ALL, W, R, ACC, BW, BR)
        cosine, _, _, _ = cosine_of(m, key_ptr, eps, W, R, ACC, BN, BW, BR)
        previous = softmax(beta[:, None] * cosine, o_n, N)  # eq. 3
        previous = tl.where((o_r < R)[:, None], previous, 0.0)
        if CHOOSE:
            reads = slots_by_tile(previous, m, R, ACC, BW, BR)  # eq. 4
            usage = decay * usage + tl.sum(previous, axis=0) + tl.sum(write, axis=0)  # eq. 5
    else:
        top, total = tl.full([BR], float("-inf"), ACC), tl.zeros([BR], ACC)
        for n0 in range(0, N, BN):
            o_n = n0 + tl.arange(0, BN)
            write = write_weights_of(gate, load_slots(previous_ptr, o_n, N, R, ACC, BR), slots, o_n, SHARED, ACC)
            tile = load_tile(source_ptr, o_n, N, W, ACC, BW)
            tile = erase_and_write(tile, write, slots, o_n, add_ptr, ERASE_ALL, W, R, ACC, BW, BR)
            # a tile smaller than the program is held by several warps: none may read what another replaced
            tl.debug_barrier()  # before target_ptr
            store_tile(target_ptr, tile, o_n, N, W, BW)
            cosine, _, _, _ = cosine_of(tile, key_ptr, eps, W, R, ACC, BN, BW, BR)
            x = beta[:, None] * cosine
            store_slots(x_ptr, x, o_n, N, R, BR)
            e, top, total, scale = softmax_so_far(x, top, total, o_n, N)
            if CHOOSE:
                reads = reads * scale[:, None] + slots_by_tile(e, tile, R, ACC, BW, BR)
        tl.debug_barrier()
        for n0 in range(0, N, BN):
            o_n = n0 + tl.arange(0, BN)
            weights = tl.exp(load_slots(x_ptr, o_n, N, R, ACC, BR) - top[:, None]) / total[:, None]
            old = tl.load(usage_ptr + o_n, mask=o_n < N, other=0.0).to(ACC) if CHOOSE else 0.0
            tl.debug_barrier()
            store_slots(weights_ptr, weights, o_n, N, R, BR)
            if CHOOSE:
                write = write_weights_of(gate, load_slots(previous_ptr, o_n, N, R, ACC, BR), slots, o_n, SHARED, ACC)
                weights = tl.where((o_r < R)[:, None], weights, 0.0)
                new = decay * old + tl.sum(weights, axis=0) + tl.sum(write, axis=0)
                tl.store(new_usage_ptr + o_n, new, mask=o_n < N)
        tl.debug_barrier()
        reads = reads / total[:, None]
    return m, previous, usage, reads


@triton.jit
def backward_of_tile(
    m, dm,  # [BN,BW] after the step, and its gradient
    weights, dx, previous,  # [BR,BN] read weights, the gradient of the similarities, read weights before the step
    o_n, gate, beta, slots,  # [BN], [BR] after the sigmoid, [BR], int32 [BR]
    dreads_ptr, key_ptr, add_ptr, slots_ptr, rows_ptr,  # as in step_backward
    W: tl.constexpr, R, eps: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr,
    ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR,
):  # fmt: skip
    """Memory, its gradient and that of the read weights before the step; this tile's share of dkey, dadd [BR,BW], dbeta and
    dgate [BR]."""
    ddot, dkey, dbeta, shrink = cosine_backward(dx, beta, m, key_ptr, eps, W, R, ACC, BN, BW, BR)
    dm = add_slots_by_rows(dm - shrink[:, None] * m, weights, dreads_ptr, W, R, ACC, BW, BR)
    dm = add_slots_by_rows(dm, ddot, key_ptr, W, R, ACC, BW, BR)
    # the write, undone
    write = write_weights_of(gate, previous, slots, o_n, SHARED, ACC)
    dadd = slots_by_tile(write, dm, R, ACC, BW, BR)
    dwrite = rows_by_tile(add_ptr, dm, W, R, ACC, BN, BW, BR)
    dgate = tl.sum(dwrite * (previous - own_slots(slots, o_n, SHARED, ACC)), axis=1) * gate * (1.0 - gate)
    m = add_slots_by_rows(m, -write, add_ptr, W, R, ACC, BW, BR)
    for h in tl.range(0, R, disable_licm=True):  # exactly, where the most was overwritten
        overwritten = o_n == tl.load(slots_ptr + h)
        m = tl.where(overwritten[:, None], load_row(rows_ptr, h, W, ACC, BW)[None, :], m)
    dm = tl.where(erased_slots(slots, o_n, ERASE_ALL, BR)[:, None], 0.0, dm)
    return m, dm, gate[:, None] * dwrite, dkey, dadd, dbeta, dgate


@triton.jit
def step_backward(
    m, dm, weights, dweights, previous,  # in registers: memory after the step and its gradient, read weights of the step and
    # their gradient, read weights before it
    memory_ptr, dmemory_ptr,  # [N,W] in: after the step; out: before it
    weights_ptr, previous_ptr,  # [R,N] read weights of the step, and before it
    dweights_ptr, dprevious_ptr,  # [R,N] of ACC: their gradients, in (destroyed) and out
    dreads_ptr, key_ptr, add_ptr, gate_ptr, beta_ptr, slots_ptr,  # [R,W], and as forward
    rows_ptr,  # [R,W], what stood in the least-used slots before the step
    dkey_ptr, dadd_ptr, dgate_ptr, dbeta_ptr,  # [R,W], [R,W], [R], [R] out
    N: tl.constexpr, W: tl.constexpr, R, eps: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_ADD: tl.constexpr,  # False: the key is what is written, and dkey takes the gradient of both
    SHARED: tl.constexpr, ERASE_ALL: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BR,
):  # fmt: skip
    """Backward of step_forward; the writes are undone. Returns the memory before the step, its gradient, and that of the read
    weights before the step."""
    o_r = tl.arange(0, BR)
    slots = tl.load(slots_ptr + o_r, mask=o_r < R, other=-1)
    gate = sigmoid(load_heads(gate_ptr, R, ACC, BR))
    beta = load_strength(beta_ptr, HAS_BETA, R, ACC, BR)
    # the read: dw = dr M^T, and its mean under the softmax
    if N <= BN:
        dweights += rows_by_tile(dreads_ptr, m, W, R, ACC, BN, BW, BR)
        dx = weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None])
        m, dm, dweights, dkey, dadd, dbeta, dgate = backward_of_tile(
            m, dm, weights, dx, previous, tl.arange(0, BN), gate, beta, slots,
            dreads_ptr, key_ptr, add_ptr, slots_ptr, rows_ptr, W, R, eps, SHARED, ERASE_ALL, ACC, BN, BW, BR,
        )  # fmt: skip
    else:
        mean = tl.zeros([BR], ACC)
        for n0 in range(0, N, BN):
            o_n = n0 + tl.arange(0, BN)
            tile = load_tile(memory_ptr, o_n, N, W, ACC, BW)
            dslots = load_slots(dweights_ptr, o_n, N, R, ACC, BR)
            dslots += rows_by_tile(dreads_ptr, tile, W, R, ACC, BN, BW, BR)
            tl.debug_barrier()
            store_slots(dweights_ptr, dslots, o_n, N, R, BR)
            mean += tl.sum(load_slots(weights_ptr, o_n, N, R, ACC, BR) * dslots, axis=1)
        tl.debug_barrier()
        dkey, dadd = tl.zeros([BR, BW], ACC), tl.zeros([BR, BW], ACC)
        dbeta, dgate = tl.zeros([BR], ACC), tl.zeros([BR], ACC)
        for n0 in range(0, N, BN):
            o_n = n0 + tl.arange(0, BN)
            read = load_slots(weights_ptr, o_n, N, R, ACC, BR)
            tile, dtile, dslots, dkey_tile, dadd_tile, dbeta_tile, dgate_tile = backward_of_tile(
                load_tile(memory_ptr, o_n, N, W, ACC, BW), load_tile(dmemory_ptr, o_n, N, W, ACC, BW),
                read, read * (load_slots(dweights_ptr, o_n, N, R, ACC, BR) - mean[:, None]),
                load_slots(previous_ptr, o_n, N, R, ACC, BR), o_n, gate, beta, slots,
                dreads_ptr, key_ptr, add_ptr, slots_ptr, rows_ptr, W, R, eps, SHARED, ERASE_ALL, ACC, BN, BW, BR,
            )  # fmt: skip
            tl.debug_barrier()
            store_tile(memory_ptr, tile, o_n, N, W, BW)
            store_tile(dmemory_ptr, dtile, o_n, N, W, BW)
            store_slots(dprevious_ptr, dslots, o_n, N, R, BR)
            dkey += dkey_tile
            dadd += dadd_tile
            dbeta += dbeta_tile
            dgate += dgate_tile
    if HAS_ADD:
        store_rows(dadd_ptr, dadd, R, W, BR, BW)
    else:
        dkey += dadd
    store_rows(dkey_ptr, dkey, R, W, BR, BW)
    tl.store(dgate_ptr + o_r, dgate, mask=o_r < R)
    if HAS_BETA:
        tl.store(dbeta_ptr + o_r, dbeta, mask=o_r < R)
    tl.debug_barrier()
    return m, dm, dweights
