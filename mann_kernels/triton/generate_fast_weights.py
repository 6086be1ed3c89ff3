"""Triton kernels of generate_fast_weights."""

import torch
import triton
import triton.language as tl

from mann_kernels.triton._coordinates import between_ends, features, features_backward, launch, load_matrix, programs_of
from mann_kernels.triton._launch import acc_of, contiguous
from mann_kernels.triton._tile import exact_dot


@triton.jit
def relu(x):
    return tl.where(x < 0.0, 0.0, x)  # NaN passes


@triton.jit
def generate_fast_weights_fwd_kernel(
    grads_ptr,  # [P]
    weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, weight3_ptr, bias3_ptr,  # [D,2], [D], [D,D], [D], [1,D], [1]
    fast_ptr,  # [P] out
    P, D,
    POWER: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    g = tl.load(grads_ptr + o_p, mask=o_p < P, other=0.0).to(ACC)
    magnitude, sign = features(g, POWER, SCALE)
    of_magnitude = tl.load(weight1_ptr + 2 * o_d, mask=m_d, other=0.0).to(ACC)[None, :]
    of_sign = tl.load(weight1_ptr + 2 * o_d + 1, mask=m_d, other=0.0).to(ACC)[None, :]
    bias1 = tl.load(bias1_ptr + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
    bias2 = tl.load(bias2_ptr + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
    weight3 = tl.load(weight3_ptr + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
    weight2 = load_matrix(weight2_ptr, D, D, ACC, BD, BD)
    hidden1 = relu(magnitude[:, None] * of_magnitude + sign[:, None] * of_sign + bias1)
    hidden2 = relu(exact_dot(hidden1, tl.trans(weight2), ACC) + bias2)
    fast = tl.sum(hidden2 * weight3, axis=1) + tl.load(bias3_ptr).to(ACC)
    tl.store(fast_ptr + o_p, fast, mask=o_p < P)


@triton.jit
def generate_fast_weights_sides_kernel(
    grads_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr,  # [P], [D,2], [D], [D,D], [D]
    sides_ptr,  # uint8 [2 + 2D, P] out
    P, D,
    POWER: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """1 where the backward kernel lets a gradient through: at the features, the first hidden layer and the second."""
    o_p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    o_d, m_p = tl.arange(0, BD), o_p < P
    m_d = o_d < D
    g = tl.load(grads_ptr + o_p, mask=m_p, other=0.0).to(ACC)
    magnitude, sign = features(g, POWER, SCALE)
    of_magnitude = tl.load(weight1_ptr + 2 * o_d, mask=m_d, other=0.0).to(ACC)
    of_sign = tl.load(weight1_ptr + 2 * o_d + 1, mask=m_d, other=0.0).to(ACC)
    bias1 = tl.load(bias1_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    bias2 = tl.load(bias2_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    weight2 = load_matrix(weight2_ptr, D, D, ACC, BD, BD)
    hidden1 = magnitude[:, None] * of_magnitude[None, :] + sign[:, None] * of_sign[None, :] + bias1[None, :]
    hidden1 = relu(hidden1)
    hidden2 = relu(exact_dot(hidden1, tl.trans(weight2), ACC) + bias2[None, :])
    through_log, through_sign = between_ends(g, POWER, SCALE)
    tl.store(sides_ptr + o_p, through_log.to(tl.uint8), mask=m_p)
    tl.store(sides_ptr + tl.full((), 1, tl.int64) * P + o_p, through_sign.to(tl.uint8), mask=m_p)
    m, at = m_p[:, None] & m_d[None, :], (2 + o_d[None, :]).to(tl.int64) * P + o_p[:, None]
    tl.store(sides_ptr + at, tl.where(hidden1 <= 0.0, 0, 1).to(tl.uint8), mask=m)
    tl.store(sides_ptr + tl.full((), D, tl.int64) * P + at, tl.where(hidden2 <= 0.0, 0, 1).to(tl.uint8), mask=m)


@triton.jit
def generate_fast_weights_bwd_kernel(
    dfast_ptr, grads_ptr,  # [P], [P]
    weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, weight3_ptr,  # [D,2], [D], [D,D], [D], [1,D]
    dgrads_ptr,  # [P] out
    work_sums_ptr,  # [programs, 5D + D*D + 1] of ACC out: dweight1, dbias1, dweight2, dbias2, dweight3, dbias3
    P, D,
    POWER: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    of_magnitude = tl.load(weight1_ptr + 2 * o_d, mask=m_d, other=0.0).to(ACC)
    of_sign = tl.load(weight1_ptr + 2 * o_d + 1, mask=m_d, other=0.0).to(ACC)
    bias1 = tl.load(bias1_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    bias2 = tl.load(bias2_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    weight3 = tl.load(weight3_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    weight2 = load_matrix(weight2_ptr, D, D, ACC, BD, BD)
    dof_magnitude, dof_sign, dbias1 = tl.zeros([BD], ACC), tl.zeros([BD], ACC), tl.zeros([BD], ACC)
    dweight2, dbias2 = tl.zeros([BD, BD], ACC), tl.zeros([BD], ACC)
    dweight3, dbias3 = tl.zeros([BD], ACC), tl.zeros([BP], ACC)
    for i_p in range(tl.program_id(0), tl.cdiv(P, BP), tl.num_programs(0)):
        o_p = i_p * BP + tl.arange(0, BP).to(tl.int64)
        g = tl.load(grads_ptr + o_p, mask=o_p < P, other=0.0).to(ACC)
        dfast = tl.load(dfast_ptr + o_p, mask=o_p < P, other=0.0).to(ACC)
        magnitude, sign = features(g, POWER, SCALE)
        hidden1 = magnitude[:, None] * of_magnitude[None, :] + sign[:, None] * of_sign[None, :] + bias1[None, :]
        hidden1 = relu(hidden1)
        hidden2 = relu(exact_dot(hidden1, tl.trans(weight2), ACC) + bias2[None, :])
        dweight3 += tl.sum(dfast[:, None] * hidden2, axis=0)
        dbias3 += dfast
        dhidden2 = tl.where(hidden2 <= 0.0, 0.0, dfast[:, None] * weight3[None, :])
        dweight2 += exact_dot(tl.trans(dhidden2), hidden1, ACC)
        dbias2 += tl.sum(dhidden2, axis=0)
        dhidden1 = tl.where(hidden1 <= 0.0, 0.0, exact_dot(dhidden2, weight2, ACC))
        dof_magnitude += tl.sum(dhidden1 * magnitude[:, None], axis=0)
        dof_sign += tl.sum(dhidden1 * sign[:, None], axis=0)
        dbias1 += tl.sum(dhidden1, axis=0)
        dmagnitude = tl.sum(dhidden1 * of_magnitude[None, :], axis=1)
        dsign = tl.sum(dhidden1 * of_sign[None, :], axis=1)
        tl.store(dgrads_ptr + o_p, features_backward(g, dmagnitude, dsign, POWER, SCALE), mask=o_p < P)
    sums = work_sums_ptr + tl.program_id(0).to(tl.int64) * (5 * D + D * D + 1)
    tl.store(sums + 2 * o_d, dof_magnitude, mask=m_d)
    tl.store(sums + 2 * o_d + 1, dof_sign, mask=m_d)
    tl.store(sums + 2 * D + o_d, dbias1, mask=m_d)
    o_dd = o_d[:, None] * D + o_d[None, :]
    tl.store(sums + 3 * D + o_dd, dweight2, mask=m_d[:, None] & m_d[None, :])
    tl.store(sums + 3 * D + D * D + o_d, dbias2, mask=m_d)
    tl.store(sums + 4 * D + D * D + o_d, dweight3, mask=m_d)
    tl.store(sums + 5 * D + D * D, tl.sum(dbias3, axis=0))


def forward(grads, weight1, bias1, weight2, bias2, weight3, bias3, p):
    """The operator generate_fast_weights: same arguments and results as its schema."""
    grads, weight1, bias1, weight2, bias2, weight3, bias3 = contiguous(
        grads, weight1, bias1, weight2, bias2, weight3, bias3
    )
    count, hidden, fast = grads.numel(), bias1.numel(), torch.empty_like(grads)
    sizes = launch(hidden, 0, p)
    if count:
        generate_fast_weights_fwd_kernel[(triton.cdiv(count, sizes["BP"]),)](
            grads_ptr=grads, weight1_ptr=weight1, bias1_ptr=bias1, weight2_ptr=weight2, bias2_ptr=bias2,
            weight3_ptr=weight3, bias3_ptr=bias3, fast_ptr=fast, P=count, D=hidden, ACC=acc_of(grads.dtype).triton,
            **sizes,
        )  # fmt: skip
    return fast


def sides(grads, weight1, bias1, weight2, bias2, p):
    """The operator generate_fast_weights_sides: same arguments and results as its schema."""
    grads, weight1, bias1, weight2, bias2 = contiguous(grads, weight1, bias1, weight2, bias2)
    count, hidden = grads.numel(), bias1.numel()
    sizes, found = launch(hidden, 0, p), grads.new_empty(2 + 2 * hidden, count, dtype=torch.uint8)
    if count:
        generate_fast_weights_sides_kernel[(triton.cdiv(count, sizes["BP"]),)](
            grads_ptr=grads, weight1_ptr=weight1, bias1_ptr=bias1, weight2_ptr=weight2, bias2_ptr=bias2,
            sides_ptr=found, P=count, D=hidden, ACC=acc_of(grads.dtype).triton, **sizes,
        )  # fmt: skip
    return found


def backward(dfast, grads, weight1, bias1, weight2, bias2, weight3, bias3, p):
    """The operator generate_fast_weights_backward: same arguments and results as its schema."""
    weights = (weight1, bias1, weight2, bias2, weight3, bias3)
    dfast, grads, weight1, bias1, weight2, bias2, weight3 = contiguous(
        dfast, grads, weight1, bias1, weight2, bias2, weight3
    )
    count, hidden, acc, dgrads = grads.numel(), bias1.numel(), acc_of(grads.dtype), torch.empty_like(grads)
    lengths = [weight.numel() for weight in weights]
    sums = grads.new_empty(programs_of(count), sum(lengths), dtype=acc.torch)
    if count:
        generate_fast_weights_bwd_kernel[(len(sums),)](
            dfast_ptr=dfast, grads_ptr=grads, weight1_ptr=weight1, bias1_ptr=bias1, weight2_ptr=weight2,
            bias2_ptr=bias2, weight3_ptr=weight3, dgrads_ptr=dgrads, work_sums_ptr=sums, P=count, D=hidden,
            ACC=acc.triton, **launch(hidden, 0, p),
        )  # fmt: skip
    parts = sums.sum(0).to(grads.dtype).split(lengths)
    # clones: results of an operator do not share memory
    return dgrads, *(part.view(weight.shape).clone() for part, weight in zip(parts, weights, strict=True))
