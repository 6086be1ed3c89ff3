"""Triton kernels of augmented_linear: (mix_s x) W_s^T summed over the rows s of a memory, all in one product."""

import torch
import triton
import triton.language as tl

from mann_kernels.triton._augment import TILES, activate
from mann_kernels.triton._launch import acc_of, contiguous, pointer
from mann_kernels.triton._tile import exact_dot


@triton.jit
def augmented_linear_fwd_kernel(
    x_ptr, weight_ptr, fast_ptr, mix_ptr, bias_ptr,  # [G,L,I], [O,I], [G,S] of [O,I], [G,L,S], [O]
    y_ptr, slopes_ptr,  # [G,L,O], [2,G,L,O] of ACC, out
    G, L, S, I, O, fast_task, fast_row,  # strides of fast  # noqa: E741
    HAS_MIX: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0).to(tl.int64)
    o_l, o_o = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(2) * BN + tl.arange(0, BN)
    rows, m_l, m_o = i_g * L + o_l, o_l < L, o_o < O
    slow, fast = tl.zeros([BM, BN], ACC), tl.zeros([BM, BN], ACC)
    for i0 in range(0, I, BK):
        o_i = i0 + tl.arange(0, BK)
        m_i = o_i < I
        m_w, at = m_i[:, None] & m_o[None, :], o_o[None, :] * I + o_i[:, None]
        x = tl.load(x_ptr + rows[:, None] * I + o_i[None, :], mask=m_l[:, None] & m_i[None, :], other=0.0).to(ACC)
        slow += exact_dot(x, tl.load(weight_ptr + at, mask=m_w, other=0.0).to(ACC), ACC)
        for s in range(0, S):
            mixed = x
            if HAS_MIX:
                mixed = x * tl.load(mix_ptr + rows * S + s, mask=m_l, other=0.0).to(ACC)[:, None]
            row = fast_ptr + i_g * fast_task + s * fast_row
            fast += exact_dot(mixed, tl.load(row + at, mask=m_w, other=0.0).to(ACC), ACC)
    if HAS_BIAS:
        slow += tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(ACC)[None, :]
    slow, slow_slope = activate(slow, ACT)
    fast, fast_slope = activate(fast, ACT)
    at, m = rows[:, None] * O + o_o[None, :], m_l[:, None] & m_o[None, :]
    tl.store(y_ptr + at, slow + fast, mask=m)
    if SAVE:
        tl.store(slopes_ptr + at, slow_slope, mask=m)
        tl.store(slopes_ptr + tl.full((), G * L, tl.int64) * O + at, fast_slope, mask=m)


@triton.jit
def augmented_linear_bwd_x_kernel(
    dy_ptr, weight_ptr, fast_ptr, mix_ptr, x_ptr, slopes_ptr,  # as forward
    dx_ptr, dots_ptr,  # [G,L,I], [tiles of I,G,L,S] of ACC, out: the parts of dmix
    G, L, S, I, O, fast_task, fast_row,  # noqa: E741
    HAS_MIX: tl.constexpr, HAS_SLOPES: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0).to(tl.int64)
    o_l, o_i = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(2) * BN + tl.arange(0, BN)
    rows, m_l, m_i = i_g * L + o_l, o_l < L, o_i < I
    i_fast = tl.full((), G * L, tl.int64) * O  # to the slopes of the fast side
    m, at = m_l[:, None] & m_i[None, :], rows[:, None] * I + o_i[None, :]
    dx = tl.zeros([BM, BN], ACC)
    for o0 in range(0, O, BK):
        dy, o_o = load_gradients(dy_ptr, slopes_ptr, rows, m_l, o0, O, HAS_SLOPES, ACC, BK)
        at_w, m_w = o_o[:, None] * I + o_i[None, :], (o_o < O)[:, None] & m_i[None, :]
        dx += exact_dot(dy, tl.load(weight_ptr + at_w, mask=m_w, other=0.0).to(ACC), ACC)
    x = tl.load(x_ptr + at, mask=m, other=0.0).to(ACC)
    for s in range(0, S):
        product = tl.zeros([BM, BN], ACC)
        row = fast_ptr + i_g * fast_task + s * fast_row
        for o0 in range(0, O, BK):
            dy, o_o = load_gradients(dy_ptr, slopes_ptr + i_fast, rows, m_l, o0, O, HAS_SLOPES, ACC, BK)
            at_w, m_w = o_o[:, None] * I + o_i[None, :], (o_o < O)[:, None] & m_i[None, :]
            product += exact_dot(dy, tl.load(row + at_w, mask=m_w, other=0.0).to(ACC), ACC)
        if HAS_MIX:
            dot = tl.sum(product * x, axis=1)
            i_part = tl.program_id(2).to(tl.int64) * G * L
            tl.store(dots_ptr + (i_part + rows) * S + s, dot, mask=m_l)
            product *= tl.load(mix_ptr + rows * S + s, mask=m_l, other=0.0).to(ACC)[:, None]
        dx += product
    tl.store(dx_ptr + at, dx, mask=m)


