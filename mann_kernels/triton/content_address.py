"""Triton kernels of content_address."""

import torch
import triton
import triton.language as tl

from mann_kernels.triton._launch import acc_of, contiguous, launch, pointer
from mann_kernels.triton._tile import (
    add_slots_by_rows,
    cosine_backward,
    cosine_of,
    load_slots,
    load_strength,
    load_tile,
    softmax,
    softmax_so_far,
    store_rows,
    store_slots,
    store_tile,
)


@triton.jit
def content_address_fwd_kernel(
    memory_ptr, key_ptr, beta_ptr,  # [B,N,W], [B,R,W], [B,R]
    weights_ptr, x_ptr,  # [B,R,N] out, [B,R,N] of ACC
    N: tl.constexpr, W: tl.constexpr, R: tl.constexpr, eps: tl.constexpr,
    HAS_BETA: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    memory, key, at = memory_ptr + i_b * N * W, key_ptr + i_b * R * W, i_b * R * N
    beta = load_strength(beta_ptr + i_b * R, HAS_BETA, R, ACC, BR)
    if N <= BN:
        o_n = tl.arange(0, BN)
        tile = load_tile(memory, o_n, N, W, ACC, BW)
        cosine, _, _, _ = cosine_of(tile, key, eps, W, R, ACC, BN, BW, BR)
        store_slots(weights_ptr + at, softmax(beta[:, None] * cosine, o_n, N), o_n, N, R, BR)
    else:
        top, total = tl.full([BR], float("-inf"), ACC), tl.zeros([BR], ACC)
        for n0 in range(0, N, BN):
            o_n = n0 + tl.arange(0, BN)
            tile = load_tile(memory, o_n, N, W, ACC, BW)
            cosine, _, _, _ = cosine_of(tile, key, eps, W, R, ACC, BN, BW, BR)
            store_slots(x_ptr + at, beta[:, None] * cosine, o_n, N, R, BR)
            _, top, total, _ = softmax_so_far(beta[:, None] * cosine, top, total, o_n, N)
        tl.debug_barrier()
        for n0 in range(0, N, BN):
            o_n = n0 + tl.arange(0, BN)
            x = load_slots(x_ptr + at, o_n, N, R, ACC, BR)
            store_slots(weights_ptr + at, tl.exp(x - top[:, None]) / total[:, None], o_n, N, R, BR)


@triton.jit
def content_address_bwd_kernel(
    dweights_ptr, memory_ptr, key_ptr, beta_ptr, weights_ptr,  # [B,R,N], [B,N,W], [B,R,W], [B,R], [B,R,N]
    dmemory_ptr, dkey_ptr, dbeta_ptr,  # out
    N: tl.constexpr, W: tl.constexpr, R: tl.constexpr, eps: tl.constexpr,
    HAS_BETA: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    key, at, o_r = key_ptr + i_b * R * W, i_b * R * N, tl.arange(0, BR)
    beta = load_strength(beta_ptr + i_b * R, HAS_BETA, R, ACC, BR)
    mean = tl.zeros([BR], ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        weights = load_slots(weights_ptr + at, o_n, N, R, ACC, BR)
        mean += tl.sum(weights * load_slots(dweights_ptr + at, o_n, N, R, ACC, BR), axis=1)
    dkey, dbeta = tl.zeros([BR, BW], ACC), tl.zeros([BR], ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        tile = load_tile(memory_ptr + i_b * N * W, o_n, N, W, ACC, BW)
        dx = load_slots(weights_ptr + at, o_n, N, R, ACC, BR)
        dx *= load_slots(dweights_ptr + at, o_n, N, R, ACC, BR) - mean[:, None]
        ddot, dkey_tile, dbeta_tile, shrink = cosine_backward(dx, beta, tile, key, eps, W, R, ACC, BN, BW, BR)
        dkey += dkey_tile
        dbeta += dbeta_tile
        dm = add_slots_by_rows(-shrink[:, None] * tile, ddot, key, W, R, ACC, BW, BR)
        store_tile(dmemory_ptr + i_b * N * W, dm, o_n, N, W, BW)
    store_rows(dkey_ptr + i_b * R * W, dkey, R, W, BR, BW)
    tl.store(dbeta_ptr + i_b * R + o_r, dbeta, mask=o_r < R)


def forward(memory, key, beta, eps):
    """The operator content_address: same arguments and results as its schema."""
    (batch, heads, width), slots = key.shape, memory.shape[1]
    memory, key, beta = contiguous(memory, key, beta)
    acc = acc_of(memory.dtype)
    weights = memory.new_empty(batch, heads, slots)
    if batch:
        content_address_fwd_kernel[(batch,)](
            memory_ptr=memory, key_ptr=key, beta_ptr=pointer(beta, key), weights_ptr=weights,
            x_ptr=torch.empty_like(weights, dtype=acc.torch), N=slots, W=width, R=heads, eps=eps,
            HAS_BETA=beta is not None, ACC=acc.triton,
            **launch(content_address_fwd_kernel, slots, width, heads, memory.dtype),
        )  # fmt: skip
    return weights


def backward(dread_weights, memory, key, beta, read_weights, eps):
    """The operator content_address_backward: same arguments and results as its schema."""
    (batch, heads, width), slots = key.shape, memory.shape[1]
    dread_weights, memory, key, beta, read_weights = contiguous(dread_weights, memory, key, beta, read_weights)
    dmemory, dkey, dbeta = torch.empty_like(memory), torch.empty_like(key), key.new_empty(batch, heads)
    if batch:
        content_address_bwd_kernel[(batch,)](
            dweights_ptr=dread_weights, memory_ptr=memory, key_ptr=key, beta_ptr=pointer(beta, key),
            weights_ptr=read_weights, dmemory_ptr=dmemory, dkey_ptr=dkey, dbeta_ptr=dbeta, N=slots, W=width, R=heads,
            eps=eps, HAS_BETA=beta is not None, ACC=acc_of(memory.dtype).triton,
            **launch(content_address_bwd_kernel, slots, width, heads, memory.dtype),
        )  # fmt: skip
    return dmemory, dkey, dbeta
