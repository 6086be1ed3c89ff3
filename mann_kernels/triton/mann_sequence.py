"""Triton kernels of mann_sequence: a whole episode of LSTM controller, heads and memory in one launch, one program per example."""

import functools

import torch
import triton
import triton.language as tl

from mann_kernels.ops.lrua_sequence import empty_saved
from mann_kernels.triton._launch import RESTART_EVERY, acc_of, contiguous, launch, pointer
from mann_kernels.triton._step import (
    copy,
    exp_minus_one,
    fill_zero,
    log_of_one_plus,
    sigmoid,
    step_backward,
    step_forward,
    tanh,
)

#: A tile [BJ,BK] of a weight matrix: 64 rows of 64 float32 are 32 registers for each of 128 threads.
TILES = {"BJ": 64, "BK": 64}


@triton.jit
def times_vector(weight_ptr, vector_ptr, o_j, rows, columns, ACC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr):
    """Rows o_j [BJ] of weight [rows, columns] @ vector [columns]."""
    out = tl.zeros([BJ], ACC)
    for k0 in range(0, columns, BK):
        o_k = k0 + tl.arange(0, BK)
        mask = (o_j < rows)[:, None] & (o_k < columns)[None, :]
        weight = tl.load(weight_ptr + o_j[:, None].to(tl.int64) * columns + o_k[None, :], mask=mask, other=0.0).to(ACC)
        vector = tl.load(vector_ptr + o_k, mask=o_k < columns, other=0.0).to(ACC)
        out += tl.sum(weight * vector[None, :], axis=1)
    return out


@triton.jit
def vector_times(weight_ptr, vector_ptr, o_k, rows, columns, ACC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr):
    """Columns o_k [BK] of vector [rows] @ weight [rows, columns]."""
    out = tl.zeros([BK], ACC)
    for j0 in range(0, rows, BJ):
        o_j = j0 + tl.arange(0, BJ)
        mask = (o_j < rows)[:, None] & (o_k < columns)[None, :]
        weight = tl.load(weight_ptr + o_j[:, None].to(tl.int64) * columns + o_k[None, :], mask=mask, other=0.0).to(ACC)
        vector = tl.load(vector_ptr + o_j, mask=o_j < rows, other=0.0).to(ACC)
        out += tl.sum(weight * vector[:, None], axis=0)
    return out