@triton.jit
def load_gradients(
    dy_ptr, slopes_ptr, rows, m_l, o0, O,  # noqa: E741
    HAS_SLOPES: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Before the activation of one side, [rows, BK], and the outputs it belongs to."""
    o_o = o0 + tl.arange(0, BK)
    at, m = rows[:, None] * O + o_o[None, :], m_l[:, None] & (o_o < O)[None, :]
    dy = tl.load(dy_ptr + at, mask=m, other=0.0).to(ACC)
    if HAS_SLOPES:
        dy *= tl.load(slopes_ptr + at, mask=m, other=0.0)
    return dy, o_o


@triton.jit
def augmented_linear_bwd_w_kernel(
    dy_ptr, x_ptr, mix_ptr, slopes_ptr,  # as forward
    dweight_ptr, dfast_ptr, dbias_ptr,  # [O,I], [G,S,O,I], [O] out
    G, L, S, I, O,  # noqa: E741
    HAS_MIX: tl.constexpr, HAS_SLOPES: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (0, ., .) sums over all examples for the slow weight, program 1 + g * S + s over those of task g for its row s."""
    i_z = tl.program_id(0).to(tl.int64)
    o_o, o_i = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(2) * BN + tl.arange(0, BN)
    m_o, m_i = o_o < O, o_i < I
    is_slow, row = i_z == 0, tl.maximum(i_z - 1, 0)
    i_g, s = row // S, row % S
    first, last = tl.where(is_slow, 0, i_g * L), tl.where(is_slow, G * L, (i_g + 1) * L)
    side = tl.where(is_slow, 0, tl.full((), G * L, tl.int64) * O)
    dweight, dbias = tl.zeros([BM, BN], ACC), tl.zeros([BM], ACC)
    for l0 in range(first, last, BK):
        o_l = l0 + tl.arange(0, BK)
        m_l = o_l < last
        at, m = o_l[None, :] * O + o_o[:, None], m_o[:, None] & m_l[None, :]
        dy = tl.load(dy_ptr + at, mask=m, other=0.0).to(ACC)
        if HAS_SLOPES:
            dy *= tl.load(slopes_ptr + side + at, mask=m, other=0.0)
        dbias += tl.sum(dy, axis=1)
        if HAS_MIX:
            mix = tl.load(mix_ptr + o_l * S + s, mask=m_l, other=0.0).to(ACC)
            dy *= tl.where(is_slow, 1.0, mix)[None, :]
        x = tl.load(x_ptr + o_l[:, None] * I + o_i[None, :], mask=m_l[:, None] & m_i[None, :], other=0.0).to(ACC)
        dweight += exact_dot(dy, x, ACC)
    at, m = o_o[:, None] * I + o_i[None, :], m_o[:, None] & m_i[None, :]
    if is_slow:
        tl.store(dweight_ptr + at, dweight, mask=m)
        if tl.program_id(2) == 0:
            tl.store(dbias_ptr + o_o, dbias, mask=m_o)
    else:
        tl.store(dfast_ptr + row * O * I + at, dweight, mask=m)


def with_rows_contiguous(fast):
    """Rows may lie apart; what is inside one may not."""
    row = fast[:1, :1]
    return fast if row.is_contiguous() else fast.contiguous()


def forward(x, weight, fast, mix, bias, activation, save):
    """The operator augmented_linear: same arguments and results as its schema."""
    fast = fast if x.dim() == 3 else fast[None]
    (G, S, O, I), L = fast.shape, x.shape[-2]  # noqa: E741
    x, weight, mix, bias = contiguous(x, weight, mix, bias)
    fast, acc, save = with_rows_contiguous(fast), acc_of(x.dtype), save and activation != 3
    y = x.new_empty(*x.shape[:-1], O)
    slopes = torch.empty((2, G, L, O) if save else (0,), dtype=acc.torch, device=x.device)
    if G * L:
        augmented_linear_fwd_kernel[(G, triton.cdiv(L, TILES["BM"]), triton.cdiv(O, TILES["BN"]))](
            x_ptr=x, weight_ptr=weight, fast_ptr=fast, mix_ptr=pointer(mix, x), bias_ptr=pointer(bias, x), y_ptr=y,
            slopes_ptr=slopes, G=G, L=L, S=S, I=I, O=O, fast_task=fast.stride(0), fast_row=fast.stride(1),
            HAS_MIX=mix is not None, HAS_BIAS=bias is not None, SAVE=save, ACT=activation, ACC=acc.triton, **TILES,
        )  # fmt: skip
    return y, slopes


def backward(dy, x, weight, fast, mix, slopes):
    """The operator augmented_linear_backward: same arguments and results as its schema."""
    dfast = x.new_empty(fast.shape)
    fast = fast if x.dim() == 3 else fast[None]
    (G, S, O, I), L = fast.shape, x.shape[-2]  # noqa: E741
    dy, x, weight, mix = contiguous(dy, x, weight, mix)
    fast, acc = with_rows_contiguous(fast), acc_of(x.dtype)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    dbias, tiles = x.new_empty(O), triton.cdiv(I, TILES["BN"])
    dots = torch.empty((tiles, G, L, S) if mix is not None else (0,), dtype=acc.torch, device=x.device)
    options = {"HAS_MIX": mix is not None, "HAS_SLOPES": slopes.numel() > 0, "ACC": acc.triton, **TILES}
    if G * L:
        augmented_linear_bwd_x_kernel[(G, triton.cdiv(L, TILES["BM"]), tiles)](
            dy_ptr=dy, weight_ptr=weight, fast_ptr=fast, mix_ptr=pointer(mix, x), x_ptr=x, slopes_ptr=slopes, dx_ptr=dx,
            dots_ptr=dots, G=G, L=L, S=S, I=I, O=O, fast_task=fast.stride(0), fast_row=fast.stride(1), **options,
        )  # fmt: skip
    augmented_linear_bwd_w_kernel[(1 + G * S, triton.cdiv(O, TILES["BM"]), tiles)](
        dy_ptr=dy, x_ptr=x, mix_ptr=pointer(mix, x), slopes_ptr=slopes, dweight_ptr=dweight, dfast_ptr=dfast,
        dbias_ptr=dbias, G=G, L=L, S=S, I=I, O=O, **options,
    )  # fmt: skip
    dmix = dots.sum(0).to(x.dtype).view(mix.shape) if mix is not None else x.new_empty(0)
    return dx, dweight, dfast, dmix, dbias
