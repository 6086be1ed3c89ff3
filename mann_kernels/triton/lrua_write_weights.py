"""Triton kernels of lrua_write_weights."""

import torch
import triton
import triton.language as tl

from mann_kernels.triton._launch import acc_of, contiguous, launch
from mann_kernels.triton._step import choose_slots, own_slots, write_weights_of
from mann_kernels.triton._tile import load_heads, load_slots, sigmoid, store_slots


@triton.jit
def lrua_write_weights_fwd_kernel(
    usage_ptr, previous_ptr, gate_ptr,  # [B,N], [B,R,N], [B,R]
    write_ptr, slots_ptr,  # [B,R,N] out, int32 [B,R] out
    N: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr, ACC: tl.constexpr, BU: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_u, at = tl.arange(0, BU), i_b * R * N
    usage = tl.load(usage_ptr + i_b * N + o_u, mask=o_u < N, other=0.0).to(ACC)
    slots = choose_slots(usage, usage_ptr + i_b * N, slots_ptr + i_b * R, N, R, ACC, BU, BR)
    gate = sigmoid(load_heads(gate_ptr + i_b * R, R, ACC, BR))
    for n0 in range(0, N, BU):
        o_n = n0 + o_u
        write = write_weights_of(gate, load_slots(previous_ptr + at, o_n, N, R, ACC, BR), slots, o_n, SHARED, ACC)
        store_slots(write_ptr + at, write, o_n, N, R, BR)


@triton.jit
def lrua_write_weights_bwd_kernel(
    dwrite_ptr, previous_ptr, gate_ptr, slots_ptr,  # [B,R,N], [B,R,N], [B,R], int32 [B,R]
    dprevious_ptr, dgate_ptr,  # [B,R,N], [B,R] out
    N: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr, ACC: tl.constexpr, BU: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_r, at = tl.arange(0, BR), i_b * R * N
    slots = tl.load(slots_ptr + i_b * R + o_r, mask=o_r < R, other=-1)
    gate = sigmoid(load_heads(gate_ptr + i_b * R, R, ACC, BR))
    dgate = tl.zeros([BR], ACC)
    for n0 in range(0, N, BU):
        o_n = n0 + tl.arange(0, BU)
        previous = load_slots(previous_ptr + at, o_n, N, R, ACC, BR)
        dwrite = load_slots(dwrite_ptr + at, o_n, N, R, ACC, BR)
        dgate += tl.sum(dwrite * (previous - own_slots(slots, o_n, SHARED, ACC)), axis=1)
        store_slots(dprevious_ptr + at, gate[:, None] * dwrite, o_n, N, R, BR)
    tl.store(dgate_ptr + i_b * R + o_r, dgate * gate * (1.0 - gate), mask=o_r < R)


def forward(usage, read_weights, gate, shared):
    """The operator lrua_write_weights: same arguments and results as its schema."""
    batch, heads, slots = read_weights.shape
    usage, read_weights, gate = contiguous(usage, read_weights, gate)
    write_weights = torch.empty_like(read_weights)
    least_used = torch.empty(gate.shape, dtype=torch.int32, device=gate.device)
    if batch:
        lrua_write_weights_fwd_kernel[(batch,)](
            usage_ptr=usage, previous_ptr=read_weights, gate_ptr=gate, write_ptr=write_weights, slots_ptr=least_used,
            N=slots, R=heads, SHARED=shared, ACC=acc_of(usage.dtype).triton,
            **launch(lrua_write_weights_fwd_kernel, slots, 1, heads, usage.dtype),
        )  # fmt: skip
    return write_weights, least_used


def backward(dwrite_weights, read_weights, gate, least_used, shared):
    """The operator lrua_write_weights_backward: same arguments and results as its schema."""
    batch, heads, slots = read_weights.shape
    dwrite_weights, read_weights, gate = contiguous(dwrite_weights, read_weights, gate)
    dread_weights, dgate = torch.empty_like(read_weights), torch.empty_like(gate)
    if batch:
        lrua_write_weights_bwd_kernel[(batch,)](
            dwrite_ptr=dwrite_weights, previous_ptr=read_weights, gate_ptr=gate, slots_ptr=least_used,
            dprevious_ptr=dread_weights, dgate_ptr=dgate, N=slots, R=heads, SHARED=shared,
            ACC=acc_of(gate.dtype).triton, **launch(lrua_write_weights_bwd_kernel, slots, 1, heads, gate.dtype),
        )  # fmt: skip
    return dread_weights, dgate
