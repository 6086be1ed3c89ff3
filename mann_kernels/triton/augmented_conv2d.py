"""Triton kernels of augmented_conv2d: products [outputs, C*k*k] @ [C*k*k, pixels] in which the patches are gathered and an
example's own weight is mixed, both while a tile is loaded; pooling at the end of the same program."""

import torch
import triton
import triton.language as tl

from mann_kernels.triton._augment import TILES, activate
from mann_kernels.triton._launch import acc_of, contiguous, pointer
from mann_kernels.triton._tile import exact_dot
from mann_kernels.triton.augmented_linear import with_rows_contiguous

# Bits of a saved code beside the two that say which of the four pixels was the largest: what lets a gradient through.
SLOW_BIT, FAST_BIT = tl.constexpr(4), tl.constexpr(8)


@triton.jit
def load_patches(
    x_ptr, o_k, m_k, i_y, i_x, m_p, H, W, KERNEL: tl.constexpr, PADDING: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Numbers o_k = (c, i, j) of the patches of output pixels (i_y, i_x), as [len(o_k), len(i_y)]."""
    o_c, tap = o_k // (KERNEL * KERNEL), o_k % (KERNEL * KERNEL)
    y = i_y[None, :] + (tap // KERNEL)[:, None] - PADDING
    x = i_x[None, :] + (tap % KERNEL)[:, None] - PADDING
    m = m_k[:, None] & m_p[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return tl.load(x_ptr + o_c[:, None] * H * W + y * W + x, mask=m, other=0.0).to(ACC)


@triton.jit
def load_mixed(
    fast_ptr, mix_ptr, S, fast_row, at, m, HAS_MIX: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """A tile of an example's own weight: eq. 9."""
    if HAS_MIX:
        tile = tl.load(mix_ptr).to(ACC) * tl.load(fast_ptr + at, mask=m, other=0.0).to(ACC)
        for s in range(1, S):
            row = tl.load(fast_ptr + s * fast_row + at, mask=m, other=0.0).to(ACC)
            tile += tl.load(mix_ptr + s).to(ACC) * row
        return tile
    else:
        return tl.load(fast_ptr + at, mask=m, other=0.0).to(ACC)


@triton.jit
def quarters(values, BM: tl.constexpr, BN: tl.constexpr):
    """The four pixels of every window, [BM, BN / 4] each, in order."""
    left, right = tl.split(tl.reshape(values, [BM, BN // 4, 2, 2]))
    top_left, bottom_left = tl.split(left)
    top_right, bottom_right = tl.split(right)
    return top_left, top_right, bottom_left, bottom_right


@triton.jit
def larger(best, best_slow, best_fast, code, slow, fast, number: tl.constexpr, m, ACT: tl.constexpr):
    """The best pixel so far or the next one, if that is larger, or NaN."""
    value = activate(slow, ACT)[0] + activate(fast, ACT)[0]
    take = m & ((value > best) | (value != value))
    return (
        tl.where(take, value, best),
        tl.where(take, slow, best_slow),
        tl.where(take, fast, best_fast),
        tl.where(take, number, code),
    )


@triton.jit
def augmented_conv2d_fwd_kernel(
    x_ptr, weight_ptr, fast_ptr, mix_ptr, bias_ptr,  # [G,L,C,H,W], [O,C,k,k], [G,S] of [O,C,k,k], [G,L,S], [O]
    y_ptr, codes_ptr, slopes_ptr,  # [G,L,O,P], uint8 [G,L,P,O], [2,G,L,P,O] of ACC, out
    GL, L, S, C, H, W, O, HY, WY, PH, PW, fast_task, fast_row,  # noqa: E741
    KERNEL: tl.constexpr, PADDING: tl.constexpr, POOL: tl.constexpr,
    HAS_MIX: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, SLOPES: tl.constexpr,
    ACT: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_l = tl.program_id(0).to(tl.int64)
    o_o, o_n = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(2) * BN + tl.arange(0, BN)
    m_o, K, P = o_o < O, C * KERNEL * KERNEL, PH * PW
    i_y, i_x, m_p = o_n // WY, o_n % WY, o_n < P
    if POOL:  # the four pixels of a window side by side
        i_w = o_n // 4
        i_y, i_x = i_w // PW * 2 + o_n % 4 // 2, i_w % PW * 2 + o_n % 2
        m_p = (i_y < HY) & (i_x < WY) & (i_w < P)
    slow, fast = tl.zeros([BM, BN], ACC), tl.zeros([BM, BN], ACC)
    for k0 in range(0, K, BK):
        o_k = k0 + tl.arange(0, BK)
        patches = load_patches(x_ptr + i_l * C * H * W, o_k, o_k < K, i_y, i_x, m_p, H, W, KERNEL, PADDING, ACC)
        at, m = o_o[:, None] * K + o_k[None, :], m_o[:, None] & (o_k < K)[None, :]
        slow += exact_dot(tl.load(weight_ptr + at, mask=m, other=0.0).to(ACC), patches, ACC)
        row = fast_ptr + i_l // L * fast_task
        fast += exact_dot(load_mixed(row, mix_ptr + i_l * S, S, fast_row, at, m, HAS_MIX, ACC), patches, ACC)
    if HAS_BIAS:
        slow += tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(ACC)[:, None]
    if POOL:
        slow, slow1, slow2, slow3 = quarters(slow, BM, BN)
        fast, fast1, fast2, fast3 = quarters(fast, BM, BN)
        o_w = tl.program_id(2) * (BN // 4) + tl.arange(0, BN // 4)
        is_right, is_below = (o_w % PW * 2 + 1 < WY)[None, :], (o_w // PW * 2 + 1 < HY)[None, :]
        best = activate(slow, ACT)[0] + activate(fast, ACT)[0]
        code = tl.zeros([BM, BN // 4], tl.int32)
        best, slow, fast, code = larger(best, slow, fast, code, slow1, fast1, 1, is_right, ACT)
        best, slow, fast, code = larger(best, slow, fast, code, slow2, fast2, 2, is_below, ACT)
        best, slow, fast, code = larger(best, slow, fast, code, slow3, fast3, 3, is_right & is_below, ACT)
    else:
        o_w = o_n
        code = tl.zeros([BM, BN], tl.int32)
    slow, slow_slope = activate(slow, ACT)
    fast, fast_slope = activate(fast, ACT)
    m = m_o[:, None] & (o_w < P)[None, :]
    tl.store(y_ptr + (i_l * O + o_o[:, None]) * P + o_w[None, :], slow + fast, mask=m)
    at = (i_l * P + o_w[None, :]) * O + o_o[:, None]
    if SAVE:
        code += tl.where(slow_slope != 0, SLOW_BIT, 0) + tl.where(fast_slope != 0, FAST_BIT, 0)
        tl.store(codes_ptr + at, code.to(tl.uint8), mask=m)
    if SLOPES:
        tl.store(slopes_ptr + at, slow_slope, mask=m)
        tl.store(slopes_ptr + tl.full((), GL, tl.int64) * P * O + at, fast_slope, mask=m)


@triton.jit
def load_gradients(
    dy_ptr, codes_ptr, slopes_ptr, i_l, o_o, i_y, i_x, m, O, PH, PW, bit,  # noqa: E741
    POOL: tl.constexpr, HAS_SLOPES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of example i_l before the activation of one side (`bit`), at outputs o_o and pixels (i_y, i_x)."""
    P, i_w, number = PH * PW, i_y * PW + i_x, 0
    if POOL:
        i_w, number = i_y // 2 * PW + i_x // 2, i_y % 2 * 2 + i_x % 2
    at = (i_l * P + i_w) * O + o_o
    code = tl.load(codes_ptr + at, mask=m, other=0).to(tl.int32)
    m = m & ((code & 3) == number) & ((code & bit) != 0)
    dy = tl.load(dy_ptr + (i_l * O + o_o) * P + i_w, mask=m, other=0.0).to(ACC)
    if HAS_SLOPES:
        dy *= tl.load(slopes_ptr + at, mask=m, other=0.0)
    return dy


@triton.jit
def augmented_conv2d_bwd_x_kernel(
    dy_ptr, weight_ptr, fast_ptr, mix_ptr, codes_ptr, slopes_ptr,  # as forward
    dx_ptr,  # [G,L,C,H,W] out
    GL, L, S, C, H, W, O, HY, WY, PH, PW, fast_task, fast_row,  # noqa: E741
    KERNEL: tl.constexpr, PADDING: tl.constexpr, POOL: tl.constexpr,
    HAS_MIX: tl.constexpr, HAS_SLOPES: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_l = tl.program_id(0).to(tl.int64)
    o_c, o_p = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(2) * BN + tl.arange(0, BN)
    m_c, m_p, TAPS = o_c < C, o_p < H * W, KERNEL * KERNEL
    i_fast = tl.full((), GL, tl.int64) * PH * PW * O  # to the slopes of the fast side
    dx = tl.zeros([BM, BN], ACC)
    for k0 in range(0, O * TAPS, BK):
        o_k = k0 + tl.arange(0, BK)
        o_o, tap, m_k = o_k // TAPS, o_k % TAPS, o_k < O * TAPS
        # the output pixels that saw an input pixel under this tap
        i_y = (o_p // W)[None, :] + PADDING - (tap // KERNEL)[:, None]
        i_x = (o_p % W)[None, :] + PADDING - (tap % KERNEL)[:, None]
        m = m_k[:, None] & m_p[None, :] & (i_y >= 0) & (i_y < HY) & (i_x >= 0) & (i_x < WY)
        at, m_w = (o_o[None, :] * C + o_c[:, None]) * TAPS + tap[None, :], m_c[:, None] & m_k[None, :]
        dy = load_gradients(
            dy_ptr, codes_ptr, slopes_ptr, i_l, o_o[:, None], i_y, i_x, m, O, PH, PW, SLOW_BIT, POOL, HAS_SLOPES, ACC
        )
        dx += exact_dot(tl.load(weight_ptr + at, mask=m_w, other=0.0).to(ACC), dy, ACC)
        dy = load_gradients(
            dy_ptr, codes_ptr, slopes_ptr + i_fast, i_l, o_o[:, None], i_y, i_x, m, O, PH, PW, FAST_BIT,
            POOL, HAS_SLOPES, ACC,
        )  # fmt: skip
        row = fast_ptr + i_l // L * fast_task
        dx += exact_dot(load_mixed(row, mix_ptr + i_l * S, S, fast_row, at, m_w, HAS_MIX, ACC), dy, ACC)
    tl.store(dx_ptr + (i_l * C + o_c[:, None]) * H * W + o_p[None, :], dx, mask=m_c[:, None] & m_p[None, :])


@triton.jit
def augmented_conv2d_bwd_w_kernel(
    dy_ptr, x_ptr, fast_ptr, mix_ptr, codes_ptr, slopes_ptr,  # as forward
    dweight_ptr, dfast_ptr, dbias_ptr,  # [O,C,k,k], [G,S,O,C,k,k], [O] out
    dots_ptr,  # [tiles of O,tiles of C*k*k,G,L,S] of ACC, out: the parts of dmix
    GL, L, S, C, H, W, O, HY, WY, PH, PW, fast_task, fast_row,  # noqa: E741
    KERNEL: tl.constexpr, PADDING: tl.constexpr, POOL: tl.constexpr,
    HAS_MIX: tl.constexpr, HAS_SLOPES: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Programs (0, ., .) sum over all examples for the slow weight, the next G * S over those of task g for its row s; the last
    G * L take one example each and multiply the gradient of its own weight with the rows, for dmix."""
    i_z, rows = tl.program_id(0).to(tl.int64), GL // L * S
    o_o, o_n = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(2) * BN + tl.arange(0, BN)
    K, pixels = C * KERNEL * KERNEL, HY * WY
    m_o, m_n = o_o < O, o_n < K
    is_slow, is_dots = i_z == 0, i_z > rows
    i_row, i_example = tl.maximum(i_z - 1, 0), i_z - 1 - rows
    first = tl.where(is_slow, 0, tl.where(is_dots, i_example, i_row // S * L))
    last = first + tl.where(is_slow, GL, tl.where(is_dots, 1, L))
    bit = tl.where(is_slow, SLOW_BIT, FAST_BIT)
    side = tl.where(is_slow, 0, tl.full((), GL, tl.int64) * PH * PW * O)
    dweight, dbias = tl.zeros([BM, BN], ACC), tl.zeros([BM], ACC)
    for i_l in range(first, last):
        factor = tl.full((), 1.0, ACC)
        if HAS_MIX:
            mix = tl.load(mix_ptr + i_l * S + i_row % S).to(ACC)
            factor = tl.where(is_slow | is_dots, factor, mix)
        for p0 in range(0, pixels, BK):
            o_p = p0 + tl.arange(0, BK)
            i_y, i_x, m_p = o_p // WY, o_p % WY, o_p < pixels
            dy = load_gradients(
                dy_ptr, codes_ptr, slopes_ptr + side, i_l, o_o[:, None], i_y[None, :], i_x[None, :],
                m_o[:, None] & m_p[None, :], O, PH, PW, bit, POOL, HAS_SLOPES, ACC,
            )  # fmt: skip
            dbias += tl.sum(dy, axis=1)
            patches = load_patches(x_ptr + i_l * C * H * W, o_n, m_n, i_y, i_x, m_p, H, W, KERNEL, PADDING, ACC)
            dweight += exact_dot(dy * factor, tl.trans(patches), ACC)
    at, m = o_o[:, None] * K + o_n[None, :], m_o[:, None] & m_n[None, :]
    if is_slow:
        tl.store(dweight_ptr + at, dweight, mask=m)
        if tl.program_id(2) == 0:
            tl.store(dbias_ptr + o_o, dbias, mask=m_o)
    elif is_dots:
        i_tile = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
        for s in range(0, S):
            row = fast_ptr + i_example // L * fast_task + s * fast_row
            product = tl.load(row + at, mask=m, other=0.0).to(ACC) * dweight
            tl.store(dots_ptr + (i_tile * GL + i_example) * S + s, tl.sum(tl.sum(product, axis=1), axis=0))
    else:
        tl.store(dfast_ptr + i_row * O * K + at, dweight, mask=m)


def sizes_of(x, fast, padding, pool):
    """The size arguments that every kernel has."""
    (G, S, O, _, kernel, _), (L, C, H, W) = fast.shape, x.shape[-4:]  # noqa: E741
    HY, WY = H + 2 * padding - kernel + 1, W + 2 * padding - kernel + 1
    PH, PW = ((HY + 1) // 2, (WY + 1) // 2) if pool else (HY, WY)
    return {
        "GL": G * L, "L": L, "S": S, "C": C, "H": H, "W": W, "O": O, "HY": HY, "WY": WY, "PH": PH, "PW": PW,
        "fast_task": fast.stride(0), "fast_row": fast.stride(1), "KERNEL": kernel, "PADDING": padding, "POOL": pool,
    }  # fmt: skip


def forward(x, weight, fast, mix, bias, padding, activation, pool, save):
    """The operator augmented_conv2d: same arguments and results as its schema."""
    x, weight, mix, bias = contiguous(x, weight, mix, bias)
    fast, acc = with_rows_contiguous(fast if x.dim() == 5 else fast[None]), acc_of(x.dtype)
    sizes = sizes_of(x, fast, padding, pool)
    examples, O, PH, PW = (sizes[name] for name in ("GL", "O", "PH", "PW"))  # noqa: E741
    y = x.new_empty(*x.shape[:-3], O, PH, PW)
    kept, keep = (*fast.shape[:1], x.shape[-4], PH * PW, O), save and activation in (1, 2)
    codes = torch.empty(kept if save else (0,), dtype=torch.uint8, device=x.device)
    slopes = torch.empty((2, *kept) if keep else (0,), dtype=acc.torch, device=x.device)
    if examples:
        pixels = PH * PW * 4 if pool else PH * PW
        augmented_conv2d_fwd_kernel[(examples, triton.cdiv(O, TILES["BM"]), triton.cdiv(pixels, TILES["BN"]))](
            x_ptr=x, weight_ptr=weight, fast_ptr=fast, mix_ptr=pointer(mix, x), bias_ptr=pointer(bias, x), y_ptr=y,
            codes_ptr=codes, slopes_ptr=slopes, HAS_MIX=mix is not None, HAS_BIAS=bias is not None, SAVE=save,
            SLOPES=keep, ACT=activation, ACC=acc.triton, **sizes, **TILES,
        )  # fmt: skip
    return y, codes, slopes


def backward(dy, x, weight, fast, mix, codes, slopes, padding, pool, need_dx):
    """The operator augmented_conv2d_backward: same arguments and results as its schema."""
    dy, x, weight, mix = contiguous(dy, x, weight, mix)
    dfast = x.new_empty(fast.shape)
    fast, acc = with_rows_contiguous(fast if x.dim() == 5 else fast[None]), acc_of(x.dtype)
    (G, S, O, C, kernel, _), (L, _, H, W) = fast.shape, x.shape[-4:]  # noqa: E741
    sizes = sizes_of(x, fast, padding, pool)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dweight, dbias = torch.empty_like(weight), x.new_empty(O)
    options = {"HAS_MIX": mix is not None, "HAS_SLOPES": slopes.numel() > 0, "ACC": acc.triton, **sizes, **TILES}
    if need_dx and G * L:
        augmented_conv2d_bwd_x_kernel[(G * L, triton.cdiv(C, TILES["BM"]), triton.cdiv(H * W, TILES["BN"]))](
            dy_ptr=dy, weight_ptr=weight, fast_ptr=fast, mix_ptr=pointer(mix, x), codes_ptr=codes, slopes_ptr=slopes,
            dx_ptr=dx, **options,
        )  # fmt: skip
    if G * L == 0:
        dmix = x.new_empty(mix.shape if mix is not None else 0)
        return dx, dweight.zero_(), dfast.zero_(), dmix, dbias.zero_()
    tiles = triton.cdiv(O, TILES["BM"]), triton.cdiv(C * kernel * kernel, TILES["BN"])
    dots = torch.empty((*tiles, G, L, S) if mix is not None else (0,), dtype=acc.torch, device=x.device)
    programs = 1 + G * S + (G * L if mix is not None else 0)
    augmented_conv2d_bwd_w_kernel[(programs, *tiles)](
        dy_ptr=dy, x_ptr=x, fast_ptr=fast, mix_ptr=pointer(mix, x), codes_ptr=codes, slopes_ptr=slopes,
        dweight_ptr=dweight, dfast_ptr=dfast, dbias_ptr=dbias, dots_ptr=dots, **options,
    )  # fmt: skip
    dmix = dots.sum((0, 1)).to(x.dtype).view(mix.shape) if mix is not None else x.new_empty(0)
    return dx, dweight, dfast, dmix, dbias
