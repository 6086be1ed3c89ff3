"""Triton kernels of summarize_gradients.

A step's input is the row (h, 1, magnitude, sign), so that the products with the gates' weights [4D,D+3] hold the recurrent part,
the bias and the input part, and the gradients of all three are one product too.
"""

import torch
import triton
import triton.language as tl

from mann_kernels.triton._coordinates import features, features_backward, launch, programs_of
from mann_kernels.triton._launch import acc_of, contiguous
from mann_kernels.triton._tile import exact_dot, sigmoid, tanh


@triton.jit
def load_gate(
    weight_ih_ptr, weight_hh_ptr, bias_ptr, GATE: tl.constexpr, D, ACC: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """The weights [BD,BD] of one gate: row j has (weight_hh[j], bias[j], weight_ih[j])."""
    o_j, o_k = tl.arange(0, BD)[:, None], tl.arange(0, BD)[None, :]
    row = GATE * D + o_j
    m_j = o_j < D
    recurrent = tl.load(weight_hh_ptr + row * D + o_k, mask=m_j & (o_k < D), other=0.0).to(ACC)
    bias = tl.load(bias_ptr + row + o_k - D, mask=m_j & (o_k == D), other=0.0).to(ACC)
    beside = tl.load(weight_ih_ptr + row * 2 + o_k - D - 1, mask=m_j & (o_k > D) & (o_k < D + 3), other=0.0).to(ACC)
    return recurrent + bias + beside


@triton.jit
def load_gates(weight_ih_ptr, weight_hh_ptr, bias_ptr, D, ACC: tl.constexpr, BD: tl.constexpr):
    """The weights of the input gate, the forget gate, the candidate and the output gate."""
    return (
        load_gate(weight_ih_ptr, weight_hh_ptr, bias_ptr, 0, D, ACC, BD),
        load_gate(weight_ih_ptr, weight_hh_ptr, bias_ptr, 1, D, ACC, BD),
        load_gate(weight_ih_ptr, weight_hh_ptr, bias_ptr, 2, D, ACC, BD),
        load_gate(weight_ih_ptr, weight_hh_ptr, bias_ptr, 3, D, ACC, BD),
    )


@triton.jit
def load_step(grads_ptr, t, o_p, P, ACC: tl.constexpr, BP: tl.constexpr):
    """Gradients [BP] of step t."""
    return tl.load(grads_ptr + tl.full([BP], t, tl.int64) * P + o_p, mask=o_p < P, other=0.0).to(ACC)


@triton.jit
def input_of(h, magnitude, sign, D, BD: tl.constexpr):
    """The input rows [BP,BD] of a step; h is zero from column D on."""
    o_k = tl.arange(0, BD)[None, :]
    beside = tl.where(o_k == D + 1, magnitude[:, None], tl.where(o_k == D + 2, sign[:, None], 0.0))
    return tl.where(o_k < D, h, tl.where(o_k == D, 1.0, beside))


@triton.jit
def step_forward(
    g, h, c, w_in, w_forget, w_candidate, w_out, D,
    POWER: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The four gates after their activation, and h and c after the step, each [BP,BD]."""
    magnitude, sign = features(g, POWER, SCALE)
    x = input_of(h, magnitude, sign, D, BD)
    gate_in, gate_forget = sigmoid(exact_dot(x, tl.trans(w_in), ACC)), sigmoid(exact_dot(x, tl.trans(w_forget), ACC))
    candidate, gate_out = tanh(exact_dot(x, tl.trans(w_candidate), ACC)), sigmoid(exact_dot(x, tl.trans(w_out), ACC))
    c = gate_forget * c + gate_in * candidate
    return gate_in, gate_forget, candidate, gate_out, gate_out * tanh(c), c


@triton.jit
def summarize_gradients_fwd_kernel(
    grads_ptr,  # [T,P]
    weight_ih_ptr, weight_hh_ptr, bias_ptr, weight_out_ptr, bias_out_ptr,  # [4D,2], [4D,D], [4D], [1,D], [1]
    fast_ptr,  # [P] out
    T, P, D,
    POWER: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    o_d = tl.arange(0, BD)
    w_in, w_forget, w_candidate, w_out = load_gates(weight_ih_ptr, weight_hh_ptr, bias_ptr, D, ACC, BD)
    h, c = tl.zeros([BP, BD], ACC), tl.zeros([BP, BD], ACC)
    for t in range(T):
        g = load_step(grads_ptr, t, o_p, P, ACC, BP)
        _, _, _, _, h, c = step_forward(g, h, c, w_in, w_forget, w_candidate, w_out, D, POWER, SCALE, ACC, BD)
    weight_out = tl.load(weight_out_ptr + o_d, mask=o_d < D, other=0.0).to(ACC)
    fast = tl.sum(h * weight_out[None, :], axis=1) + tl.load(bias_out_ptr).to(ACC)
    tl.store(fast_ptr + o_p, fast, mask=o_p < P)


@triton.jit
def store_gate(sums_ptr, GATE: tl.constexpr, dweight, D, BD: tl.constexpr):
    """dweight [BD,BD] of one gate to its rows of [4D,D+3]."""
    o_j, o_k = tl.arange(0, BD)[:, None], tl.arange(0, BD)[None, :]
    tl.store(sums_ptr + (GATE * D + o_j) * (D + 3) + o_k, dweight, mask=(o_j < D) & (o_k < D + 3))


@triton.jit
def recompute_block(
    grads_ptr, states, o_p, w_in, w_forget, w_candidate, w_out,  # states [BP,BD]: where the gates of step 0 go
    T, P, D,
    POWER: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Run the steps of a block again, with a record of the gates and c of each; returns h after the last."""
    TILE: tl.constexpr = BP * BD
    h, c = tl.zeros([BP, BD], ACC), tl.zeros([BP, BD], ACC)
    for t in range(T):
        g = load_step(grads_ptr, t, o_p, P, ACC, BP)
        gate_in, gate_forget, candidate, gate_out, h, c = step_forward(
            g, h, c, w_in, w_forget, w_candidate, w_out, D, POWER, SCALE, ACC, BD
        )
        at = states + t * 5 * TILE
        tl.store(at, gate_in)
        tl.store(at + TILE, gate_forget)
        tl.store(at + 2 * TILE, candidate)
        tl.store(at + 3 * TILE, gate_out)
        tl.store(at + 4 * TILE, c)
    tl.debug_barrier()
    return h


@triton.jit
def undo_block(
    dh, grads_ptr, dgrads_ptr, states, o_p,  # dh [BP,BD] after the last step
    w_in, w_forget, w_candidate, w_out, dw_in, dw_forget, dw_candidate, dw_out,
    T, P, D,
    POWER: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Undo the steps of a block, the last one first, by their records; returns the weight gradients with theirs added."""
    TILE: tl.constexpr = BP * BD
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    dc = tl.zeros([BP, BD], ACC)
    for step in range(T):
        t = T - 1 - step
        at = states + t * 5 * TILE
        before = at - 5 * TILE
        gate_in, gate_forget = tl.load(at), tl.load(at + TILE)
        candidate, gate_out = tl.load(at + 2 * TILE), tl.load(at + 3 * TILE)
        squashed = tanh(tl.load(at + 4 * TILE))
        m_before = tl.full([1, BD], t, tl.int32) > 0
        c_before = tl.load(before + 4 * TILE, mask=m_before, other=0.0)
        h_before = tl.load(before + 3 * TILE, mask=m_before, other=0.0) * tanh(c_before)
        dc += dh * gate_out * (1.0 - squashed * squashed)
        din = dc * candidate * gate_in * (1.0 - gate_in)
        dforget = dc * c_before * gate_forget * (1.0 - gate_forget)
        dcandidate = dc * gate_in * (1.0 - candidate * candidate)
        dout = dh * squashed * gate_out * (1.0 - gate_out)
        dc = dc * gate_forget
        g = load_step(grads_ptr, t, o_p, P, ACC, BP)
        magnitude, sign = features(g, POWER, SCALE)
        x = input_of(h_before, magnitude, sign, D, BD)
        dw_in += exact_dot(tl.trans(din), x, ACC)
        dw_forget += exact_dot(tl.trans(dforget), x, ACC)
        dw_candidate += exact_dot(tl.trans(dcandidate), x, ACC)
        dw_out += exact_dot(tl.trans(dout), x, ACC)
        dx = exact_dot(din, w_in, ACC) + exact_dot(dforget, w_forget, ACC)
        dx += exact_dot(dcandidate, w_candidate, ACC) + exact_dot(dout, w_out, ACC)
        dh = tl.where(m_d[None, :], dx, 0.0)
        dmagnitude = tl.sum(tl.where(o_d[None, :] == D + 1, dx, 0.0), axis=1)
        dsign = tl.sum(tl.where(o_d[None, :] == D + 2, dx, 0.0), axis=1)
        dg = features_backward(g, dmagnitude, dsign, POWER, SCALE)
        tl.store(dgrads_ptr + tl.full([BP], t, tl.int64) * P + o_p, dg, mask=o_p < P)
    tl.debug_barrier()
    return dw_in, dw_forget, dw_candidate, dw_out


@triton.jit
def summarize_gradients_bwd_kernel(
    dfast_ptr, grads_ptr,  # [P], [T,P]
    weight_ih_ptr, weight_hh_ptr, bias_ptr, weight_out_ptr,  # [4D,2], [4D,D], [4D], [1,D]
    dgrads_ptr,  # [T,P] out
    work_sums_ptr,  # [programs, 4D*(D+3) + D + 1] of ACC out: of the gates, dweight_out, dbias_out
    work_states_ptr,  # [programs,T,5,BP,BD] of ACC: the gates and c of every step of the block in hand
    T, P, D,
    POWER: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    i_program = tl.program_id(0).to(tl.int64)
    w_in, w_forget, w_candidate, w_out = load_gates(weight_ih_ptr, weight_hh_ptr, bias_ptr, D, ACC, BD)
    weight_out = tl.load(weight_out_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    dw_in, dw_forget = tl.zeros([BD, BD], ACC), tl.zeros([BD, BD], ACC)
    dw_candidate, dw_out = tl.zeros([BD, BD], ACC), tl.zeros([BD, BD], ACC)
    dweight_out, dbias_out = tl.zeros([BD], ACC), tl.zeros([BP], ACC)
    states = work_states_ptr + i_program * T * 5 * BP * BD + tl.arange(0, BP)[:, None] * BD + o_d[None, :]
    for i_p in range(tl.program_id(0), tl.cdiv(P, BP), tl.num_programs(0)):
        o_p = i_p * BP + tl.arange(0, BP).to(tl.int64)
        h = recompute_block(
            grads_ptr, states, o_p, w_in, w_forget, w_candidate, w_out, T, P, D, POWER, SCALE, ACC, BP, BD
        )
        dfast = tl.load(dfast_ptr + o_p, mask=o_p < P, other=0.0).to(ACC)
        dweight_out += tl.sum(dfast[:, None] * h, axis=0)
        dbias_out += dfast
        dw_in, dw_forget, dw_candidate, dw_out = undo_block(
            dfast[:, None] * weight_out[None, :], grads_ptr, dgrads_ptr, states, o_p,
            w_in, w_forget, w_candidate, w_out, dw_in, dw_forget, dw_candidate, dw_out,
            T, P, D, POWER, SCALE, ACC, BP, BD,
        )  # fmt: skip
    sums = work_sums_ptr + i_program * (4 * D * (D + 3) + D + 1)
    store_gate(sums, 0, dw_in, D, BD)
    store_gate(sums, 1, dw_forget, D, BD)
    store_gate(sums, 2, dw_candidate, D, BD)
    store_gate(sums, 3, dw_out, D, BD)
    tl.store(sums + 4 * D * (D + 3) + o_d, dweight_out, mask=m_d)
    tl.store(sums + 4 * D * (D + 3) + D, tl.sum(dbias_out, axis=0))


def forward(grads, weight_ih, weight_hh, bias, weight_out, bias_out, p):
    """The operator summarize_gradients: same arguments and results as its schema."""
    grads, weight_ih, weight_hh, bias, weight_out, bias_out = contiguous(
        grads, weight_ih, weight_hh, bias, weight_out, bias_out
    )
    steps, hidden, fast = len(grads), weight_hh.shape[1], grads.new_empty(grads.shape[1:])
    sizes, count = launch(hidden, 3, p), fast.numel()
    if count:
        summarize_gradients_fwd_kernel[(triton.cdiv(count, sizes["BP"]),)](
            grads_ptr=grads, weight_ih_ptr=weight_ih, weight_hh_ptr=weight_hh, bias_ptr=bias,
            weight_out_ptr=weight_out, bias_out_ptr=bias_out, fast_ptr=fast, T=steps, P=count, D=hidden,
            ACC=acc_of(grads.dtype).triton, **sizes,
        )  # fmt: skip
    return fast


def backward(dfast, grads, weight_ih, weight_hh, bias, weight_out, bias_out, p):
    """The operator summarize_gradients_backward: same arguments and results as its schema."""
    dfast, grads, weight_ih, weight_hh, bias, weight_out = contiguous(
        dfast, grads, weight_ih, weight_hh, bias, weight_out
    )
    steps, count, hidden, acc = len(grads), dfast.numel(), weight_hh.shape[1], acc_of(grads.dtype)
    sizes, dgrads = launch(hidden, 3, p), torch.empty_like(grads)
    gates = 4 * hidden * (hidden + 3)
    sums = grads.new_empty(programs_of(count), gates + hidden + 1, dtype=acc.torch)
    states = grads.new_empty(len(sums), steps, 5, sizes["BP"], sizes["BD"], dtype=acc.torch)
    if count:
        summarize_gradients_bwd_kernel[(len(sums),)](
            dfast_ptr=dfast, grads_ptr=grads, weight_ih_ptr=weight_ih, weight_hh_ptr=weight_hh, bias_ptr=bias,
            weight_out_ptr=weight_out, dgrads_ptr=dgrads, work_sums_ptr=sums, work_states_ptr=states, T=steps,
            P=count, D=hidden, ACC=acc.triton, **sizes,
        )  # fmt: skip
    total = sums.sum(0).to(grads.dtype)
    dgates, dresult = total[:gates].view(4 * hidden, hidden + 3), total[gates:]
    parts = (dgates[:, hidden + 1 :], dgates[:, :hidden], dgates[:, hidden], dresult[None, :hidden], dresult[hidden:])
    # clones: results of an operator do not share memory
    return dgrads, *(part.clone(memory_format=torch.contiguous_format) for part in parts)
