"""Triton kernels of lrua_sequence, and of lrua_step as a sequence of one: the loop over time runs inside the kernel."""

import functools

import torch
import triton
import triton.language as tl

from mann_kernels.ops.lrua_sequence import empty_saved
from mann_kernels.triton._launch import RESTART_EVERY, acc_of, aligned, contiguous, launch, pointer
from mann_kernels.triton._step import (
    memory_in,
    memory_out,
    memory_zero,
    step_backward,
    step_forward,
    usage_in,
    usage_out,
    weights_in,
    weights_out,
    weights_zero,
)
from mann_kernels.triton._tile import fill_zero, length_of, load_slots, store_rows, store_slots


@triton.jit(do_not_specialize=["T", "B", "checkpoint_every"])
def lrua_sequence_fwd_kernel(
    memory_ptr, usage_ptr, previous_ptr,  # [B,N,W], [B,N], [B,R,N]: the state before
    key_ptr, gate_ptr, beta_ptr, add_ptr,  # [T,B,R,W], [T,B,R], [T,B,R], [T,B,R,W]
    lengths_ptr,  # int64 [B]
    reads_ptr,  # [T,B,R,W] out
    new_memory_ptr, new_usage_ptr, new_weights_ptr,  # the state after, out
    slots_ptr,  # int32 [T,B,R] out
    copies_ptr, weight_copies_ptr,  # [copies,B,N,W], [copies,B,R,N] out, of ACC; with SAVE
    work_memory_ptr, work_weights_ptr, work_usage_ptr,  # of ACC, where not in registers: [B,N,W], [2,B,R,N], [B,N]
    T, B, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr, checkpoint_every, decay: tl.constexpr, eps: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_ADD: tl.constexpr, HAS_LENGTHS: tl.constexpr, SAVE: tl.constexpr,
    SHARED: tl.constexpr, ERASE_ALL: tl.constexpr, ACC: tl.constexpr,
    BU: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    length = length_of(lengths_ptr + i_b, T, HAS_LENGTHS)
    memory = work_memory_ptr + i_b * N * W
    before = work_weights_ptr + i_b * R * N
    usage = work_usage_ptr + i_b * N
    m = memory_in(memory_ptr + i_b * N * W, memory, N, W, ACC, BN, BW)
    weights = weights_in(previous_ptr + i_b * R * N, before, N, R, ACC, BN, BR)
    u = usage_in(usage_ptr + i_b * N, usage, N, ACC, BU, BN)
    tl.debug_barrier()
    for t in tl.range(0, length, disable_licm=True):
        at = (t * B + i_b) * R
        before = work_weights_ptr + (t % 2 * B + i_b) * R * N  # the two buffers take turns
        after = work_weights_ptr + ((t + 1) % 2 * B + i_b) * R * N
        words = key_ptr + at * W
        m, weights, u, reads = step_forward(
            m, weights, u, memory, memory, before, after, after, usage, usage,
            words, add_ptr + at * W if HAS_ADD else words, gate_ptr + at, beta_ptr + at, slots_ptr + at, memory,
            N, W, R, decay, eps, True, HAS_BETA, SHARED, ERASE_ALL, ACC, BU, BN, BW, BR,
        )  # fmt: skip
        store_rows(reads_ptr + at * W, reads, R, W, BR, BW)
        if SAVE:
            if ((t + 1) % checkpoint_every == 0) & (t + 1 < T):
                i_copy = (t // checkpoint_every) * B + i_b
                memory_out(m, memory, copies_ptr + i_copy * N * W, N, W, ACC, BN, BW)
                weights_out(weights, after, weight_copies_ptr + i_copy * R * N, N, R, ACC, BN, BR)
    for t in tl.range(length, T, disable_licm=True):
        at = (t * B + i_b) * R
        fill_zero(reads_ptr + at * W, R * W, ACC, BU)
        fill_zero(slots_ptr + at, R, tl.int32, BR)
    memory_out(m, memory, new_memory_ptr + i_b * N * W, N, W, ACC, BN, BW)
    last = work_weights_ptr + (length % 2 * B + i_b) * R * N
    weights_out(weights, last, new_weights_ptr + i_b * R * N, N, R, ACC, BN, BR)
    usage_out(u, usage, new_usage_ptr + i_b * N, N, ACC, BU, BN)


@triton.jit
def recompute_segment(
    memory_ptr, previous_ptr, copies_ptr, weight_copies_ptr,  # the state before the episode, and as forward
    key_ptr, gate_ptr, beta_ptr, add_ptr, slots_ptr,  # as forward
    memory, records_ptr, restarts_ptr,  # as backward; memory is this example's
    i_b, i_segment, start, steps, B, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr, heads, eps: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_ADD: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr,
    RESTART: tl.constexpr, ACC: tl.constexpr, RECORD: tl.constexpr,
    BU: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Run the steps of a segment again from the state before it, with a record of each and copies of the memory to restart
    from; returns memory and read weights after the last."""
    record = records_ptr + i_b * RECORD
    if i_segment == 0:
        m = memory_in(memory_ptr + i_b * N * W, memory, N, W, ACC, BN, BW)
        weights = weights_in(previous_ptr + i_b * R * N, record, N, R, ACC, BN, BR)
    else:
        i_copy = (i_segment - 1) * B + i_b
        m = memory_in(copies_ptr + i_copy * N * W, memory, N, W, ACC, BN, BW)
        weights = weights_in(weight_copies_ptr + i_copy * R * N, record, N, R, ACC, BN, BR)
    tl.debug_barrier()
    for j in tl.range(0, steps, disable_licm=True):
        at = ((start + j) * B + i_b) * R
        record = records_ptr + (j * B + i_b) * RECORD
        after = record + tl.full((), RECORD, tl.int64) * B
        words = key_ptr + at * W
        if N <= BN:
            store_slots(record, weights, tl.arange(0, BN), N, R, BR)
        m, weights, _, _ = step_forward(
            m, weights, weights, memory, memory, record, after, after, gate_ptr, gate_ptr,
            words, add_ptr + at * W if HAS_ADD else words, gate_ptr + at, beta_ptr + at, slots_ptr + at,
            record + R * N,
            N, W, heads, 0.0, eps, False, HAS_BETA, SHARED, ERASE_ALL, ACC, BU, BN, BW, BR,
        )  # fmt: skip
        if (j + 1) % RESTART == 0:
            memory_out(m, memory, restarts_ptr + (j // RESTART * B + i_b) * N * W, N, W, ACC, BN, BW)
    tl.debug_barrier()
    return m, weights


@triton.jit
def undo_segment(
    m, weights, dm, dw,  # after the segment: memory, read weights and their gradients
    dreads_ptr, key_ptr, gate_ptr, beta_ptr, add_ptr, slots_ptr,  # as backward
    dkey_ptr, dgate_ptr, dbeta_ptr, dadd_ptr,  # as backward
    memory, dmemory, work_dweights_ptr, records_ptr, restarts_ptr,  # as backward; memory and dmemory are this example's
    i_b, start, steps, B, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr, heads, eps: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_ADD: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr,
    RESTART: tl.constexpr, ACC: tl.constexpr, RECORD: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Undo the steps of a segment, the last one first, by their records; returns the gradients of memory and read weights
    before it."""
    for i in tl.range(0, steps, disable_licm=True):
        j = steps - 1 - i
        t = start + j
        at = (t * B + i_b) * R
        record = records_ptr + (j * B + i_b) * RECORD
        after = record + tl.full((), RECORD, tl.int64) * B
        if (j + 1) % RESTART == 0:
            m = memory_in(restarts_ptr + (j // RESTART * B + i_b) * N * W, memory, N, W, ACC, BN, BW)
            tl.debug_barrier()
        words = key_ptr + at * W
        if N <= BN:
            previous = load_slots(record, tl.arange(0, BN), N, R, ACC, BR)
        else:
            previous = weights
        m, dm, dw = step_backward(
            m, dm, weights, dw, previous, memory, dmemory, after, record,
            work_dweights_ptr + (t % 2 * B + i_b) * R * N, work_dweights_ptr + ((t + 1) % 2 * B + i_b) * R * N,
            dreads_ptr + at * W, words, add_ptr + at * W if HAS_ADD else words, gate_ptr + at, beta_ptr + at,
            slots_ptr + at, record + R * N, dkey_ptr + at * W, dadd_ptr + at * W, dgate_ptr + at, dbeta_ptr + at,
            N, W, heads, eps, HAS_BETA, HAS_ADD, SHARED, ERASE_ALL, ACC, BN, BW, BR,
        )  # fmt: skip
        weights = previous
    return dm, dw


@triton.jit(do_not_specialize=["T", "B", "checkpoint_every"])
def lrua_sequence_bwd_kernel(
    dreads_ptr, dmemory1_ptr, dweights1_ptr,  # [T,B,R,W], [B,N,W], [B,R,N]
    memory_ptr, previous_ptr,  # [B,N,W], [B,R,N]: the state before
    key_ptr, gate_ptr, beta_ptr, add_ptr, lengths_ptr,  # as forward
    slots_ptr, copies_ptr, weight_copies_ptr,  # as forward
    dmemory_ptr, dprevious_ptr,  # [B,N,W], [B,R,N] out
    dkey_ptr, dgate_ptr, dbeta_ptr, dadd_ptr,  # [T,B,R,W], [T,B,R], [T,B,R], [T,B,R,W] out
    work_memory_ptr, work_dmemory_ptr, work_dweights_ptr,  # of ACC, where not in registers: [B,N,W] twice, [2,B,R,N]
    records_ptr,  # [segment+1,B,RECORD] of ACC, of each step: read weights before it, overwritten rows
    restarts_ptr,  # [segment/RESTART,B,N,W] of ACC
    T, B, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr, checkpoint_every, eps: tl.constexpr,
    HAS_DMEMORY: tl.constexpr, HAS_DWEIGHTS: tl.constexpr, HAS_BETA: tl.constexpr, HAS_ADD: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr, RESTART: tl.constexpr,
    ACC: tl.constexpr, RECORD: tl.constexpr,
    BU: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A segment of steps at a time, the last one first: its steps are recomputed from the state before it, then undone."""
    i_b = tl.program_id(0).to(tl.int64)
    heads = R + tl.minimum(B, 0)  # R, but no constant: ptxas would unroll the loops over heads, and spill
    length = length_of(lengths_ptr + i_b, T, HAS_LENGTHS)
    memory = work_memory_ptr + i_b * N * W
    dmemory = work_dmemory_ptr + i_b * N * W
    if HAS_DMEMORY:
        dm = memory_in(dmemory1_ptr + i_b * N * W, dmemory, N, W, ACC, BN, BW)
    else:
        dm = memory_zero(dmemory, N, W, ACC, BN, BW)
    # without registers, the gradient of the read weights after step t stands in buffer t % 2
    last = work_dweights_ptr + ((length + 1) % 2 * B + i_b) * R * N
    if HAS_DWEIGHTS:
        dw = weights_in(dweights1_ptr + i_b * R * N, last, N, R, ACC, BN, BR)
    else:
        dw = weights_zero(last, N, R, ACC, BN, BR)
    for t in tl.range(length, T, disable_licm=True):
        at = (t * B + i_b) * R
        fill_zero(dkey_ptr + at * W, R * W, ACC, BU)
        fill_zero(dgate_ptr + at, R, ACC, BR)
        if HAS_BETA:
            fill_zero(dbeta_ptr + at, R, ACC, BR)
        if HAS_ADD:
            fill_zero(dadd_ptr + at * W, R * W, ACC, BU)
    segments = (length + checkpoint_every - 1) // checkpoint_every
    for back in tl.range(0, segments, disable_licm=True):
        i_segment = segments - 1 - back
        start = i_segment * checkpoint_every
        steps = tl.minimum(start + checkpoint_every, length) - start
        m, weights = recompute_segment(
            memory_ptr, previous_ptr, copies_ptr, weight_copies_ptr, key_ptr, gate_ptr, beta_ptr, add_ptr, slots_ptr,
            memory, records_ptr, restarts_ptr, i_b, i_segment, start, steps, B, N, W, R, heads, eps,
            HAS_BETA, HAS_ADD, SHARED, ERASE_ALL, RESTART, ACC, RECORD, BU, BN, BW, BR,
        )  # fmt: skip
        dm, dw = undo_segment(
            m, weights, dm, dw, dreads_ptr, key_ptr, gate_ptr, beta_ptr, add_ptr, slots_ptr,
            dkey_ptr, dgate_ptr, dbeta_ptr, dadd_ptr, memory, dmemory, work_dweights_ptr, records_ptr, restarts_ptr,
            i_b, start, steps, B, N, W, R, heads, eps,
            HAS_BETA, HAS_ADD, SHARED, ERASE_ALL, RESTART, ACC, RECORD, BN, BW, BR,
        )  # fmt: skip
    tl.debug_barrier()
    memory_out(dm, dmemory, dmemory_ptr + i_b * N * W, N, W, ACC, BN, BW)
    weights_out(dw, work_dweights_ptr + (B + i_b) * R * N, dprevious_ptr + i_b * R * N, N, R, ACC, BN, BR)


def forward(
    memory, usage, read_weights, key, gate, beta, add, lengths, shared, erase_all, decay, eps, checkpoint_every, save
):
    """The operator lrua_sequence: same arguments and results as its schema."""
    (time, batch, heads, width), slots = key.shape, memory.shape[1]
    memory, usage, read_weights, key, gate, beta, add, lengths = contiguous(
        memory, usage, read_weights, key, gate, beta, add, lengths
    )
    acc = acc_of(memory.dtype)
    work = functools.partial(torch.empty, dtype=acc.torch, device=memory.device)
    reads, new_memory, new_usage, new_weights = map(torch.empty_like, (key, memory, usage, read_weights))
    least_used, copies, weight_copies = empty_saved(memory, time, heads, checkpoint_every, save)
    options = launch(lrua_sequence_fwd_kernel, slots, width, heads, memory.dtype)
    tiled = int(slots > options["BN"])
    slots_out = least_used if save else torch.empty(gate.shape, dtype=torch.int32, device=memory.device)
    if batch:
        lrua_sequence_fwd_kernel[(batch,)](
            memory_ptr=memory, usage_ptr=usage, previous_ptr=read_weights, key_ptr=key, gate_ptr=gate,
            beta_ptr=pointer(beta, key), add_ptr=pointer(add, key), lengths_ptr=pointer(lengths, key),
            reads_ptr=reads, new_memory_ptr=new_memory, new_usage_ptr=new_usage, new_weights_ptr=new_weights,
            slots_ptr=slots_out, copies_ptr=copies, weight_copies_ptr=weight_copies,
            work_memory_ptr=work(tiled * batch, slots, width), work_weights_ptr=work(2, tiled * batch, heads, slots),
            work_usage_ptr=work(tiled * batch, slots), T=time, B=batch, N=slots, W=width, R=heads,
            checkpoint_every=checkpoint_every, decay=decay, eps=eps, HAS_BETA=beta is not None,
            HAS_ADD=add is not None, HAS_LENGTHS=lengths is not None, SAVE=save, SHARED=shared, ERASE_ALL=erase_all,
            ACC=acc.triton, **options,
        )  # fmt: skip
    return reads, new_memory, new_usage, new_weights, least_used, copies, weight_copies


def backward(
    dreads, dmemory1, dread_weights1, memory, read_weights, key, gate, beta, add, lengths,
    least_used, copies, weight_copies, shared, erase_all, eps, checkpoint_every,
):  # fmt: skip
    """The operator lrua_sequence_backward: same arguments and results as its schema."""
    (time, batch, heads, width), slots = key.shape, memory.shape[1]
    dreads, dmemory1, dread_weights1, memory, read_weights, key, gate, beta, add, lengths = contiguous(
        dreads, dmemory1, dread_weights1, memory, read_weights, key, gate, beta, add, lengths
    )
    acc, segment = acc_of(memory.dtype), min(time, checkpoint_every)
    work = functools.partial(torch.empty, dtype=acc.torch, device=memory.device)
    dmemory, dread_weights = torch.empty_like(memory), torch.empty_like(read_weights)
    dkey, dgate = torch.empty_like(key), torch.empty_like(gate)
    dbeta = gate.new_empty(gate.shape if beta is not None else (0,))
    dadd = key.new_empty(key.shape if add is not None else (0,))
    options = launch(lrua_sequence_bwd_kernel, slots, width, heads, memory.dtype)
    tiled = int(slots > options["BN"])
    record = aligned(heads * slots + heads * width)
    if batch:
        lrua_sequence_bwd_kernel[(batch,)](
            dreads_ptr=dreads, dmemory1_ptr=pointer(dmemory1, key), dweights1_ptr=pointer(dread_weights1, key),
            memory_ptr=memory, previous_ptr=read_weights, key_ptr=key, gate_ptr=gate, beta_ptr=pointer(beta, key),
            add_ptr=pointer(add, key), lengths_ptr=pointer(lengths, key), slots_ptr=least_used, copies_ptr=copies,
            weight_copies_ptr=weight_copies, dmemory_ptr=dmemory, dprevious_ptr=dread_weights, dkey_ptr=dkey,
            dgate_ptr=dgate, dbeta_ptr=dbeta, dadd_ptr=dadd, work_memory_ptr=work(tiled * batch, slots, width),
            work_dmemory_ptr=work(tiled * batch, slots, width),
            work_dweights_ptr=work(2, tiled * batch, heads, slots), records_ptr=work(segment + 1, batch, record),
            restarts_ptr=work(segment // RESTART_EVERY, batch, slots, width), T=time, B=batch, N=slots, W=width,
            R=heads, checkpoint_every=checkpoint_every, eps=eps, HAS_DMEMORY=dmemory1 is not None,
            HAS_DWEIGHTS=dread_weights1 is not None, HAS_BETA=beta is not None, HAS_ADD=add is not None,
            HAS_LENGTHS=lengths is not None, SHARED=shared, ERASE_ALL=erase_all, RESTART=RESTART_EVERY,
            ACC=acc.triton, RECORD=record, **options,
        )  # fmt: skip
    return dmemory, dread_weights, dkey, dgate, dbeta, dadd
