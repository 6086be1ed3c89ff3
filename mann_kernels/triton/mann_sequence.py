"""Triton kernels of mann_sequence: a whole episode of LSTM controller, heads and memory in one launch, a program per example."""

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
from mann_kernels.triton._tile import (
    copy,
    exp_minus_one,
    fill_zero,
    length_of,
    load_slots,
    log_of_one_plus,
    sigmoid,
    store_rows,
    store_slots,
    take,
    tanh,
)


def tiles(hidden: int, recurrent: int) -> dict[str, int]:
    """A tile [BJ,BK] of a weight matrix: 32 numbers for each of 256 threads, beside 32 partial sums.

    At the paper's shape 1.3 MB of weights come by at every step, from the second-level cache. A multiprocessor takes some 64
    bytes a clock at a latency of some 600, so it wants about 40 KB on the way, and a tile is 32 KB. Of the shapes with that many
    numbers this one spills nothing on any target, with either version of Triton; 128 x 64 and 64 x 128 do.
    """
    return {
        "BJ": min(256, triton.next_power_of_2(4 * hidden)),
        "BK": min(32, triton.next_power_of_2(recurrent)),
    }


@triton.jit
def load_weights(ptr, o_j, o_k, rows: tl.constexpr, columns: tl.constexpr, ACC: tl.constexpr):
    """Rows o_j [BJ] and columns o_k [BK] of a matrix [rows, columns], padded with zeros."""
    mask = (o_j < rows)[:, None] & (o_k < columns)[None, :]
    return tl.load(ptr + o_j[:, None] * columns + o_k[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def times_vector(
    weight_ptr, vector_ptr, o_j, rows: tl.constexpr, columns: tl.constexpr,
    ACC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows o_j [BJ] of weight [rows, columns] @ vector [columns]."""
    partial = tl.zeros([BJ, BK], ACC)
    for k0 in tl.range(0, columns, BK, disable_licm=True):
        o_k = k0 + tl.arange(0, BK)
        vector = tl.load(vector_ptr + o_k, mask=o_k < columns, other=0.0).to(ACC)
        partial += load_weights(weight_ptr, o_j, o_k, rows, columns, ACC) * vector[None, :]
    return tl.sum(partial, axis=1)


@triton.jit
def vector_times(
    weight_ptr, vector_ptr, o_k, rows: tl.constexpr, columns: tl.constexpr,
    ACC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Columns o_k [BK] of vector [rows] @ weight [rows, columns]."""
    partial = tl.zeros([BJ, BK], ACC)
    for j0 in tl.range(0, rows, BJ, disable_licm=True):
        o_j = j0 + tl.arange(0, BJ)
        vector = tl.load(vector_ptr + o_j, mask=o_j < rows, other=0.0).to(ACC)
        partial += load_weights(weight_ptr, o_j, o_k, rows, columns, ACC) * vector[:, None]
    return tl.sum(partial, axis=0)


@triton.jit
def make_head(
    weight_ptr, bias_ptr, h_ptr, head_ptr, P: tl.constexpr, H: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    KEY_STRENGTH: tl.constexpr, SQUASH: tl.constexpr, ACC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """head [P] = activations of weight [P,H] @ h [H] + bias: key, gate (still before its sigmoid), strength, add.

    The activations have a loop of their own: in the layout of the matrix each thread would hold eight numbers of them.
    """
    for p0 in tl.range(0, P, BJ, disable_licm=True):
        o_p = p0 + tl.arange(0, BJ)
        tl.store(head_ptr + o_p, times_vector(weight_ptr, h_ptr, o_p, P, H, ACC, BJ, BK), mask=o_p < P)
    tl.debug_barrier()
    after_gate: tl.constexpr = R * W + R * (2 if KEY_STRENGTH else 1)
    for p0 in tl.range(0, P, BJ, disable_licm=True):
        o_p = p0 + tl.arange(0, BJ)
        head = tl.load(head_ptr + o_p, mask=o_p < P, other=0.0)
        head += tl.load(bias_ptr + o_p, mask=o_p < P, other=0.0).to(ACC)
        if KEY_STRENGTH:
            strength = tl.maximum(head, 0.0) + log_of_one_plus(tl.exp(-tl.abs(head)))
            head = tl.where((o_p >= R * W + R) & (o_p < after_gate), strength, head)
        if SQUASH:
            head = tl.where((o_p < R * W) | (o_p >= after_gate), tanh(head), head)
        # a block smaller than the program is held by several warps: none may read what another replaced
        tl.debug_barrier()
        tl.store(head_ptr + o_p, head, mask=o_p < P)
    tl.debug_barrier()


@triton.jit
def lstm_forward(
    gates_ptr,  # [4H] of ACC in: before, out: after the activations
    cell_ptr, new_cell_ptr,  # [H] of ACC in, out
    recurrent_ptr,  # [H] of ACC, h out
    output_ptr,  # [H], h out
    H: tl.constexpr, ACC: tl.constexpr, S: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Eq. 9 to 16, but for the matrix products."""
    for i0 in tl.range(0, H, BK, disable_licm=True):
        o_i = i0 + tl.arange(0, BK)
        m_i = o_i < H
        gate_in = sigmoid(tl.load(gates_ptr + o_i, mask=m_i, other=0.0))
        gate_forget = sigmoid(tl.load(gates_ptr + H + o_i, mask=m_i, other=0.0))
        candidate = tanh(tl.load(gates_ptr + 2 * H + o_i, mask=m_i, other=0.0))
        gate_out = sigmoid(tl.load(gates_ptr + 3 * H + o_i, mask=m_i, other=0.0))
        c = gate_forget * tl.load(cell_ptr + o_i, mask=m_i, other=0.0) + gate_in * candidate
        h = (gate_out * tanh(c)).to(S)  # what is kept is what counts: backward starts from it
        tl.debug_barrier()  # as in make_head
        tl.store(gates_ptr + o_i, gate_in, mask=m_i)
        tl.store(gates_ptr + H + o_i, gate_forget, mask=m_i)
        tl.store(gates_ptr + 2 * H + o_i, candidate, mask=m_i)
        tl.store(gates_ptr + 3 * H + o_i, gate_out, mask=m_i)
        tl.store(new_cell_ptr + o_i, c, mask=m_i)
        tl.store(recurrent_ptr + o_i, h.to(ACC), mask=m_i)
        tl.store(output_ptr + o_i, h, mask=m_i)
    tl.debug_barrier()


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
def head_backward(
    head_ptr,  # [P] of ACC, after the activations
    work_ptr,  # [P] of ACC, in: the gradient after, out: before the activations
    dhead_ptr,  # [P] out, the same
    P: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    KEY_STRENGTH: tl.constexpr, SQUASH: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    after_gate: tl.constexpr = R * W + R * (2 if KEY_STRENGTH else 1)
    for p0 in tl.range(0, P, BJ, disable_licm=True):
        o_p = p0 + tl.arange(0, BJ)
        value = tl.load(head_ptr + o_p, mask=o_p < P, other=0.0)
        grad = tl.load(work_ptr + o_p, mask=o_p < P, other=0.0)
        if KEY_STRENGTH:
            is_beta = (o_p >= R * W + R) & (o_p < after_gate)
            grad = tl.where(is_beta, -grad * exp_minus_one(-value), grad)
        if SQUASH:
            grad = tl.where((o_p < R * W) | (o_p >= after_gate), grad * (1.0 - value * value), grad)
        tl.debug_barrier()  # as in make_head
        tl.store(work_ptr + o_p, grad, mask=o_p < P)
        tl.store(dhead_ptr + o_p, grad, mask=o_p < P)
    tl.debug_barrier()


@triton.jit
def lstm_backward(
    doutput_ptr, drecurrent_ptr,  # [H], [H] of ACC: h's gradient from outside and from the next step
    weight_head_ptr, work_dhead_ptr,  # [P,H], [P] of ACC: and through the heads
    gates_ptr, cell_ptr, next_cell_ptr,  # [4H], [H], [H] of ACC, as forward left them
    dcell_ptr, new_dcell_ptr,  # [H] of ACC in, out
    work_dh_ptr,  # [H] of ACC
    work_dgates_ptr, dgates_ptr,  # [4H] of ACC, [4H] out: the gradient before the activations
    P: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Backward of the heads' projection and of eq. 9 to 16, but for the recurrent product."""
    for i0 in tl.range(0, H, BK, disable_licm=True):
        o_i = i0 + tl.arange(0, BK)
        dh = vector_times(weight_head_ptr, work_dhead_ptr, o_i, P, H, ACC, BJ, BK)
        tl.store(work_dh_ptr + o_i, dh, mask=o_i < H)
    tl.debug_barrier()
    for i0 in tl.range(0, H, BK, disable_licm=True):
        o_i = i0 + tl.arange(0, BK)
        m_i = o_i < H
        dh = tl.load(work_dh_ptr + o_i, mask=m_i, other=0.0) + tl.load(drecurrent_ptr + o_i, mask=m_i, other=0.0)
        dh += tl.load(doutput_ptr + o_i, mask=m_i, other=0.0).to(ACC)
        gate_in = tl.load(gates_ptr + o_i, mask=m_i, other=0.0)
        gate_forget = tl.load(gates_ptr + H + o_i, mask=m_i, other=0.0)
        candidate = tl.load(gates_ptr + 2 * H + o_i, mask=m_i, other=0.0)
        gate_out = tl.load(gates_ptr + 3 * H + o_i, mask=m_i, other=0.0)
        squashed = tanh(tl.load(next_cell_ptr + o_i, mask=m_i, other=0.0))
        dc = tl.load(dcell_ptr + o_i, mask=m_i, other=0.0) + dh * gate_out * (1.0 - squashed * squashed)
        din = dc * candidate * gate_in * (1.0 - gate_in)
        dforget = dc * tl.load(cell_ptr + o_i, mask=m_i, other=0.0) * gate_forget * (1.0 - gate_forget)
        dcandidate = dc * gate_in * (1.0 - candidate * candidate)
        dout = dh * squashed * gate_out * (1.0 - gate_out)
        tl.store(new_dcell_ptr + o_i, dc * gate_forget, mask=m_i)
        tl.store(work_dgates_ptr + o_i, din, mask=m_i)
        tl.store(dgates_ptr + o_i, din, mask=m_i)
        tl.store(work_dgates_ptr + H + o_i, dforget, mask=m_i)
        tl.store(dgates_ptr + H + o_i, dforget, mask=m_i)
        tl.store(work_dgates_ptr + 2 * H + o_i, dcandidate, mask=m_i)
        tl.store(dgates_ptr + 2 * H + o_i, dcandidate, mask=m_i)
        tl.store(work_dgates_ptr + 3 * H + o_i, dout, mask=m_i)
        tl.store(dgates_ptr + 3 * H + o_i, dout, mask=m_i)
    tl.debug_barrier()


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
    """A segment of steps at a time, the last one first: the memory's steps are taken again, then undone."""
    i_b = tl.program_id(0).to(tl.int64)
    heads = R + tl.minimum(B, 0)  # R, but no constant: ptxas would unroll the loops over heads, and spill
    length = length_of(lengths_ptr + i_b, T, HAS_LENGTHS)
    K: tl.constexpr = H + R * W
    work = work_ptr + i_b * 2 * SCRATCH
    memory = work_memory_ptr + i_b * N * W
    dmemory = work_dmemory_ptr + i_b * N * W
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
        start = (segments - 1 - back) * checkpoint_every
        steps = tl.minimum(start + checkpoint_every, length) - start
        i_copy = (start // checkpoint_every - 1) * B + i_b
        record = records_ptr + i_b * RECORD
        if start == 0:
            copy(c_ptr + i_b * H, record, H, ACC, BK)
            m = memory_in(memory_ptr + i_b * N * W, memory, N, W, ACC, BN, BW)
            weights = weights_in(previous_ptr + i_b * R * N, record + weights_at, N, R, ACC, BN, BR)
        else:
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
    state = contiguous(h, c, reads, memory, usage, read_weights)
    acc = acc_of(memory.dtype)
    work = functools.partial(torch.empty, dtype=acc.torch, device=memory.device)
    output = memory.new_empty(time, batch, recurrent)
    state1 = tuple(torch.empty_like(tensor) for tensor in state)
    least_used, copies, weight_copies = empty_saved(memory, time, heads, checkpoint_every, save)
    gates = work(time, batch, 4 * hidden) if save else work(batch, 4 * hidden)
    c_copies = work(*((copies.shape[0], batch, hidden) if save else (0,)))
    slots_out = least_used if save else torch.empty(time, batch, heads, dtype=torch.int32, device=memory.device)
    options = launch(mann_sequence_fwd_kernel, slots, width, heads, memory.dtype) | tiles(hidden, recurrent)
    scratch, tiled = aligned(recurrent + hidden + size), int(slots > options["BN"])
    if batch:
        mann_sequence_fwd_kernel[(batch,)](
            gates_x, weight_hh, weight_head, bias_head, *state, pointer(lengths, memory), output, *state1,
            gates, slots_out, c_copies, copies, weight_copies, work(batch, 2, scratch),
            work(tiled * batch, slots, width), work(2, tiled * batch, heads, slots), work(tiled * batch, slots),
            time, batch, hidden, size, slots, width, heads, checkpoint_every, decay, eps,
            key_strength, write_add, squash, lengths is not None, save, shared, erase_all, acc.triton,
            getattr(tl, str(memory.dtype).removeprefix("torch.")), scratch, **options,
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
    grads1 = contiguous(dh1, dc1, dreads1, dmemory1, dread_weights1)
    inputs = contiguous(weight_hh, weight_head, bias_head, c, memory, read_weights)
    lengths, doutput, output = contiguous(lengths, doutput, output)
    acc, segment = acc_of(memory.dtype), min(time, checkpoint_every)
    work = functools.partial(torch.empty, dtype=acc.torch, device=memory.device)
    dgates, dhead = memory.new_empty(time, batch, 4 * hidden), memory.new_empty(time, batch, size)
    dh, dc, dreads = torch.empty_like(c), torch.empty_like(c), c.new_empty(batch, heads, width)
    dmemory, dread_weights = torch.empty_like(inputs[4]), torch.empty_like(inputs[5])
    options = launch(mann_sequence_bwd_kernel, slots, width, heads, memory.dtype) | tiles(hidden, recurrent)
    scratch, tiled = aligned(recurrent + 6 * hidden + size), int(slots > options["BN"])
    record = aligned(hidden + heads * slots + size + heads * width)
    if batch:
        mann_sequence_bwd_kernel[(batch,)](
            doutput, *(pointer(grad, memory) for grad in grads1), *inputs, pointer(lengths, memory),
            output, gates, least_used, c_copies, copies, weight_copies,
            dgates, dhead, dh, dc, dreads, dmemory, dread_weights,
            work(batch, 2, scratch), work(tiled * batch, slots, width), work(tiled * batch, slots, width),
            work(2, tiled * batch, heads, slots), work(segment + 1, batch, record),
            work(segment // RESTART_EVERY, batch, slots, width),
            time, batch, hidden, size, slots, width, heads, checkpoint_every, eps,
            *(grad is not None for grad in grads1), key_strength, write_add, squash, lengths is not None,
            shared, erase_all, RESTART_EVERY, acc.triton, scratch, record, **options,
        )  # fmt: skip
    return dgates, dhead, dh, dc, dreads, dmemory, dread_weights
