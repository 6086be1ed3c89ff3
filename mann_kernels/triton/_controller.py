"""The LSTM controller of one example and one step: streamed matrix-vector products, heads and gates, forward and backward."""

import triton
import triton.language as tl

from mann_kernels.triton._tile import exp_minus_one, log_of_one_plus, sigmoid, tanh


def tiles(hidden: int, recurrent: int) -> dict[str, int]:
    """A tile [BJ,BK] of a weight matrix: 32 numbers for each of 256 threads, beside 32 partial sums.

    At the paper's shape 1.3 MB of weights come by at every step, from the second-level cache. A multiprocessor takes some 64
    bytes a clock at a latency of some 600, so it wants about 40 KB on the way, and a tile is 32 KB. Of the shapes with that many
    numbers this one spills nothing on any target, with either version of Triton; 128 x 64 and 64 x 128 do.
    """
    return {
        "BJ": min(256, triton.next_power_of_2(4 * hidden)),
        "BK": min(32, triton.next_power_of_2(recurrent)),
    }


@triton.jit
def load_weights(ptr, o_j, o_k, rows: tl.constexpr, columns: tl.constexpr, ACC: tl.constexpr):
    """Rows o_j [BJ] and columns o_k [BK] of a matrix [rows, columns], padded with zeros."""
    mask = (o_j < rows)[:, None] & (o_k < columns)[None, :]
    return tl.load(ptr + o_j[:, None] * columns + o_k[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def times_vector(
    weight_ptr, vector_ptr, o_j, rows: tl.constexpr, columns: tl.constexpr,
    ACC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows o_j [BJ] of weight [rows, columns] @ vector [columns]."""
    partial = tl.zeros([BJ, BK], ACC)
    for k0 in tl.range(0, columns, BK, disable_licm=True):
        o_k = k0 + tl.arange(0, BK)
        vector = tl.load(vector_ptr + o_k, mask=o_k < columns, other=0.0).to(ACC)
        partial += load_weights(weight_ptr, o_j, o_k, rows, columns, ACC) * vector[None, :]
    return tl.sum(partial, axis=1)


@triton.jit
def vector_times(
    weight_ptr, vector_ptr, o_k, rows: tl.constexpr, columns: tl.constexpr,
    ACC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Columns o_k [BK] of vector [rows] @ weight [rows, columns]."""
    partial = tl.zeros([BJ, BK], ACC)
    for j0 in tl.range(0, rows, BJ, disable_licm=True):
        o_j = j0 + tl.arange(0, BJ)
        vector = tl.load(vector_ptr + o_j, mask=o_j < rows, other=0.0).to(ACC)
        partial += load_weights(weight_ptr, o_j, o_k, rows, columns, ACC) * vector[:, None]
    return tl.sum(partial, axis=0)


@triton.jit
def make_head(
    weight_ptr, bias_ptr, h_ptr, head_ptr, P: tl.constexpr, H: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    KEY_STRENGTH: tl.constexpr, SQUASH: tl.constexpr, ACC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """head [P] = activations of weight [P,H] @ h [H] + bias: key, gate (still before its sigmoid), strength, add.

    The activations have a loop of their own: in the layout of the matrix each thread would hold eight numbers of them.
    """
    for p0 in tl.range(0, P, BJ, disable_licm=True):
        o_p = p0 + tl.arange(0, BJ)
        tl.store(head_ptr + o_p, times_vector(weight_ptr, h_ptr, o_p, P, H, ACC, BJ, BK), mask=o_p < P)
    tl.debug_barrier()
    after_gate: tl.constexpr = R * W + R * (2 if KEY_STRENGTH else 1)
    for p0 in tl.range(0, P, BJ, disable_licm=True):
        o_p = p0 + tl.arange(0, BJ)
        head = tl.load(head_ptr + o_p, mask=o_p < P, other=0.0)
        head += tl.load(bias_ptr + o_p, mask=o_p < P, other=0.0).to(ACC)
        if KEY_STRENGTH:
            strength = tl.maximum(head, 0.0) + log_of_one_plus(tl.exp(-tl.abs(head)))
            head = tl.where((o_p >= R * W + R) & (o_p < after_gate), strength, head)
        if SQUASH:
            head = tl.where((o_p < R * W) | (o_p >= after_gate), tanh(head), head)
        # a block smaller than the program is held by several warps: none may read what another replaced
        tl.debug_barrier()
        tl.store(head_ptr + o_p, head, mask=o_p < P)
    tl.debug_barrier()


@triton.jit
def lstm_forward(
    gates_ptr,  # [4H] of ACC in: before, out: after the activations
    cell_ptr, new_cell_ptr,  # [H] of ACC in, out
    recurrent_ptr,  # [H] of ACC, h out
    output_ptr,  # [H], h out
    H: tl.constexpr, ACC: tl.constexpr, S: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Eq. 9 to 16, but for the matrix products."""
    for i0 in tl.range(0, H, BK, disable_licm=True):
        o_i = i0 + tl.arange(0, BK)
        m_i = o_i < H
        gate_in = sigmoid(tl.load(gates_ptr + o_i, mask=m_i, other=0.0))
        gate_forget = sigmoid(tl.load(gates_ptr + H + o_i, mask=m_i, other=0.0))
        candidate = tanh(tl.load(gates_ptr + 2 * H + o_i, mask=m_i, other=0.0))
        gate_out = sigmoid(tl.load(gates_ptr + 3 * H + o_i, mask=m_i, other=0.0))
        c = gate_forget * tl.load(cell_ptr + o_i, mask=m_i, other=0.0) + gate_in * candidate
        h = (gate_out * tanh(c)).to(S)  # what is kept is what counts: backward starts from it
        tl.debug_barrier()  # as in make_head
        tl.store(gates_ptr + o_i, gate_in, mask=m_i)
        tl.store(gates_ptr + H + o_i, gate_forget, mask=m_i)
        tl.store(gates_ptr + 2 * H + o_i, candidate, mask=m_i)
        tl.store(gates_ptr + 3 * H + o_i, gate_out, mask=m_i)
        tl.store(new_cell_ptr + o_i, c, mask=m_i)
        tl.store(recurrent_ptr + o_i, h.to(ACC), mask=m_i)
        tl.store(output_ptr + o_i, h, mask=m_i)
    tl.debug_barrier()


@triton.jit
def head_backward(
    head_ptr,  # [P] of ACC, after the activations
    work_ptr,  # [P] of ACC, in: the gradient after, out: before the activations
    dhead_ptr,  # [P] out, the same
    P: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    KEY_STRENGTH: tl.constexpr, SQUASH: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    after_gate: tl.constexpr = R * W + R * (2 if KEY_STRENGTH else 1)
    for p0 in tl.range(0, P, BJ, disable_licm=True):
        o_p = p0 + tl.arange(0, BJ)
        value = tl.load(head_ptr + o_p, mask=o_p < P, other=0.0)
        grad = tl.load(work_ptr + o_p, mask=o_p < P, other=0.0)
        if KEY_STRENGTH:
            is_beta = (o_p >= R * W + R) & (o_p < after_gate)
            grad = tl.where(is_beta, -grad * exp_minus_one(-value), grad)
        if SQUASH:
            grad = tl.where((o_p < R * W) | (o_p >= after_gate), grad * (1.0 - value * value), grad)
        tl.debug_barrier()  # as in make_head
        tl.store(work_ptr + o_p, grad, mask=o_p < P)
        tl.store(dhead_ptr + o_p, grad, mask=o_p < P)
    tl.debug_barrier()


@triton.jit
def lstm_backward(
    doutput_ptr, drecurrent_ptr,  # [H], [H] of ACC: h's gradient from outside and from the next step
    weight_head_ptr, work_dhead_ptr,  # [P,H], [P] of ACC: and through the heads
    gates_ptr, cell_ptr, next_cell_ptr,  # [4H], [H], [H] of ACC, as forward left them
    dcell_ptr, new_dcell_ptr,  # [H] of ACC in, out
    work_dh_ptr,  # [H] of ACC
    work_dgates_ptr, dgates_ptr,  # [4H] of ACC, [4H] out: the gradient before the activations
    P: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Backward of the heads' projection and of eq. 9 to 16, but for the recurrent product."""
    for i0 in tl.range(0, H, BK, disable_licm=True):
        o_i = i0 + tl.arange(0, BK)
        dh = vector_times(weight_head_ptr, work_dhead_ptr, o_i, P, H, ACC, BJ, BK)
        tl.store(work_dh_ptr + o_i, dh, mask=o_i < H)
    tl.debug_barrier()
    for i0 in tl.range(0, H, BK, disable_licm=True):
        o_i = i0 + tl.arange(0, BK)
        m_i = o_i < H
        dh = tl.load(work_dh_ptr + o_i, mask=m_i, other=0.0) + tl.load(drecurrent_ptr + o_i, mask=m_i, other=0.0)
        dh += tl.load(doutput_ptr + o_i, mask=m_i, other=0.0).to(ACC)
        gate_in = tl.load(gates_ptr + o_i, mask=m_i, other=0.0)
        gate_forget = tl.load(gates_ptr + H + o_i, mask=m_i, other=0.0)
        candidate = tl.load(gates_ptr + 2 * H + o_i, mask=m_i, other=0.0)
        gate_out = tl.load(gates_ptr + 3 * H + o_i, mask=m_i, other=0.0)
        squashed = tanh(tl.load(next_cell_ptr + o_i, mask=m_i, other=0.0))
        dc = tl.load(dcell_ptr + o_i, mask=m_i, other=0.0) + dh * gate_out * (1.0 - squashed * squashed)
        din = dc * candidate * gate_in * (1.0 - gate_in)
        dforget = dc * tl.load(cell_ptr + o_i, mask=m_i, other=0.0) * gate_forget * (1.0 - gate_forget)
        dcandidate = dc * gate_in * (1.0 - candidate * candidate)
        dout = dh * squashed * gate_out * (1.0 - gate_out)
        tl.store(new_dcell_ptr + o_i, dc * gate_forget, mask=m_i)
        tl.store(work_dgates_ptr + o_i, din, mask=m_i)
        tl.store(dgates_ptr + o_i, din, mask=m_i)
        tl.store(work_dgates_ptr + H + o_i, dforget, mask=m_i)
        tl.store(dgates_ptr + H + o_i, dforget, mask=m_i)
        tl.store(work_dgates_ptr + 2 * H + o_i, dcandidate, mask=m_i)
        tl.store(dgates_ptr + 2 * H + o_i, dcandidate, mask=m_i)
        tl.store(work_dgates_ptr + 3 * H + o_i, dout, mask=m_i)
        tl.store(dgates_ptr + 3 * H + o_i, dout, mask=m_i)
    tl.debug_barrier()
