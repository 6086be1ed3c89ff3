"""Triton kernels of lrua_write_weights."""

import torch
import triton
import triton.language as tl

from mann_kernels.triton._launch import acc_of, contiguous, launch
from mann_kernels.triton._step import choose_slots, own_slots, sigmoid


@triton.jit
def lrua_write_weights_fwd_kernel(
    usage_ptr, previous_ptr, gate_ptr,  # [B,N], [B,R,N], [B,R]
    write_ptr, slots_ptr,  # [B,R,N] out, int32 [B,R] out
    N, R,
    SHARED: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    choose_slots(usage_ptr + i_b * N, slots_ptr + i_b * R, N, R, ACC, BN)
    tl.debug_barrier()
    slots = tl.load(slots_ptr + i_b * R + o_r, mask=m_r, other=-1)
    gate = sigmoid(tl.load(gate_ptr + i_b * R + o_r, mask=m_r, other=0.0).to(ACC))
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        at = i_b * R * N + o_r[:, None].to(tl.int64) * N + o_n[None, :]
        m_rn = m_r[:, None] & (o_n < N)[None, :]
        previous = tl.load(previous_ptr + at, mask=m_rn, other=0.0).to(ACC)
        write = gate[:, None] * previous + (1.0 - gate[:, None]) * own_slots(slots, o_n, SHARED, ACC)  # eq. 7
        tl.store(write_ptr + at, write, mask=m_rn)


@triton.jit
def lrua_write_weights_bwd_kernel(
    dwrite_ptr, previous_ptr, gate_ptr, slots_ptr,  # [B,R,N], [B,R,N], [B,R], int32 [B,R]
    dprevious_ptr, dgate_ptr,  # [B,R,N], [B,R] out
    N, R,
    SHARED: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    slots = tl.load(slots_ptr + i_b * R + o_r, mask=m_r, other=-1)
    gate = sigmoid(tl.load(gate_ptr + i_b * R + o_r, mask=m_r, other=0.0).to(ACC))
    dgate = tl.zeros([BR], ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        at = i_b * R * N + o_r[:, None].to(tl.int64) * N + o_n[None, :]
        m_rn = m_r[:, None] & (o_n < N)[None, :]
        previous = tl.load(previous_ptr + at, mask=m_rn, other=0.0).to(ACC)
        dwrite = tl.load(dwrite_ptr + at, mask=m_rn, other=0.0).to(ACC)
        dgate += tl.sum(dwrite * (previous - own_slots(slots, o_n, SHARED, ACC)), axis=1)
        tl.store(dprevious_ptr + at, gate[:, None] * dwrite, mask=m_rn)
    tl.store(dgate_ptr + i_b * R + o_r, dgate * gate * (1.0 - gate), mask=m_r)


def _launch(slots, heads):
    sizes = launch(slots, 16, heads)
    return {name: sizes[name] for name in ("BN", "BR", "num_warps")}


def forward(usage, read_weights, gate, shared):
    """The operator lrua_write_weights: same arguments and results as its schema."""
    batch, heads, slots = read_weights.shape
    usage, read_weights, gate = contiguous(usage, read_weights, gate)
    write_weights = torch.empty_like(read_weights)
    least_used = torch.empty(gate.shape, dtype=torch.int32, device=gate.device)
    if batch:
        lrua_write_weights_fwd_kernel[(batch,)](
            usage, read_weights, gate, write_weights, least_used, slots, heads,
            shared, acc_of(usage.dtype).triton, **_launch(slots, heads),
        )  # fmt: skip
    return write_weights, least_used


def backward(dwrite_weights, read_weights, gate, least_used, shared):
    """The operator lrua_write_weights_backward: same arguments and results as its schema."""
    batch, heads, slots = read_weights.shape
    dwrite_weights, read_weights, gate = contiguous(dwrite_weights, read_weights, gate)
    dread_weights, dgate = torch.empty_like(read_weights), torch.empty_like(gate)
    if batch:
        lrua_write_weights_bwd_kernel[(batch,)](
            dwrite_weights, read_weights, gate, least_used, dread_weights, dgate, slots, heads,
            shared, acc_of(gate.dtype).triton, **_launch(slots, heads),
        )  # fmt: skip
    return dread_weights, dgate