@triton.jit
def make_head(
    weight_ptr, bias_ptr, h_ptr, head_ptr, P, H, R, W,
    KEY_STRENGTH: tl.constexpr, SQUASH: tl.constexpr, ACC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """head [P] = activations of weight [P,H] @ h [H] + bias: key, gate (still before its sigmoid), strength, add."""
    for p0 in range(0, P, BJ):
        o_p = p0 + tl.arange(0, BJ)
        head = times_vector(weight_ptr, h_ptr, o_p, P, H, ACC, BJ, BK)
        head += tl.load(bias_ptr + o_p, mask=o_p < P, other=0.0).to(ACC)
        after_gate = R * W + R
        if KEY_STRENGTH:
            strength = tl.maximum(head, 0.0) + log_of_one_plus(tl.exp(-tl.abs(head)))
            head = tl.where((o_p >= after_gate) & (o_p < after_gate + R), strength, head)
            after_gate += R
        if SQUASH:
            head = tl.where((o_p < R * W) | (o_p >= after_gate), tanh(head), head)
        tl.store(head_ptr + o_p, head, mask=o_p < P)
    tl.debug_barrier()


@triton.jit
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
    work_ptr, work_c_ptr, head_ptr,  # [B,H+R*W], [B,H], [B,P] of ACC
    work_memory_ptr, work_usage_ptr, work_weights_ptr,  # [B,N,W], [B,N], [2,B,R,N] of ACC
    T, B, H, P, N, W, R, checkpoint_every, decay, eps,
    KEY_STRENGTH: tl.constexpr, HAS_ADD: tl.constexpr, SQUASH: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SAVE: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr, ACC: tl.constexpr, S: tl.constexpr,
    BJ: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_r, o_w = tl.arange(0, BR), tl.arange(0, BW)
    m_rw = (o_r < R)[:, None] & (o_w < W)[None, :]
    words = o_r[:, None] * W + o_w[None, :]
    length = T
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + i_b).to(tl.int32)
    K = H + R * W
    recurrent = work_ptr + i_b * K
    cell = work_c_ptr + i_b * H
    memory = work_memory_ptr + i_b * N * W
    usage = work_usage_ptr + i_b * N
    head = head_ptr + i_b * P
    copy(h_ptr + i_b * H, recurrent, H, ACC, BK)
    copy(reads_ptr + i_b * R * W, recurrent + H, R * W, ACC, BK)
    copy(c_ptr + i_b * H, cell, H, ACC, BK)
    copy(memory_ptr + i_b * N * W, memory, N * W, ACC, 1024)
    copy(usage_ptr + i_b * N, usage, N, ACC, BN)
    copy(previous_ptr + i_b * R * N, work_weights_ptr + i_b * R * N, R * N, ACC, 1024)
    tl.debug_barrier()
    for t in range(0, T):
        row = t * B + i_b
        now = tl.maximum(tl.minimum(t, length), 0)  # steps taken so far: the two weight buffers take turns
        before = work_weights_ptr + ((now % 2) * B + i_b) * R * N
        after = work_weights_ptr + (((now + 1) % 2) * B + i_b) * R * N
        gates = gates_ptr + (row if SAVE else i_b) * 4 * H
        if t < length:
            for j0 in range(0, 4 * H, BJ):
                o_j = j0 + tl.arange(0, BJ)
                gate = times_vector(weight_hh_ptr, recurrent, o_j, 4 * H, K, ACC, BJ, BK)
                gate += tl.load(gates_x_ptr + row * 4 * H + o_j, mask=o_j < 4 * H, other=0.0).to(ACC)
                tl.store(gates + o_j, gate, mask=o_j < 4 * H)
            tl.debug_barrier()
            for i0 in range(0, H, BK):  # eq. 9 to 16
                o_i = i0 + tl.arange(0, BK)
                m_i = o_i < H
                gate_in = sigmoid(tl.load(gates + o_i, mask=m_i, other=0.0))
                gate_forget = sigmoid(tl.load(gates + H + o_i, mask=m_i, other=0.0))
                candidate = tanh(tl.load(gates + 2 * H + o_i, mask=m_i, other=0.0))
                gate_out = sigmoid(tl.load(gates + 3 * H + o_i, mask=m_i, other=0.0))
                c = gate_forget * tl.load(cell + o_i, mask=m_i, other=0.0) + gate_in * candidate
                h = (gate_out * tanh(c)).to(S)  # what is kept is what counts: backward starts from it
                tl.store(gates + o_i, gate_in, mask=m_i)
                tl.store(gates + H + o_i, gate_forget, mask=m_i)
                tl.store(gates + 2 * H + o_i, candidate, mask=m_i)
                tl.store(gates + 3 * H + o_i, gate_out, mask=m_i)
                tl.store(cell + o_i, c, mask=m_i)
                tl.store(recurrent + o_i, h.to(ACC), mask=m_i)
                tl.store(output_ptr + row * K + o_i, h, mask=m_i)
            tl.debug_barrier()
            make_head(weight_head_ptr, bias_head_ptr, recurrent, head, P, H, R, W, KEY_STRENGTH, SQUASH, ACC, BJ, BK)
            gate_at = head + R * W
            beta_at = gate_at + R
            add_at = (beta_at + R if KEY_STRENGTH else beta_at) if HAS_ADD else head
            reads = step_forward(
                memory, memory, usage, usage, before, after, after, head, add_at, gate_at, beta_at,
                slots_ptr + row * R, memory,
                N, W, R, decay, eps, True, KEY_STRENGTH, SHARED, ERASE_ALL, ACC, BN, BW, BR,
            ).to(S)  # fmt: skip
            tl.store(recurrent + H + words, reads.to(ACC), mask=m_rw)
            tl.store(output_ptr + row * K + H + words, reads, mask=m_rw)
            tl.debug_barrier()
            now += 1
        else:
            fill_zero(output_ptr + row * K, K, ACC, BK)
            fill_zero(slots_ptr + row * R, R, tl.int32, BR)
        if SAVE:  # noqa: SIM102  (one is decided when compiling, the other while running)
            if ((t + 1) % checkpoint_every == 0) & (t + 1 < T):
                i_copy = (t // checkpoint_every) * B + i_b
                copy(cell, c_copies_ptr + i_copy * H, H, ACC, BK)
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
    copy(recurrent, h1_ptr + i_b * H, H, ACC, BK)
    copy(recurrent + H, reads1_ptr + i_b * R * W, R * W, ACC, BK)
    copy(cell, c1_ptr + i_b * H, H, ACC, BK)
    copy(memory, memory1_ptr + i_b * N * W, N * W, ACC, 1024)
    copy(usage, usage1_ptr + i_b * N, N, ACC, BN)
    copy(work_weights_ptr + ((last % 2) * B + i_b) * R * N, weights1_ptr + i_b * R * N, R * N, ACC, 1024)


@triton.jit
def take(grad_ptr, target_ptr, size, PRESENT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """A gradient that may be absent."""
    if PRESENT:
        copy(grad_ptr, target_ptr, size, ACC, BLOCK)
    else:
        fill_zero(target_ptr, size, ACC, BLOCK)


@triton.jit
def mann_sequence_bwd_kernel(
    doutput_ptr, dh1_ptr, dc1_ptr, dreads1_ptr, dmemory1_ptr, dweights1_ptr,  # of output and the state after
    weight_hh_ptr, weight_head_ptr, bias_head_ptr, c_ptr, memory_ptr, previous_ptr, lengths_ptr,  # as forward
    output_ptr, gates_ptr, slots_ptr, c_copies_ptr, copies_ptr, weight_copies_ptr,  # as forward
    dgates_ptr, dhead_ptr,  # [T,B,4H], [T,B,P] out, before the activations
    dh_ptr, dc_ptr, dreads_ptr, dmemory_ptr, dprevious_ptr,  # of the state before, out
    work_ptr, work_dc_ptr, work_dgates_ptr, work_dhead_ptr,  # [B,H+R*W], [B,H], [B,4H], [B,P] of ACC
    work_memory_ptr, work_dmemory_ptr, work_dweights_ptr,  # [B,N,W] twice, [2,B,R,N] of ACC
    heads_ptr, cells_ptr,  # [segment,B,P], [segment+1,B,H] of ACC
    weights_ptr, rows_ptr, restarts_ptr,  # [segment+1,B,R,N], [segment,B,R,W], [segment/RESTART,B,N,W] of ACC
    T, B, H, P, N, W, R, checkpoint_every, eps,
    HAS_DH: tl.constexpr, HAS_DC: tl.constexpr, HAS_DREADS: tl.constexpr, HAS_DMEMORY: tl.constexpr,
    HAS_DWEIGHTS: tl.constexpr, KEY_STRENGTH: tl.constexpr, HAS_ADD: tl.constexpr, SQUASH: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr, RESTART: tl.constexpr,
    ACC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A segment of steps at a time, the last one first: the memory's steps are taken again, then undone."""
    i_b = tl.program_id(0).to(tl.int64)
    o_r, o_w = tl.arange(0, BR), tl.arange(0, BW)
    m_rw = (o_r < R)[:, None] & (o_w < W)[None, :]
    words = o_r[:, None] * W + o_w[None, :]
    length = T
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths_ptr + i_b).to(tl.int32), T)
    K = H + R * W
    i_heads = tl.full((), R * N, tl.int64) * B  # from one step's weights to the next
    drecurrent = work_ptr + i_b * K
    dcell = work_dc_ptr + i_b * H
    dgates = work_dgates_ptr + i_b * 4 * H
    dhead = work_dhead_ptr + i_b * P
    memory = work_memory_ptr + i_b * N * W
    dmemory = work_dmemory_ptr + i_b * N * W
    # the gradient of the read weights after step t stands in buffer t % 2
    last = work_dweights_ptr + ((tl.maximum(length, 1) - 1) % 2 * B + i_b) * R * N
    take(dh1_ptr + i_b * H, drecurrent, H, HAS_DH, ACC, BK)
    take(dreads1_ptr + i_b * R * W, drecurrent + H, R * W, HAS_DREADS, ACC, BK)
    take(dc1_ptr + i_b * H, dcell, H, HAS_DC, ACC, BK)
    take(dmemory1_ptr + i_b * N * W, dmemory, N * W, HAS_DMEMORY, ACC, 1024)
    take(dweights1_ptr + i_b * R * N, last, R * N, HAS_DWEIGHTS, ACC, 1024)
    for t in range(tl.maximum(length, 0), T):
        fill_zero(dgates_ptr + (t * B + i_b) * 4 * H, 4 * H, ACC, BK)
        fill_zero(dhead_ptr + (t * B + i_b) * P, P, ACC, BK)
    gate_at = R * W
    beta_at = gate_at + R
    after_gate = beta_at + R if KEY_STRENGTH else beta_at
    add_at = after_gate if HAS_ADD else 0
    segments = (length + checkpoint_every - 1) // checkpoint_every
    for back in range(0, segments):
        start = (segments - 1 - back) * checkpoint_every
        steps = tl.minimum(start + checkpoint_every, length) - start
        if start == 0:
            copy(c_ptr + i_b * H, cells_ptr + i_b * H, H, ACC, BK)
            copy(memory_ptr + i_b * N * W, memory, N * W, ACC, 1024)
            copy(previous_ptr + i_b * R * N, weights_ptr + i_b * R * N, R * N, ACC, 1024)
        else:
            i_copy = (start // checkpoint_every - 1) * B + i_b
            copy(c_copies_ptr + i_copy * H, cells_ptr + i_b * H, H, ACC, BK)
            copy(copies_ptr + i_copy * N * W, memory, N * W, ACC, 1024)
            copy(weight_copies_ptr + i_copy * R * N, weights_ptr + i_b * R * N, R * N, ACC, 1024)
        tl.debug_barrier()
        for j in range(0, steps):
            row = (start + j) * B + i_b
            gates = gates_ptr + row * 4 * H
            cell = cells_ptr + (j * B + i_b) * H
            for i0 in range(0, H, BK):
                o_i = i0 + tl.arange(0, BK)
                m_i = o_i < H
                c = tl.load(gates + H + o_i, mask=m_i, other=0.0) * tl.load(cell + o_i, mask=m_i, other=0.0)
                c += tl.load(gates + o_i, mask=m_i, other=0.0) * tl.load(gates + 2 * H + o_i, mask=m_i, other=0.0)
                tl.store(cell + B * H + o_i, c, mask=m_i)
            head = heads_ptr + (j * B + i_b) * P
            make_head(
                weight_head_ptr,
                bias_head_ptr,
                output_ptr + row * K,
                head,
                P,
                H,
                R,
                W,
                KEY_STRENGTH,
                SQUASH,
                ACC,
                BJ,
                BK,
            )
            before = weights_ptr + (j * B + i_b) * R * N
            step_forward(
                memory, memory, head, head, before, before + i_heads, before + i_heads,
                head, head + add_at, head + gate_at, head + beta_at, slots_ptr + row * R,
                rows_ptr + (j * B + i_b) * R * W,
                N, W, R, 0.0, eps, False, KEY_STRENGTH, SHARED, ERASE_ALL, ACC, BN, BW, BR,
            )  # fmt: skip
            if (j + 1) % RESTART == 0:
                copy(memory, restarts_ptr + (j // RESTART * B + i_b) * N * W, N * W, ACC, 1024)
                tl.debug_barrier()
        for i in range(0, steps):
            j = steps - 1 - i
            t = start + j
            row = t * B + i_b
            if (j + 1) % RESTART == 0:
                copy(restarts_ptr + (j // RESTART * B + i_b) * N * W, memory, N * W, ACC, 1024)
                tl.debug_barrier()
            head = heads_ptr + (j * B + i_b) * P
            before = weights_ptr + (j * B + i_b) * R * N
            dreads = tl.load(drecurrent + H + words, mask=m_rw, other=0.0)
            dreads += tl.load(doutput_ptr + row * K + H + words, mask=m_rw, other=0.0).to(ACC)
            step_backward(
                memory, dmemory,
                work_dweights_ptr + (t % 2 * B + i_b) * R * N, work_dweights_ptr + ((t + 1) % 2 * B + i_b) * R * N,
                dreads, before + i_heads, before, head, head + add_at, head + gate_at, head + beta_at,
                slots_ptr + row * R, rows_ptr + (j * B + i_b) * R * W,
                dhead, dhead + add_at, dhead + gate_at, dhead + beta_at,
                N, W, R, eps, KEY_STRENGTH, HAS_ADD, SHARED, ERASE_ALL, ACC, BN, BW, BR,
            )  # fmt: skip
            for p0 in range(0, P, BK):  # before the activations
                o_p = p0 + tl.arange(0, BK)
                value = tl.load(head + o_p, mask=o_p < P, other=0.0)
                grad = tl.load(dhead + o_p, mask=o_p < P, other=0.0)
                if KEY_STRENGTH:
                    is_beta = (o_p >= beta_at) & (o_p < after_gate)
                    grad = tl.where(is_beta, -grad * exp_minus_one(-value), grad)
                if SQUASH:
                    grad = tl.where((o_p < gate_at) | (o_p >= after_gate), grad * (1.0 - value * value), grad)
                tl.store(dhead + o_p, grad, mask=o_p < P)
                tl.store(dhead_ptr + row * P + o_p, grad, mask=o_p < P)
            tl.debug_barrier()
            gates = gates_ptr + row * 4 * H
            cell = cells_ptr + (j * B + i_b) * H
            for i0 in range(0, H, BK):  # through the heads and eq. 9 to 16
                o_i = i0 + tl.arange(0, BK)
                m_i = o_i < H
                dh = vector_times(weight_head_ptr, dhead, o_i, P, H, ACC, BJ, BK)
                dh += tl.load(drecurrent + o_i, mask=m_i, other=0.0)
                dh += tl.load(doutput_ptr + row * K + o_i, mask=m_i, other=0.0).to(ACC)
                gate_in = tl.load(gates + o_i, mask=m_i, other=0.0)
                gate_forget = tl.load(gates + H + o_i, mask=m_i, other=0.0)
                candidate = tl.load(gates + 2 * H + o_i, mask=m_i, other=0.0)
                gate_out = tl.load(gates + 3 * H + o_i, mask=m_i, other=0.0)
                squashed = tanh(tl.load(cell + B * H + o_i, mask=m_i, other=0.0))
                dc = tl.load(dcell + o_i, mask=m_i, other=0.0) + dh * gate_out * (1.0 - squashed * squashed)
                din = dc * candidate * gate_in * (1.0 - gate_in)
                dforget = dc * tl.load(cell + o_i, mask=m_i, other=0.0) * gate_forget * (1.0 - gate_forget)
                dcandidate = dc * gate_in * (1.0 - candidate * candidate)
                dout = dh * squashed * gate_out * (1.0 - gate_out)
                tl.store(dcell + o_i, dc * gate_forget, mask=m_i)
                target = dgates_ptr + row * 4 * H
                tl.store(dgates + o_i, din, mask=m_i)
                tl.store(target + o_i, din, mask=m_i)
                tl.store(dgates + H + o_i, dforget, mask=m_i)
                tl.store(target + H + o_i, dforget, mask=m_i)
                tl.store(dgates + 2 * H + o_i, dcandidate, mask=m_i)
                tl.store(target + 2 * H + o_i, dcandidate, mask=m_i)
                tl.store(dgates + 3 * H + o_i, dout, mask=m_i)
                tl.store(target + 3 * H + o_i, dout, mask=m_i)
            tl.debug_barrier()
            for k0 in range(0, K, BK):
                o_k = k0 + tl.arange(0, BK)
                tl.store(
                    drecurrent + o_k, vector_times(weight_hh_ptr, dgates, o_k, 4 * H, K, ACC, BJ, BK), mask=o_k < K
                )
            tl.debug_barrier()
    tl.debug_barrier()
    first = last
    if length > 0:
        first = work_dweights_ptr + (B + i_b) * R * N
    copy(drecurrent, dh_ptr + i_b * H, H, ACC, BK)
    copy(drecurrent + H, dreads_ptr + i_b * R * W, R * W, ACC, BK)
    copy(dcell, dc_ptr + i_b * H, H, ACC, BK)
    copy(dmemory, dmemory_ptr + i_b * N * W, N * W, ACC, 1024)
    copy(first, dprevious_ptr + i_b * R * N, R * N, ACC, 1024)


def forward(
    gates_x, weight_hh, weight_head, bias_head, h, c, reads, memory, usage, read_weights, lengths,
    write_add, key_strength, squash, shared, erase_all, decay, eps, checkpoint_every, save,
):  # fmt: skip
    """The operator mann_sequence: same arguments and results as its schema."""
    (time, batch), (_, slots, width), heads = gates_x.shape[:2], memory.shape, reads.shape[1]
    hidden, size = h.shape[1], weight_head.shape[0]
    gates_x, weight_hh, weight_head, bias_head, lengths = contiguous(
        gates_x, weight_hh, weight_head, bias_head, lengths
    )
    state = contiguous(h, c, reads, memory, usage, read_weights)
    acc = acc_of(memory.dtype)
    work = functools.partial(torch.empty, dtype=acc.torch, device=memory.device)
    output = memory.new_empty(time, batch, weight_hh.shape[1])
    state1 = tuple(torch.empty_like(tensor) for tensor in state)
    least_used, copies, weight_copies = empty_saved(memory, time, heads, checkpoint_every, save)
    gates = work(time, batch, 4 * hidden) if save else work(batch, 4 * hidden)
    c_copies = work(*((copies.shape[0], batch, hidden) if save else (0,)))
    slots_out = least_used if save else torch.empty(time, batch, heads, dtype=torch.int32, device=memory.device)
    if batch:
        mann_sequence_fwd_kernel[(batch,)](
            gates_x, weight_hh, weight_head, bias_head, *state, pointer(lengths, memory), output, *state1,
            gates, slots_out, c_copies, copies, weight_copies,
            work(batch, weight_hh.shape[1]), work(batch, hidden), work(batch, size),
            work(batch, slots, width), work(batch, slots), work(2, batch, heads, slots),
            time, batch, hidden, size, slots, width, heads, checkpoint_every, decay, eps,
            key_strength, write_add, squash, lengths is not None, save, shared, erase_all, acc.triton,
            getattr(tl, str(memory.dtype).removeprefix("torch.")), **TILES, **launch(slots, width, heads),
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
    if batch:
        mann_sequence_bwd_kernel[(batch,)](
            doutput, *(pointer(grad, memory) for grad in grads1), *inputs, pointer(lengths, memory),
            output, gates, least_used, c_copies, copies, weight_copies,
            dgates, dhead, dh, dc, dreads, dmemory, dread_weights,
            work(batch, recurrent), work(batch, hidden), work(batch, 4 * hidden), work(batch, size),
            work(batch, slots, width), work(batch, slots, width), work(2, batch, heads, slots),
            work(segment, batch, size), work(segment + 1, batch, hidden),
            work(segment + 1, batch, heads, slots), work(segment, batch, heads, width),
            work(segment // RESTART_EVERY, batch, slots, width),
            time, batch, hidden, size, slots, width, heads, checkpoint_every, eps,
            *(grad is not None for grad in grads1), key_strength, write_add, squash, lengths is not None,
            shared, erase_all, RESTART_EVERY, acc.triton, **TILES, **launch(slots, width, heads),
        )  # fmt: skip
    return dgates, dhead, dh, dc, dreads, dmemory, dread_weights
