"""Triton kernels of content_address."""

import torch
import triton
import triton.language as tl

from mann_kernels.triton._launch import acc_of, contiguous, launch, pointer
from mann_kernels.triton._step import exact_dot, load_rows, similarity, store_rows


@triton.jit
def content_address_fwd_kernel(
    memory_ptr, key_ptr, beta_ptr,  # [B,N,W], [B,R,W], [B,R]
    weights_ptr, x_ptr,  # [B,R,N] out, [B,R,N] of ACC
    N, W, R, eps,
    HAS_BETA: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_r, o_w = tl.arange(0, BR), tl.arange(0, BW)
    m_r = o_r < R
    key = load_rows(key_ptr + i_b * R * W, R, W, ACC, BR, BW)
    beta = tl.full([BR], 1.0, ACC)
    if HAS_BETA:
        beta = tl.load(beta_ptr + i_b * R + o_r, mask=m_r, other=1.0).to(ACC)
    key_square = tl.sum(key * key, axis=1)
    top = tl.full([BR], float("-inf"), ACC)
    total = tl.zeros([BR], ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        tile = i_b * N * W + o_n[:, None].to(tl.int64) * W + o_w[None, :]
        m = tl.load(memory_ptr + tile, mask=(o_n < N)[:, None] & (o_w < W)[None, :], other=0.0).to(ACC)
        x, _, _, _ = similarity(key, key_square, m, beta, eps, ACC)
        at = i_b * R * N + o_r[:, None].to(tl.int64) * N + o_n[None, :]
        tl.store(x_ptr + at, x, mask=m_r[:, None] & (o_n < N)[None, :])
        x = tl.where((o_n < N)[None, :], x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, axis=1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top[:, None]), axis=1)
        top = new_top
    tl.debug_barrier()
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        at = i_b * R * N + o_r[:, None].to(tl.int64) * N + o_n[None, :]
        m_rn = m_r[:, None] & (o_n < N)[None, :]
        x = tl.load(x_ptr + at, mask=m_rn, other=0.0)
        tl.store(weights_ptr + at, tl.exp(x - top[:, None]) / total[:, None], mask=m_rn)


@triton.jit
def content_address_bwd_kernel(
    dweights_ptr, memory_ptr, key_ptr, beta_ptr, weights_ptr,  # [B,R,N], [B,N,W], [B,R,W], [B,R], [B,R,N]
    dmemory_ptr, dkey_ptr, dbeta_ptr,  # out
    N, W, R, eps,
    HAS_BETA: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_r, o_w = tl.arange(0, BR), tl.arange(0, BW)
    m_r = o_r < R
    key = load_rows(key_ptr + i_b * R * W, R, W, ACC, BR, BW)
    beta = tl.full([BR], 1.0, ACC)
    if HAS_BETA:
        beta = tl.load(beta_ptr + i_b * R + o_r, mask=m_r, other=1.0).to(ACC)
    key_square = tl.sum(key * key, axis=1)
    mean = tl.zeros([BR], ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        at = i_b * R * N + o_r[:, None].to(tl.int64) * N + o_n[None, :]
        m_rn = m_r[:, None] & (o_n < N)[None, :]
        weights = tl.load(weights_ptr + at, mask=m_rn, other=0.0).to(ACC)
        mean += tl.sum(weights * tl.load(dweights_ptr + at, mask=m_rn, other=0.0).to(ACC), axis=1)
    dkey = tl.zeros([BR, BW], ACC)
    dbeta, dkey_factor = tl.zeros([BR], ACC), tl.zeros([BR], ACC)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        at = i_b * R * N + o_r[:, None].to(tl.int64) * N + o_n[None, :]
        m_rn = m_r[:, None] & (o_n < N)[None, :]
        tile = i_b * N * W + o_n[:, None].to(tl.int64) * W + o_w[None, :]
        m_nw = (o_n < N)[:, None] & (o_w < W)[None, :]
        m = tl.load(memory_ptr + tile, mask=m_nw, other=0.0).to(ACC)
        weights = tl.load(weights_ptr + at, mask=m_rn, other=0.0).to(ACC)
        dx = weights * (tl.load(dweights_ptr + at, mask=m_rn, other=0.0).to(ACC) - mean[:, None])
        _, cosine, inverse, square = similarity(key, key_square, m, beta, eps, ACC)
        ddot = beta[:, None] * dx * inverse
        through_norm = ddot * cosine * inverse
        dbeta += tl.sum(dx * cosine, axis=1)
        dkey += exact_dot(ddot, m, ACC)
        dkey_factor += tl.sum(through_norm * square[None, :], axis=1)
        dm = exact_dot(tl.trans(ddot), key, ACC) - tl.sum(through_norm * key_square[:, None], axis=0)[:, None] * m
        tl.store(dmemory_ptr + tile, dm, mask=m_nw)
    store_rows(dkey_ptr + i_b * R * W, dkey - dkey_factor[:, None] * key, R, W, BR, BW)
    tl.store(dbeta_ptr + i_b * R + o_r, dbeta, mask=m_r)


def forward(memory, key, beta, eps):
    """The operator content_address: same arguments and results as its schema."""
    (batch, heads, width), slots = key.shape, memory.shape[1]
    memory, key, beta = contiguous(memory, key, beta)
    acc = acc_of(memory.dtype)
    weights = memory.new_empty(batch, heads, slots)
    if batch:
        content_address_fwd_kernel[(batch,)](
            memory, key, pointer(beta, key), weights, torch.empty_like(weights, dtype=acc.torch),
            slots, width, heads, eps, beta is not None, acc.triton, **launch(slots, width, heads),
        )  # fmt: skip
    return weights


def backward(dread_weights, memory, key, beta, read_weights, eps):
    """The operator content_address_backward: same arguments and results as its schema."""
    (batch, heads, width), slots = key.shape, memory.shape[1]
    dread_weights, memory, key, beta, read_weights = contiguous(dread_weights, memory, key, beta, read_weights)
    dmemory, dkey, dbeta = torch.empty_like(memory), torch.empty_like(key), key.new_empty(batch, heads)
    if batch:
        content_address_bwd_kernel[(batch,)](
            dread_weights, memory, key, pointer(beta, key), read_weights, dmemory, dkey, dbeta,
            slots, width, heads, eps, beta is not None, acc_of(memory.dtype).triton, **launch(slots, width, heads),
        )  # fmt: skip
    return dmemory, dkey, dbeta
