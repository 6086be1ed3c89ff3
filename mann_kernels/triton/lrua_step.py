"""Triton kernel of lrua_step: one pass over the memory. Its backward is that of a sequence of one step."""

import torch
import triton
import triton.language as tl

from mann_kernels.triton import lrua_sequence
from mann_kernels.triton._launch import acc_of, contiguous, launch, pointer
from mann_kernels.triton._step import (
    memory_in,
    memory_out,
    step_forward,
    usage_in,
    usage_out,
    weights_in,
    weights_out,
)
from mann_kernels.triton._tile import store_rows


@triton.jit
def lrua_step_fwd_kernel(
    memory_ptr, usage_ptr, previous_ptr,  # [B,N,W], [B,N], [B,R,N]
    key_ptr, gate_ptr, beta_ptr, add_ptr,  # [B,R,W], [B,R], [B,R], [B,R,W]
    reads_ptr, new_memory_ptr, new_usage_ptr, new_weights_ptr, slots_ptr,  # out; slots int32 [B,R]
    x_ptr,  # [B,R,N] of ACC
    N: tl.constexpr, W: tl.constexpr, R: tl.constexpr, decay: tl.constexpr, eps: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_ADD: tl.constexpr, SHARED: tl.constexpr, ERASE_ALL: tl.constexpr, ACC: tl.constexpr,
    BU: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    words, head, cells = i_b * R * W, i_b * R, i_b * N * W
    if N <= BN:
        m = memory_in(memory_ptr + cells, memory_ptr, N, W, ACC, BN, BW)
        weights = weights_in(previous_ptr + head * N, x_ptr, N, R, ACC, BN, BR)
        usage = usage_in(usage_ptr + i_b * N, x_ptr, N, ACC, BU, BN)
    else:
        m, weights, usage = tl.zeros([1, 1], ACC), tl.zeros([1, 1], ACC), tl.zeros([1], ACC)
    m, weights, usage, reads = step_forward(
        m, weights, usage, memory_ptr + cells, new_memory_ptr + cells,
        previous_ptr + head * N, new_weights_ptr + head * N, x_ptr + head * N,
        usage_ptr + i_b * N, new_usage_ptr + i_b * N,
        key_ptr + words, add_ptr + words if HAS_ADD else key_ptr + words, gate_ptr + head, beta_ptr + head,
        slots_ptr + head, memory_ptr,
        N, W, R, decay, eps, True, HAS_BETA, SHARED, ERASE_ALL, ACC, BU, BN, BW, BR,
    )  # fmt: skip
    store_rows(reads_ptr + words, reads, R, W, BR, BW)
    if N <= BN:
        memory_out(m, memory_ptr, new_memory_ptr + cells, N, W, ACC, BN, BW)
        weights_out(weights, x_ptr, new_weights_ptr + head * N, N, R, ACC, BN, BR)
        usage_out(usage, x_ptr, new_usage_ptr + i_b * N, N, ACC, BU, BN)


def forward(memory, usage, read_weights, key, gate, beta, add, shared, erase_all, decay, eps):
    """The operator lrua_step: same arguments and results as its schema."""
    (batch, heads, width), slots = key.shape, memory.shape[1]
    memory, usage, read_weights, key, gate, beta, add = contiguous(memory, usage, read_weights, key, gate, beta, add)
    acc = acc_of(memory.dtype)
    reads, new_memory, new_usage, new_weights = map(torch.empty_like, (key, memory, usage, read_weights))
    least_used = torch.empty(gate.shape, dtype=torch.int32, device=memory.device)
    if batch:
        lrua_step_fwd_kernel[(batch,)](
            memory_ptr=memory, usage_ptr=usage, previous_ptr=read_weights, key_ptr=key, gate_ptr=gate,
            beta_ptr=pointer(beta, key), add_ptr=pointer(add, key), reads_ptr=reads, new_memory_ptr=new_memory,
            new_usage_ptr=new_usage, new_weights_ptr=new_weights, slots_ptr=least_used,
            x_ptr=torch.empty(read_weights.shape, dtype=acc.torch, device=memory.device), N=slots, W=width, R=heads,
            decay=decay, eps=eps, HAS_BETA=beta is not None, HAS_ADD=add is not None, SHARED=shared,
            ERASE_ALL=erase_all, ACC=acc.triton, **launch(lrua_step_fwd_kernel, slots, width, heads, memory.dtype),
        )  # fmt: skip
    return reads, new_memory, new_usage, new_weights, least_used


def backward(
    dreads, dmemory1, dread_weights1, memory, read_weights, key, gate, beta, add, least_used, shared, erase_all, eps
):
    """The operator lrua_step_backward: same arguments and results as its schema."""

    def one_step(tensor):
        return None if tensor is None else tensor.unsqueeze(0)

    none = memory.new_empty(0)
    dmemory, dread_weights, *grads = lrua_sequence.backward(
        one_step(dreads), dmemory1, dread_weights1, memory, read_weights,
        *map(one_step, (key, gate, beta, add)), None, least_used, none, none, shared, erase_all, eps, 1,
    )  # fmt: skip
    return dmemory, dread_weights, *(grad.squeeze(0) if grad.dim() > 1 else grad for grad in grads)
