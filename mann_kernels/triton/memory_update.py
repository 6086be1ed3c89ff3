"""Triton kernels of memory_update."""

import torch
import triton
import triton.language as tl

from mann_kernels.triton._launch import acc_of, contiguous, launch
from mann_kernels.triton._step import erased_slots, exact_dot, load_rows, store_rows


@triton.jit
def memory_update_fwd_kernel(
    memory_ptr, write_ptr, add_ptr, slots_ptr,  # [B,N,W], [B,R,N], [B,R,W], int32 [B,R]
    new_memory_ptr,  # [B,N,W] out
    N, W, R,
    ERASE_ALL: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_r, o_w = tl.arange(0, BR), tl.arange(0, BW)
    slots = tl.load(slots_ptr + i_b * R + o_r, mask=o_r < R, other=-1)
    add = load_rows(add_ptr + i_b * R * W, R, W, ACC, BR, BW)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        at = i_b * R * N + o_r[:, None].to(tl.int64) * N + o_n[None, :]
        write = tl.load(write_ptr + at, mask=(o_r < R)[:, None] & (o_n < N)[None, :], other=0.0).to(ACC)
        tile = i_b * N * W + o_n[:, None].to(tl.int64) * W + o_w[None, :]
        m_nw = (o_n < N)[:, None] & (o_w < W)[None, :]
        m = tl.load(memory_ptr + tile, mask=m_nw, other=0.0).to(ACC)
        m = tl.where(erased_slots(slots, o_n, ERASE_ALL, BR)[:, None], 0.0, m)
        tl.store(new_memory_ptr + tile, m + exact_dot(tl.trans(write), add, ACC), mask=m_nw)  # eq. 8


@triton.jit
def memory_update_bwd_kernel(
    dmemory_ptr, write_ptr, add_ptr, slots_ptr,  # [B,N,W], [B,R,N], [B,R,W], int32 [B,R]
    dmemory0_ptr, dwrite_ptr, dadd_ptr,  # out
    N, W, R,
    ERASE_ALL: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_r, o_w = tl.arange(0, BR), tl.arange(0, BW)
    slots = tl.load(slots_ptr + i_b * R + o_r, mask=o_r < R, other=-1)
    add = load_rows(add_ptr + i_b * R * W, R, W, ACC, BR, BW)
    dadd = tl.zeros([BR, BW], ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        at = i_b * R * N + o_r[:, None].to(tl.int64) * N + o_n[None, :]
        m_rn = (o_r < R)[:, None] & (o_n < N)[None, :]
        write = tl.load(write_ptr + at, mask=m_rn, other=0.0).to(ACC)
        tile = i_b * N * W + o_n[:, None].to(tl.int64) * W + o_w[None, :]
        m_nw = (o_n < N)[:, None] & (o_w < W)[None, :]
        dm = tl.load(dmemory_ptr + tile, mask=m_nw, other=0.0).to(ACC)
        tl.store(dwrite_ptr + at, exact_dot(add, tl.trans(dm), ACC), mask=m_rn)
        dadd += exact_dot(write, dm, ACC)
        tl.store(dmemory0_ptr + tile, tl.where(erased_slots(slots, o_n, ERASE_ALL, BR)[:, None], 0.0, dm), mask=m_nw)
    store_rows(dadd_ptr + i_b * R * W, dadd, R, W, BR, BW)


def forward(memory, write_weights, add, least_used, erase_all):
    """The operator memory_update: same arguments and results as its schema."""
    (batch, heads, width), slots = add.shape, memory.shape[1]
    memory, write_weights, add, least_used = contiguous(memory, write_weights, add, least_used)
    new_memory = torch.empty_like(memory)
    if batch:
        memory_update_fwd_kernel[(batch,)](
            memory, write_weights, add, least_used, new_memory, slots, width, heads,
            erase_all, acc_of(memory.dtype).triton, **launch(slots, width, heads),
        )  # fmt: skip
    return new_memory


def backward(dmemory, write_weights, add, least_used, erase_all):
    """The operator memory_update_backward: same arguments and results as its schema."""
    (batch, heads, width), slots = add.shape, dmemory.shape[1]
    dmemory, write_weights, add, least_used = contiguous(dmemory, write_weights, add, least_used)
    dmemory0, dwrite_weights, dadd = (torch.empty_like(tensor) for tensor in (dmemory, write_weights, add))
    if batch:
        memory_update_bwd_kernel[(batch,)](
            dmemory, write_weights, add, least_used, dmemory0, dwrite_weights, dadd, slots, width, heads,
            erase_all, acc_of(dmemory.dtype).triton, **launch(slots, width, heads),
        )  # fmt: skip
    return dmemory0, dwrite_weights, dadd
