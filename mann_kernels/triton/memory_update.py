"""Triton kernels of memory_update."""

import torch
import triton
import triton.language as tl

from mann_kernels.triton._launch import acc_of, contiguous, launch
from mann_kernels.triton._step import erase_and_write, erased_slots
from mann_kernels.triton._tile import (
    load_slots,
    load_tile,
    rows_by_tile,
    slots_by_tile,
    store_rows,
    store_slots,
    store_tile,
)


@triton.jit
def memory_update_fwd_kernel(
    memory_ptr, write_ptr, add_ptr, slots_ptr,  # [B,N,W], [B,R,N], [B,R,W], int32 [B,R]
    new_memory_ptr,  # [B,N,W] out
    N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    ERASE_ALL: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BR)
    slots = tl.load(slots_ptr + i_b * R + o_r, mask=o_r < R, other=-1)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        tile = load_tile(memory_ptr + i_b * N * W, o_n, N, W, ACC, BW)
        write = load_slots(write_ptr + i_b * R * N, o_n, N, R, ACC, BR)
        tile = erase_and_write(tile, write, slots, o_n, add_ptr + i_b * R * W, ERASE_ALL, W, R, ACC, BW, BR)
        store_tile(new_memory_ptr + i_b * N * W, tile, o_n, N, W, BW)


@triton.jit
def memory_update_bwd_kernel(
    dmemory_ptr, write_ptr, add_ptr, slots_ptr,  # [B,N,W], [B,R,N], [B,R,W], int32 [B,R]
    dmemory0_ptr, dwrite_ptr, dadd_ptr,  # out
    N: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    ERASE_ALL: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BR)
    slots = tl.load(slots_ptr + i_b * R + o_r, mask=o_r < R, other=-1)
    dadd = tl.zeros([BR, BW], ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        dm = load_tile(dmemory_ptr + i_b * N * W, o_n, N, W, ACC, BW)
        write = load_slots(write_ptr + i_b * R * N, o_n, N, R, ACC, BR)
        dwrite = rows_by_tile(add_ptr + i_b * R * W, dm, W, R, ACC, BN, BW, BR)
        store_slots(dwrite_ptr + i_b * R * N, dwrite, o_n, N, R, BR)
        dadd += slots_by_tile(write, dm, R, ACC, BW, BR)
        dm = tl.where(erased_slots(slots, o_n, ERASE_ALL, BR)[:, None], 0.0, dm)
        store_tile(dmemory0_ptr + i_b * N * W, dm, o_n, N, W, BW)
    store_rows(dadd_ptr + i_b * R * W, dadd, R, W, BR, BW)


def forward(memory, write_weights, add, least_used, erase_all):
    """The operator memory_update: same arguments and results as its schema."""
    (batch, heads, width), slots = add.shape, memory.shape[1]
    memory, write_weights, add, least_used = contiguous(memory, write_weights, add, least_used)
    new_memory = torch.empty_like(memory)
    if batch:
        memory_update_fwd_kernel[(batch,)](
            memory_ptr=memory, write_ptr=write_weights, add_ptr=add, slots_ptr=least_used, new_memory_ptr=new_memory,
            N=slots, W=width, R=heads, ERASE_ALL=erase_all, ACC=acc_of(memory.dtype).triton,
            **launch(memory_update_fwd_kernel, slots, width, heads, memory.dtype),
        )  # fmt: skip
    return new_memory


def backward(dmemory, write_weights, add, least_used, erase_all):
    """The operator memory_update_backward: same arguments and results as its schema."""
    (batch, heads, width), slots = add.shape, dmemory.shape[1]
    dmemory, write_weights, add, least_used = contiguous(dmemory, write_weights, add, least_used)
    dmemory0, dwrite_weights, dadd = (torch.empty_like(tensor) for tensor in (dmemory, write_weights, add))
    if batch:
        memory_update_bwd_kernel[(batch,)](
            dmemory_ptr=dmemory, write_ptr=write_weights, add_ptr=add, slots_ptr=least_used, dmemory0_ptr=dmemory0,
            dwrite_ptr=dwrite_weights, dadd_ptr=dadd, N=slots, W=width, R=heads, ERASE_ALL=erase_all,
            ACC=acc_of(dmemory.dtype).triton, **launch(memory_update_bwd_kernel, slots, width, heads, dmemory.dtype),
        )  # fmt: skip
    return dmemory0, dwrite_weights, dadd
