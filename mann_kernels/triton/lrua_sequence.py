"""Triton kernels of lrua_sequence, and of lrua_step as a sequence of one: the loop over time runs inside the kernel."""

import functools

import torch
import triton
import triton.language as tl

from mann_kernels.ops.lrua_sequence import empty_saved
from mann_kernels.triton._launch import RESTART_EVERY, acc_of, contiguous, launch, pointer
from mann_kernels.triton._step import copy, fill_zero, load_rows, step_backward, step_forward, store_rows


@triton.jit
def lrua_sequence_fwd_kernel(
    memory_ptr, usage_ptr, previous_ptr,  # [B,N,W], [B,N], [B,R,N]: the state before
    key_ptr, gate_ptr, beta_ptr, add_ptr,  # [T,B,R,W], [T,B,R], [T,B,R], [T,B,R,W]
    lengths_ptr,  # int64 [B]
    reads_ptr,  # [T,B,R,W] out
    new_memory_ptr, new_usage_ptr, new_weights_ptr,  # the state after, out
    slots_ptr,  # int32 [T,B,R] out
    copies_ptr, weight_copies_ptr,  # [copies,B,N,W], [copies,B,R,N] out, of ACC; with SAVE
    work_memory_ptr, work_usage_ptr, work_weights_ptr,  # [B,N,W], [B,N], [2,B,R,N] of ACC
    T, B, N, W, R, checkpoint_every, decay, eps,
    HAS_BETA: tl.constexpr, HAS_ADD: tl.constexpr, HAS_LENGTHS: tl.constexpr, SAVE: tl.constexpr,
    SHARED: tl.constexpr, ERASE_ALL: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    length = T
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + i_b).to(tl.int32)
    memory = work_memory_ptr + i_b * N * W
    usage = work_usage_ptr + i_b * N
    copy(memory_ptr + i_b * N * W, memory, N * W, ACC, 1024)
    copy(usage_ptr + i_b * N, usage, N, ACC, BN)
    copy(previous_ptr + i_b * R * N, work_weights_ptr + i_b * R * N, R * N, ACC, 1024)
    tl.debug_barrier()
    for t in range(0, T):
        at = (t * B + i_b) * R
        now = tl.maximum(
            tl.minimum(t, length), 0
        )  # the number of steps taken so far: the two weight buffers take turns
        before = work_weights_ptr + ((now % 2) * B + i_b) * R * N
        after = work_weights_ptr + (((now + 1) % 2) * B + i_b) * R * N
        if t < length:
            words = key_ptr + at * W
            reads = step_forward(
                memory, memory, usage, usage, before, after, after,
                words, add_ptr + at * W if HAS_ADD else words, gate_ptr + at, beta_ptr + at, slots_ptr + at, memory,
                N, W, R, decay, eps, True, HAS_BETA, SHARED, ERASE_ALL, ACC, BN, BW, BR,
            )  # fmt: skip
            store_rows(reads_ptr + at * W, reads, R, W, BR, BW)
            now += 1
        else:
            fill_zero(reads_ptr + at * W, R * W, ACC, BW)
            fill_zero(slots_ptr + at, R, tl.int32, BR)
        if SAVE:  # noqa: SIM102  (one is decided when compiling, the other while running)
            if ((t + 1) % checkpoint_every == 0) & (t + 1 < T):
                i_copy = (t // checkpoint_every) * B + i_b
                copy(memory, copies_ptr + i_copy * N * W, N * W, ACC, 1024)
                copy(
                    work_weights_ptr + ((now % 2) * B + i_b) * R * N,
                    weight_copies_ptr + i_copy * R * N,
                    R * N,
                    ACC,
                    1024,
                )
                tl.debug_barrier()
    last = tl.maximum(tl.minimum(T, length), 0)
    copy(memory, new_memory_ptr + i_b * N * W, N * W, ACC, 1024)
    copy(usage, new_usage_ptr + i_b * N, N, ACC, BN)
    copy(work_weights_ptr + ((last % 2) * B + i_b) * R * N, new_weights_ptr + i_b * R * N, R * N, ACC, 1024)


@triton.jit
def lrua_sequence_bwd_kernel(
    dreads_ptr, dmemory1_ptr, dweights1_ptr,  # [T,B,R,W], [B,N,W], [B,R,N]
    memory_ptr, previous_ptr,  # [B,N,W], [B,R,N]: the state before
    key_ptr, gate_ptr, beta_ptr, add_ptr, lengths_ptr,  # as forward
    slots_ptr, copies_ptr, weight_copies_ptr,  # as forward
    dmemory_ptr, dprevious_ptr,  # [B,N,W], [B,R,N] out
    dkey_ptr, dgate_ptr, dbeta_ptr, dadd_ptr,  # [T,B,R,W], [T,B,R], [T,B,R], [T,B,R,W] out
    work_memory_ptr, work_dmemory_ptr,  # [B,N,W] of ACC
    work_dweights_ptr,  # [2,B,R,N] of ACC
    weights_ptr, rows_ptr, restarts_ptr,  # [segment+1,B,R,N], [segment,B,R,W], [segment/RESTART,B,N,W] of ACC
    T, B, N, W, R, checkpoint_every, eps,
    HAS_DMEMORY: tl.constexpr, HAS_DWEIGHTS: tl.constexpr, HAS_BETA: tl.constexpr, HAS_ADD: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr, RESTART: tl.constexpr,
    ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A segment of steps at a time, the last one first: its steps are taken again from the state before it, then undone."""
    i_b = tl.program_id(0).to(tl.int64)
    length = T
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths_ptr + i_b).to(tl.int32), T)
    memory = work_memory_ptr + i_b * N * W
    dmemory = work_dmemory_ptr + i_b * N * W
    # the gradient of the read weights after step t stands in buffer t % 2
    last = work_dweights_ptr + ((tl.maximum(length, 1) - 1) % 2 * B + i_b) * R * N
    if HAS_DMEMORY:
        copy(dmemory1_ptr + i_b * N * W, dmemory, N * W, ACC, 1024)
    else:
        fill_zero(dmemory, N * W, ACC, 1024)
    if HAS_DWEIGHTS:
        copy(dweights1_ptr + i_b * R * N, last, R * N, ACC, 1024)
    else:
        fill_zero(last, R * N, ACC, 1024)
    for t in range(tl.maximum(length, 0), T):
        at = (t * B + i_b) * R
        fill_zero(dkey_ptr + at * W, R * W, ACC, BW)
        fill_zero(dgate_ptr + at, R, ACC, BR)
        if HAS_BETA:
            fill_zero(dbeta_ptr + at, R, ACC, BR)
        if HAS_ADD:
            fill_zero(dadd_ptr + at * W, R * W, ACC, BW)
    i_heads = tl.full((), R * N, tl.int64) * B  # from one step's weights to the next
    segments = (length + checkpoint_every - 1) // checkpoint_every
    for back in range(0, segments):
        start = (segments - 1 - back) * checkpoint_every
        steps = tl.minimum(start + checkpoint_every, length) - start
        if start == 0:
            copy(memory_ptr + i_b * N * W, memory, N * W, ACC, 1024)
            copy(previous_ptr + i_b * R * N, weights_ptr + i_b * R * N, R * N, ACC, 1024)
        else:
            i_copy = (start // checkpoint_every - 1) * B + i_b
            copy(copies_ptr + i_copy * N * W, memory, N * W, ACC, 1024)
            copy(weight_copies_ptr + i_copy * R * N, weights_ptr + i_b * R * N, R * N, ACC, 1024)
        tl.debug_barrier()
        for j in range(0, steps):
            at = ((start + j) * B + i_b) * R
            words = key_ptr + at * W
            before = weights_ptr + (j * B + i_b) * R * N
            step_forward(
                memory, memory, gate_ptr, gate_ptr, before, before + i_heads, before + i_heads,
                words, add_ptr + at * W if HAS_ADD else words, gate_ptr + at, beta_ptr + at, slots_ptr + at,
                rows_ptr + (j * B + i_b) * R * W,
                N, W, R, 0.0, eps, False, HAS_BETA, SHARED, ERASE_ALL, ACC, BN, BW, BR,
            )  # fmt: skip
            if (j + 1) % RESTART == 0:
                copy(memory, restarts_ptr + (j // RESTART * B + i_b) * N * W, N * W, ACC, 1024)
                tl.debug_barrier()
        for i in range(0, steps):
            j = steps - 1 - i
            t = start + j
            at = (t * B + i_b) * R
            if (j + 1) % RESTART == 0:
                copy(restarts_ptr + (j // RESTART * B + i_b) * N * W, memory, N * W, ACC, 1024)
                tl.debug_barrier()
            words = key_ptr + at * W
            before = weights_ptr + (j * B + i_b) * R * N
            step_backward(
                memory, dmemory,
                work_dweights_ptr + (t % 2 * B + i_b) * R * N, work_dweights_ptr + ((t + 1) % 2 * B + i_b) * R * N,
                load_rows(dreads_ptr + at * W, R, W, ACC, BR, BW), before + i_heads, before,
                words, add_ptr + at * W if HAS_ADD else words, gate_ptr + at, beta_ptr + at, slots_ptr + at,
                rows_ptr + (j * B + i_b) * R * W,
                dkey_ptr + at * W, dadd_ptr + at * W, dgate_ptr + at, dbeta_ptr + at,
                N, W, R, eps, HAS_BETA, HAS_ADD, SHARED, ERASE_ALL, ACC, BN, BW, BR,
            )  # fmt: skip
    tl.debug_barrier()
    first = last
    if length > 0:
        first = work_dweights_ptr + (B + i_b) * R * N
    copy(dmemory, dmemory_ptr + i_b * N * W, N * W, ACC, 1024)
    copy(first, dprevious_ptr + i_b * R * N, R * N, ACC, 1024)


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
    outputs = torch.empty_like(key), *(torch.empty_like(tensor) for tensor in (memory, usage, read_weights))
    least_used, copies, weight_copies = empty_saved(memory, time, heads, checkpoint_every, save)
    slots_out = least_used if save else torch.empty(gate.shape, dtype=torch.int32, device=memory.device)
    if batch:
        lrua_sequence_fwd_kernel[(batch,)](
            memory, usage, read_weights, key, gate, pointer(beta, key), pointer(add, key), pointer(lengths, key),
            *outputs, slots_out, copies, weight_copies,
            work(batch, slots, width), work(batch, slots), work(2, batch, heads, slots),
            time, batch, slots, width, heads, checkpoint_every, decay, eps,
            beta is not None, add is not None, lengths is not None, save, shared, erase_all, acc.triton,
            **launch(slots, width, heads),
        )  # fmt: skip
    return *outputs, least_used, copies, weight_copies


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
    if batch:
        lrua_sequence_bwd_kernel[(batch,)](
            dreads, pointer(dmemory1, key), pointer(dread_weights1, key), memory, read_weights,
            key, gate, pointer(beta, key), pointer(add, key), pointer(lengths, key),
            least_used, copies, weight_copies, dmemory, dread_weights, dkey, dgate, dbeta, dadd,
            work(batch, slots, width), work(batch, slots, width), work(2, batch, heads, slots),
            work(segment + 1, batch, heads, slots), work(segment, batch, heads, width),
            work(segment // RESTART_EVERY, batch, slots, width),
            time, batch, slots, width, heads, checkpoint_every, eps,
            dmemory1 is not None, dread_weights1 is not None, beta is not None, add is not None, lengths is not None,
            shared, erase_all, RESTART_EVERY, acc.triton, **launch(slots, width, heads),
        )  # fmt: skip
    return dmemory, dread_weights, dkey, dgate, dbeta, dadd
