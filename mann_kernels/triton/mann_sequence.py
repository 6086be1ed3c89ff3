"""Triton kernels of mann_sequence: a whole episode of LSTM controller, heads and memory in one launch, a program per example."""

import functools

import torch
import triton
import triton.language as tl

from mann_kernels.ops.lrua_sequence import empty_saved
from mann_kernels.triton._controller import (
    head_backward,
    lstm_backward,
    lstm_forward,
    make_head,
    tiles,
    times_vector,
    vector_times,
)
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
from mann_kernels.triton._tile import copy, fill_zero, length_of, load_slots, store_rows, store_slots, take


@triton.jit(do_not_specialize=["T", "B", "checkpoint_every"])
def mann_sequence_fwd_kernel(
    gates_x_ptr,  # [T,B,4H], the input's part of the gates
    weight_hh_ptr, weight_head_ptr, bias_head_ptr,  # [4H,H+R*W], [P,H], [P]
    h_ptr, c_ptr, reads_ptr, memory_ptr, usage_ptr, previous_ptr,  # the state before
    lengths_ptr,  # int64 [B]
    output_ptr,  # [T,B,H+R*W] out
    h1_ptr, c1_ptr, reads1_ptr, memory1_ptr, usage1_ptr, weights1_ptr,  # the state after, out
    gates_ptr,  # of ACC, out: [T,B,4H] with SAVE, else [B,4H]
    slots_ptr,  # int32 [T,B,R] out
    c_copies_ptr, copies_ptr, weight_copies_ptr,  # [copies,B,H], [copies,B,N,W], [copies,B,R,N] of ACC, out; with SAVE
    work_ptr,  # [B,2,SCRATCH] of ACC: h and reads, c, head; steps take turns
    work_memory_ptr, work_weights_ptr, work_usage_ptr,  # of ACC, where not in registers: [B,N,W], [2,B,R,N], [B,N]
    T, B, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    checkpoint_every, decay: tl.constexpr, eps: tl.constexpr,
    KEY_STRENGTH: tl.constexpr, HAS_ADD: tl.constexpr, SQUASH: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SAVE: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr, ACC: tl.constexpr, S: tl.constexpr,
    SCRATCH: tl.constexpr,
    BJ: tl.constexpr, BK: tl.constexpr, BU: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    length = length_of(lengths_ptr + i_b, T, HAS_LENGTHS)
    K: tl.constexpr = H + R * W
    work = work_ptr + i_b * 2 * SCRATCH
    memory = work_memory_ptr + i_b * N * W
    usage = work_usage_ptr + i_b * N
    cell_at: tl.constexpr = K  # in the scratch of a step
    head_at: tl.constexpr = cell_at + H
    gate_at: tl.constexpr = head_at + R * W
    beta_at: tl.constexpr = gate_at + R
    add_at: tl.constexpr = (beta_at + R if KEY_STRENGTH else beta_at) if HAS_ADD else head_at
    copy(h_ptr + i_b * H, work, H, ACC, BK)
    copy(reads_ptr + i_b * R * W, work + H, R * W, ACC, BK)
    copy(c_ptr + i_b * H, work + cell_at, H, ACC, BK)
    m = memory_in(memory_ptr + i_b * N * W, memory, N, W, ACC, BN, BW)
    weights = weights_in(previous_ptr + i_b * R * N, work_weights_ptr + i_b * R * N, N, R, ACC, BN, BR)
    u = usage_in(usage_ptr + i_b * N, usage, N, ACC, BU, BN)
    tl.debug_barrier()
    for t in tl.range(0, length, disable_licm=True):
        row = t * B + i_b
        before = work + t % 2 * SCRATCH
        after = work + (t + 1) % 2 * SCRATCH
        gates = gates_ptr + (row if SAVE else i_b) * 4 * H
        for j0 in tl.range(0, 4 * H, BJ, disable_licm=True):
            o_j = j0 + tl.arange(0, BJ)
            gate = times_vector(weight_hh_ptr, before, o_j, 4 * H, K, ACC, BJ, BK)
            gate += tl.load(gates_x_ptr + row * 4 * H + o_j, mask=o_j < 4 * H, other=0.0).to(ACC)
            tl.store(gates + o_j, gate, mask=o_j < 4 * H)
        tl.debug_barrier()
        lstm_forward(gates, before + cell_at, after + cell_at, after, output_ptr + row * K, H, ACC, S, BK)
        make_head(
            weight_head_ptr, bias_head_ptr, after, after + head_at, P, H, R, W, KEY_STRENGTH, SQUASH, ACC, BJ, BK
        )  # fmt: skip
        weights_before = work_weights_ptr + (t % 2 * B + i_b) * R * N
        weights_after = work_weights_ptr + ((t + 1) % 2 * B + i_b) * R * N
        m, weights, u, reads = step_forward(
            m, weights, u, memory, memory, weights_before, weights_after, weights_after, usage, usage,
            after + head_at, after + add_at, after + gate_at, after + beta_at, slots_ptr + row * R, memory,
            N, W, R, decay, eps, True, KEY_STRENGTH, SHARED, ERASE_ALL, ACC, BU, BN, BW, BR,
        )  # fmt: skip
        reads = reads.to(S)
        store_rows(after + H, reads.to(ACC), R, W, BR, BW)
        store_rows(output_ptr + row * K + H, reads, R, W, BR, BW)
        tl.debug_barrier()
        if SAVE:
            if ((t + 1) % checkpoint_every == 0) & (t + 1 < T):
                i_copy = (t // checkpoint_every) * B + i_b
                copy(after + cell_at, c_copies_ptr + i_copy * H, H, ACC, BK)
                memory_out(m, memory, copies_ptr + i_copy * N * W, N, W, ACC, BN, BW)
                weights_out(weights, weights_after, weight_copies_ptr + i_copy * R * N, N, R, ACC, BN, BR)
    for t in tl.range(length, T, disable_licm=True):
        row = t * B + i_b
        fill_zero(output_ptr + row * K, K, ACC, BK)
        fill_zero(slots_ptr + row * R, R, tl.int32, BR)
    last = work + length % 2 * SCRATCH
    copy(last, h1_ptr + i_b * H, H, ACC, BK)
    copy(last + H, reads1_ptr + i_b * R * W, R * W, ACC, BK)
    copy(last + cell_at, c1_ptr + i_b * H, H, ACC, BK)
    memory_out(m, memory, memory1_ptr + i_b * N * W, N, W, ACC, BN, BW)
    last_weights = work_weights_ptr + (length % 2 * B + i_b) * R * N
    weights_out(weights, last_weights, weights1_ptr + i_b * R * N, N, R, ACC, BN, BR)
    usage_out(u, usage, usage1_ptr + i_b * N, N, ACC, BU, BN)


@triton.jit
def recompute_segment(
    weight_head_ptr, bias_head_ptr, c_ptr, memory_ptr, previous_ptr,  # as backward
    output_ptr, gates_ptr, slots_ptr, c_copies_ptr, copies_ptr, weight_copies_ptr,  # as backward
    memory, records_ptr, restarts_ptr,  # as backward; memory is this example's
    i_b, i_segment, start, steps, B, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    R: tl.constexpr, heads, eps: tl.constexpr,
    KEY_STRENGTH: tl.constexpr, HAS_ADD: tl.constexpr, SQUASH: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr,
    RESTART: tl.constexpr, ACC: tl.constexpr, RECORD: tl.constexpr,
    BJ: tl.constexpr, BK: tl.constexpr, BU: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Run the memory's steps of a segment again from the state before it, with a record of each and copies of the memory to
    restart from; returns memory and read weights after the last."""
    K: tl.constexpr = H + R * W
    weights_at: tl.constexpr = H  # in a record
    head_at: tl.constexpr = weights_at + R * N
    rows_at: tl.constexpr = head_at + P
    gate_at: tl.constexpr = R * W
    beta_at: tl.constexpr = gate_at + R
    add_at: tl.constexpr = (beta_at + R if KEY_STRENGTH else beta_at) if HAS_ADD else 0
    record = records_ptr + i_b * RECORD
    if i_segment == 0:
        copy(c_ptr + i_b * H, record, H, ACC, BK)
        m = memory_in(memory_ptr + i_b * N * W, memory, N, W, ACC, BN, BW)
        weights = weights_in(previous_ptr + i_b * R * N, record + weights_at, N, R, ACC, BN, BR)
    else:
        i_copy = (i_segment - 1) * B + i_b
        copy(c_copies_ptr + i_copy * H, record, H, ACC, BK)
        m = memory_in(copies_ptr + i_copy * N * W, memory, N, W, ACC, BN, BW)
        weights = weights_in(weight_copies_ptr + i_copy * R * N, record + weights_at, N, R, ACC, BN, BR)
    tl.debug_barrier()
    for j in tl.range(0, steps, disable_licm=True):
        row = (start + j) * B + i_b
        record = records_ptr + (j * B + i_b) * RECORD
        after = record + tl.full((), RECORD, tl.int64) * B
        gates = gates_ptr + row * 4 * H
        for i0 in tl.range(0, H, BK, disable_licm=True):
            o_i = i0 + tl.arange(0, BK)
            m_i = o_i < H
            c = tl.load(gates + H + o_i, mask=m_i, other=0.0) * tl.load(record + o_i, mask=m_i, other=0.0)
            c += tl.load(gates + o_i, mask=m_i, other=0.0) * tl.load(gates + 2 * H + o_i, mask=m_i, other=0.0)
            tl.store(after + o_i, c, mask=m_i)
        head = record + head_at
        make_head(
            weight_head_ptr, bias_head_ptr, output_ptr + row * K, head,
            P, H, R, W, KEY_STRENGTH, SQUASH, ACC, BJ, BK,
        )  # fmt: skip
        if N <= BN:
            store_slots(record + weights_at, weights, tl.arange(0, BN), N, R, BR)
        m, weights, _, _ = step_forward(
            m, weights, weights, memory, memory, record + weights_at, after + weights_at, after + weights_at,
            head, head, head, head + add_at, head + gate_at, head + beta_at, slots_ptr + row * R, record + rows_at,
            N, W, heads, 0.0, eps, False, KEY_STRENGTH, SHARED, ERASE_ALL, ACC, BU, BN, BW, BR,
        )  # fmt: skip
        if (j + 1) % RESTART == 0:
            memory_out(m, memory, restarts_ptr + (j // RESTART * B + i_b) * N * W, N, W, ACC, BN, BW)
    tl.debug_barrier()
    return m, weights


@triton.jit
def undo_segment(
    m, weights, dm, dw,  # after the segment: memory, read weights and their gradients
    doutput_ptr, weight_hh_ptr, weight_head_ptr, gates_ptr, slots_ptr, dgates_ptr, dhead_ptr,  # as backward
    work, memory, dmemory,  # as backward, of this example
    work_dweights_ptr, records_ptr, restarts_ptr,  # as backward
    i_b, start, steps, B, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    heads, eps: tl.constexpr,
    KEY_STRENGTH: tl.constexpr, HAS_ADD: tl.constexpr, SQUASH: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr,
    RESTART: tl.constexpr, ACC: tl.constexpr, RECORD: tl.constexpr, SCRATCH: tl.constexpr,
    BJ: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Undo the steps of a segment, the last one first, by their records; returns the gradients of memory and read weights
    before it. Those of h, reads and c go to the scratch of the step before."""
    K: tl.constexpr = H + R * W
    dcell_at: tl.constexpr = K  # in the scratch of a step
    dgates_at: tl.constexpr = dcell_at + H
    dhead_at: tl.constexpr = dgates_at + 4 * H
    dh_at: tl.constexpr = dhead_at + P
    weights_at: tl.constexpr = H  # in a record
    head_at: tl.constexpr = weights_at + R * N
    rows_at: tl.constexpr = head_at + P
    gate_at: tl.constexpr = R * W
    beta_at: tl.constexpr = gate_at + R
    add_at: tl.constexpr = (beta_at + R if KEY_STRENGTH else beta_at) if HAS_ADD else 0
    for i in tl.range(0, steps, disable_licm=True):
        j = steps - 1 - i
        t = start + j
        row = t * B + i_b
        record = records_ptr + (j * B + i_b) * RECORD
        after = record + tl.full((), RECORD, tl.int64) * B
        if (j + 1) % RESTART == 0:
            m = memory_in(restarts_ptr + (j // RESTART * B + i_b) * N * W, memory, N, W, ACC, BN, BW)
        here = work + t % 2 * SCRATCH
        there = work + (t + 1) % 2 * SCRATCH
        for i0 in tl.range(0, R * W, BK, disable_licm=True):
            o_i = i0 + tl.arange(0, BK)
            dreads = tl.load(here + H + o_i, mask=o_i < R * W, other=0.0)
            dreads += tl.load(doutput_ptr + row * K + H + o_i, mask=o_i < R * W, other=0.0).to(ACC)
            tl.debug_barrier()  # as in make_head
            tl.store(here + H + o_i, dreads, mask=o_i < R * W)
        tl.debug_barrier()
        head = record + head_at
        dhead = here + dhead_at
        if N <= BN:
            previous = load_slots(record + weights_at, tl.arange(0, BN), N, R, ACC, BR)
        else:
            previous = weights
        m, dm, dw = step_backward(
            m, dm, weights, dw, previous, memory, dmemory, after + weights_at, record + weights_at,
            work_dweights_ptr + (t % 2 * B + i_b) * R * N, work_dweights_ptr + ((t + 1) % 2 * B + i_b) * R * N,
            here + H, head, head + add_at, head + gate_at, head + beta_at, slots_ptr + row * R, record + rows_at,
            dhead, dhead + add_at, dhead + gate_at, dhead + beta_at,
            N, W, heads, eps, KEY_STRENGTH, HAS_ADD, SHARED, ERASE_ALL, ACC, BN, BW, BR,
        )  # fmt: skip
        weights = previous
        head_backward(head, dhead, dhead_ptr + row * P, P, R, W, KEY_STRENGTH, SQUASH, BJ)
        lstm_backward(
            doutput_ptr + row * K, here, weight_head_ptr, dhead,
            gates_ptr + row * 4 * H, record, after, here + dcell_at, there + dcell_at,
            here + dh_at, here + dgates_at, dgates_ptr + row * 4 * H, P, H, ACC, BJ, BK,
        )  # fmt: skip
        for k0 in tl.range(0, K, BK, disable_licm=True):
            o_k = k0 + tl.arange(0, BK)
            grad = vector_times(weight_hh_ptr, here + dgates_at, o_k, 4 * H, K, ACC, BJ, BK)
            tl.store(there + o_k, grad, mask=o_k < K)
        tl.debug_barrier()
    return dm, dw


@triton.jit(do_not_specialize=["T", "B", "checkpoint_every"])
def mann_sequence_bwd_kernel(
    doutput_ptr, dh1_ptr, dc1_ptr, dreads1_ptr, dmemory1_ptr, dweights1_ptr,  # of output and the state after
    weight_hh_ptr, weight_head_ptr, bias_head_ptr, c_ptr, memory_ptr, previous_ptr, lengths_ptr,  # as forward
    output_ptr, gates_ptr, slots_ptr, c_copies_ptr, copies_ptr, weight_copies_ptr,  # as forward
    dgates_ptr, dhead_ptr,  # [T,B,4H], [T,B,P] out, before the activations
    dh_ptr, dc_ptr, dreads_ptr, dmemory_ptr, dprevious_ptr,  # of the state before, out
    work_ptr,  # [B,2,SCRATCH] of ACC, gradients: of h and reads, c, gates, head, h; steps take turns
    work_memory_ptr, work_dmemory_ptr, work_dweights_ptr,  # of ACC, where not in registers: [B,N,W] twice, [2,B,R,N]
    records_ptr,  # [segment+1,B,RECORD] of ACC, of each step: c and read weights before it, head, overwritten rows
    restarts_ptr,  # [segment/RESTART,B,N,W] of ACC
    T, B, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    checkpoint_every, eps: tl.constexpr,
    HAS_DH: tl.constexpr, HAS_DC: tl.constexpr, HAS_DREADS: tl.constexpr, HAS_DMEMORY: tl.constexpr,
    HAS_DWEIGHTS: tl.constexpr, KEY_STRENGTH: tl.constexpr, HAS_ADD: tl.constexpr, SQUASH: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr, RESTART: tl.constexpr, ACC: tl.constexpr,
    SCRATCH: tl.constexpr, RECORD: tl.constexpr,
    BJ: tl.constexpr, BK: tl.constexpr, BU: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A segment of steps at a time, the last one first: the memory's steps are recomputed, then undone."""
    i_b = tl.program_id(0).to(tl.int64)
    heads = R + tl.minimum(B, 0)  # R, but no constant: ptxas would unroll the loops over heads, and spill
    length = length_of(lengths_ptr + i_b, T, HAS_LENGTHS)
    K: tl.constexpr = H + R * W
    work = work_ptr + i_b * 2 * SCRATCH
    memory = work_memory_ptr + i_b * N * W
    dmemory = work_dmemory_ptr + i_b * N * W
    dcell_at: tl.constexpr = K  # in the scratch of a step
    # the gradient of the state after step t stands in half t % 2
    last = work + (length + 1) % 2 * SCRATCH
    take(dh1_ptr + i_b * H, last, H, HAS_DH, ACC, BK)
    take(dreads1_ptr + i_b * R * W, last + H, R * W, HAS_DREADS, ACC, BK)
    take(dc1_ptr + i_b * H, last + dcell_at, H, HAS_DC, ACC, BK)
    last_dweights = work_dweights_ptr + ((length + 1) % 2 * B + i_b) * R * N
    if HAS_DWEIGHTS:
        dw = weights_in(dweights1_ptr + i_b * R * N, last_dweights, N, R, ACC, BN, BR)
    else:
        dw = weights_zero(last_dweights, N, R, ACC, BN, BR)
    if HAS_DMEMORY:
        dm = memory_in(dmemory1_ptr + i_b * N * W, dmemory, N, W, ACC, BN, BW)
    else:
        dm = memory_zero(dmemory, N, W, ACC, BN, BW)
    for t in tl.range(length, T, disable_licm=True):
        fill_zero(dgates_ptr + (t * B + i_b) * 4 * H, 4 * H, ACC, BK)
        fill_zero(dhead_ptr + (t * B + i_b) * P, P, ACC, BK)
    segments = (length + checkpoint_every - 1) // checkpoint_every
    for back in tl.range(0, segments, disable_licm=True):
        i_segment = segments - 1 - back
        start = i_segment * checkpoint_every
        steps = tl.minimum(start + checkpoint_every, length) - start
        m, weights = recompute_segment(
            weight_head_ptr, bias_head_ptr, c_ptr, memory_ptr, previous_ptr,
            output_ptr, gates_ptr, slots_ptr, c_copies_ptr, copies_ptr, weight_copies_ptr,
            memory, records_ptr, restarts_ptr, i_b, i_segment, start, steps, B, H, P, N, W, R, heads, eps,
            KEY_STRENGTH, HAS_ADD, SQUASH, SHARED, ERASE_ALL, RESTART, ACC, RECORD, BJ, BK, BU, BN, BW, BR,
        )  # fmt: skip
        dm, dw = undo_segment(
            m, weights, dm, dw,
            doutput_ptr, weight_hh_ptr, weight_head_ptr, gates_ptr, slots_ptr, dgates_ptr, dhead_ptr,
            work, memory, dmemory, work_dweights_ptr, records_ptr, restarts_ptr,
            i_b, start, steps, B, H, P, N, W, R, heads, eps,
            KEY_STRENGTH, HAS_ADD, SQUASH, SHARED, ERASE_ALL, RESTART, ACC, RECORD, SCRATCH, BJ, BK, BN, BW, BR,
        )  # fmt: skip
    tl.debug_barrier()
    first = work + SCRATCH  # before step 0
    copy(first, dh_ptr + i_b * H, H, ACC, BK)
    copy(first + H, dreads_ptr + i_b * R * W, R * W, ACC, BK)
    copy(first + dcell_at, dc_ptr + i_b * H, H, ACC, BK)
    memory_out(dm, dmemory, dmemory_ptr + i_b * N * W, N, W, ACC, BN, BW)
    weights_out(dw, work_dweights_ptr + (B + i_b) * R * N, dprevious_ptr + i_b * R * N, N, R, ACC, BN, BR)


def forward(
    gates_x, weight_hh, weight_head, bias_head, h, c, reads, memory, usage, read_weights, lengths,
    write_add, key_strength, squash, shared, erase_all, decay, eps, checkpoint_every, save,
):  # fmt: skip
    """The operator mann_sequence: same arguments and results as its schema."""
    (time, batch), (_, slots, width), heads = gates_x.shape[:2], memory.shape, reads.shape[1]
    hidden, size, recurrent = h.shape[1], weight_head.shape[0], weight_hh.shape[1]
    gates_x, weight_hh, weight_head, bias_head, lengths = contiguous(
        gates_x, weight_hh, weight_head, bias_head, lengths
    )
    h, c, reads, memory, usage, read_weights = contiguous(h, c, reads, memory, usage, read_weights)
    acc = acc_of(memory.dtype)
    work = functools.partial(torch.empty, dtype=acc.torch, device=memory.device)
    output = memory.new_empty(time, batch, recurrent)
    state1 = tuple(map(torch.empty_like, (h, c, reads, memory, usage, read_weights)))
    h1, c1, reads1, memory1, usage1, read_weights1 = state1
    least_used, copies, weight_copies = empty_saved(memory, time, heads, checkpoint_every, save)
    gates = work(time, batch, 4 * hidden) if save else work(batch, 4 * hidden)
    c_copies = work(*((copies.shape[0], batch, hidden) if save else (0,)))
    slots_out = least_used if save else torch.empty(time, batch, heads, dtype=torch.int32, device=memory.device)
    options = launch(mann_sequence_fwd_kernel, slots, width, heads, memory.dtype) | tiles(hidden, recurrent)
    scratch, tiled = aligned(recurrent + hidden + size), int(slots > options["BN"])
    if batch:
        mann_sequence_fwd_kernel[(batch,)](
            gates_x_ptr=gates_x, weight_hh_ptr=weight_hh, weight_head_ptr=weight_head, bias_head_ptr=bias_head,
            h_ptr=h, c_ptr=c, reads_ptr=reads, memory_ptr=memory, usage_ptr=usage, previous_ptr=read_weights,
            lengths_ptr=pointer(lengths, memory), output_ptr=output, h1_ptr=h1, c1_ptr=c1, reads1_ptr=reads1,
            memory1_ptr=memory1, usage1_ptr=usage1, weights1_ptr=read_weights1, gates_ptr=gates, slots_ptr=slots_out,
            c_copies_ptr=c_copies, copies_ptr=copies, weight_copies_ptr=weight_copies,
            work_ptr=work(batch, 2, scratch), work_memory_ptr=work(tiled * batch, slots, width),
            work_weights_ptr=work(2, tiled * batch, heads, slots), work_usage_ptr=work(tiled * batch, slots), T=time,
            B=batch, H=hidden, P=size, N=slots, W=width, R=heads, checkpoint_every=checkpoint_every, decay=decay,
            eps=eps, KEY_STRENGTH=key_strength, HAS_ADD=write_add, SQUASH=squash, HAS_LENGTHS=lengths is not None,
            SAVE=save, SHARED=shared, ERASE_ALL=erase_all, ACC=acc.triton,
            S=getattr(tl, str(memory.dtype).removeprefix("torch.")), SCRATCH=scratch, **options,
        )  # fmt: skip
    return output, *state1, gates if save else work(0), least_used, c_copies, copies, weight_copies


def backward(
    doutput, dh1, dc1, dreads1, dmemory1, dread_weights1, weight_hh, weight_head, bias_head, c, memory, read_weights,
    lengths, output, gates, least_used, c_copies, copies, weight_copies,
    write_add, key_strength, squash, shared, erase_all, eps, checkpoint_every,
):  # fmt: skip
    """The operator mann_sequence_backward: same arguments and results as its schema."""
    (time, batch, recurrent), (_, slots, width), heads = doutput.shape, memory.shape, read_weights.shape[1]
    hidden, size = c.shape[1], weight_head.shape[0]
    dh1, dc1, dreads1, dmemory1, dread_weights1 = contiguous(dh1, dc1, dreads1, dmemory1, dread_weights1)
    weight_hh, weight_head, bias_head = contiguous(weight_hh, weight_head, bias_head)
    c, memory, read_weights = contiguous(c, memory, read_weights)
    lengths, doutput, output = contiguous(lengths, doutput, output)
    acc, segment = acc_of(memory.dtype), min(time, checkpoint_every)
    work = functools.partial(torch.empty, dtype=acc.torch, device=memory.device)
    dgates, dhead = memory.new_empty(time, batch, 4 * hidden), memory.new_empty(time, batch, size)
    dh, dc, dreads = torch.empty_like(c), torch.empty_like(c), c.new_empty(batch, heads, width)
    dmemory, dread_weights = torch.empty_like(memory), torch.empty_like(read_weights)
    options = launch(mann_sequence_bwd_kernel, slots, width, heads, memory.dtype) | tiles(hidden, recurrent)
    scratch, tiled = aligned(recurrent + 6 * hidden + size), int(slots > options["BN"])
    record = aligned(hidden + heads * slots + size + heads * width)
    if batch:
        mann_sequence_bwd_kernel[(batch,)](
            doutput_ptr=doutput, dh1_ptr=pointer(dh1, memory), dc1_ptr=pointer(dc1, memory),
            dreads1_ptr=pointer(dreads1, memory), dmemory1_ptr=pointer(dmemory1, memory),
            dweights1_ptr=pointer(dread_weights1, memory), weight_hh_ptr=weight_hh, weight_head_ptr=weight_head,
            bias_head_ptr=bias_head, c_ptr=c, memory_ptr=memory, previous_ptr=read_weights,
            lengths_ptr=pointer(lengths, memory), output_ptr=output, gates_ptr=gates, slots_ptr=least_used,
            c_copies_ptr=c_copies, copies_ptr=copies, weight_copies_ptr=weight_copies, dgates_ptr=dgates,
            dhead_ptr=dhead, dh_ptr=dh, dc_ptr=dc, dreads_ptr=dreads, dmemory_ptr=dmemory,
            dprevious_ptr=dread_weights, work_ptr=work(batch, 2, scratch),
            work_memory_ptr=work(tiled * batch, slots, width), work_dmemory_ptr=work(tiled * batch, slots, width),
            work_dweights_ptr=work(2, tiled * batch, heads, slots), records_ptr=work(segment + 1, batch, record),
            restarts_ptr=work(segment // RESTART_EVERY, batch, slots, width), T=time, B=batch, H=hidden, P=size,
            N=slots, W=width, R=heads, checkpoint_every=checkpoint_every, eps=eps, HAS_DH=dh1 is not None,
            HAS_DC=dc1 is not None, HAS_DREADS=dreads1 is not None, HAS_DMEMORY=dmemory1 is not None,
            HAS_DWEIGHTS=dread_weights1 is not None, KEY_STRENGTH=key_strength, HAS_ADD=write_add, SQUASH=squash,
            HAS_LENGTHS=lengths is not None, SHARED=shared, ERASE_ALL=erase_all, RESTART=RESTART_EVERY,
            ACC=acc.triton, SCRATCH=scratch, RECORD=record, **options,
        )  # fmt: skip
    return dgates, dhead, dh, dc, dreads, dmemory, dread_weights
