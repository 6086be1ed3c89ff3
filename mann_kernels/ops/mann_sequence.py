"""A whole MANN episode in one call: LSTM controller, heads and memory."""

import functools

import torch
import torch.nn.functional as F

from mann_kernels import _backend, _library, reference
from mann_kernels.ops import _autocast, _check
from mann_kernels.ops._vjp import arithmetic_dtype, by_reference, keep, kept, reference_vjp
from mann_kernels.ops.lrua_sequence import CHECKPOINT_EVERY, empty_saved
from mann_kernels.ops.lrua_step import check_options, check_state

# The operator is the recurrent part only. The input projection before it and the weight gradients after it are one
# matrix product each over all steps, which torch does best, whatever the device.
_FLAGS = "bool write_add, bool key_strength, bool squash, bool shared, bool erase_all"


def _fake_forward(
    gates_x, weight_hh, weight_head, bias_head, h, c, reads, memory, usage, read_weights, lengths,
    write_add, key_strength, squash, shared, erase_all, decay, eps, checkpoint_every, save,
):  # fmt: skip
    (time, batch), hidden = gates_x.shape[:2], h.shape[1]

    saved_gates = gates_x.new_empty((time, batch, 4 * hidden) if save else (0,), dtype=arithmetic_dtype(gates_x.dtype))
    least_used, memory_copies, weight_copies = empty_saved(memory, time, reads.shape[1], checkpoint_every, save)
    return (
        gates_x.new_empty(time, batch, weight_hh.shape[1]),
        *(state.new_empty(state.shape) for state in (h, c, reads, memory, usage, read_weights)),
        saved_gates,
        least_used,
        memory_copies.new_empty((memory_copies.shape[0], batch, hidden) if save else (0,)),
        memory_copies,
        weight_copies,
    )


def _fake_backward(
    doutput, dh1, dc1, dreads1, dmemory1, dread_weights1, weight_hh, weight_head, bias_head, c, memory, read_weights, *_
):
    time, batch = doutput.shape[:2]
    return (
        doutput.new_empty(time, batch, weight_hh.shape[0]),
        doutput.new_empty(time, batch, weight_head.shape[0]),
        c.new_empty(c.shape),
        c.new_empty(c.shape),
        c.new_empty(batch, read_weights.shape[1], memory.shape[2]),
        memory.new_empty(memory.shape),
        read_weights.new_empty(read_weights.shape),
    )


_library.define(
    "mann_sequence(Tensor gates_x, Tensor weight_hh, Tensor weight_head, Tensor bias_head, Tensor h, Tensor c,"
    " Tensor reads, Tensor memory, Tensor usage, Tensor read_weights, Tensor? lengths,"
    f" {_FLAGS}, float decay, float eps, int checkpoint_every, bool save)"
    " -> (Tensor output, Tensor h1, Tensor c1, Tensor reads1, Tensor memory1, Tensor usage1, Tensor read_weights1,"
    " Tensor saved_gates, Tensor saved_least_used, Tensor saved_c, Tensor saved_memory, Tensor saved_read_weights)",
    _fake_forward,
)
_library.define(
    "mann_sequence_backward(Tensor doutput, Tensor? dh1, Tensor? dc1, Tensor? dreads1, Tensor? dmemory1,"
    " Tensor? dread_weights1, Tensor weight_hh, Tensor weight_head, Tensor bias_head, Tensor c, Tensor memory,"
    " Tensor read_weights, Tensor? lengths, Tensor output,"
    " Tensor saved_gates, Tensor saved_least_used, Tensor saved_c, Tensor saved_memory, Tensor saved_read_weights,"
    f" {_FLAGS}, float eps, int checkpoint_every)"
    " -> (Tensor dgates, Tensor dhead, Tensor dh, Tensor dc, Tensor dreads, Tensor dmemory, Tensor dread_weights)",
    _fake_backward,
)


class _MannSequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, h, c, reads, memory, usage, read_weights, weight_ih, weight_hh, bias, weight_head, bias_head,
        lengths, write, key_strength, squash, lru, erase, decay, eps, save, backend,
    ):  # fmt: skip
        flags = (write == "add", key_strength, squash == "tanh", lru == "shared", erase == "all")
        ctx.products = _autocast.setting(x)
        output, *state_and_saved = _library.operators(backend).mann_sequence(
            *(F.linear(x, weight_ih, bias).to(x.dtype), weight_hh, weight_head, bias_head),
            *(h, c, reads, memory, usage, read_weights, lengths),
            *(*flags, decay, eps, CHECKPOINT_EVERY, save),
        )
        state, saved = state_and_saved[:6], state_and_saved[6:]
        ctx.mark_non_differentiable(state[4])
        ctx.set_materialize_grads(False)
        inputs = (x, h, c, reads, memory, usage, read_weights, weight_ih, weight_hh, bias, weight_head, bias_head)
        keep(ctx, backend, *inputs, lengths, output, *saved)
        ctx.flags = flags
        ctx.options = {
            "write": write, "key_strength": key_strength, "squash": squash,
            "lru": lru, "erase": erase, "decay": decay, "eps": eps,
        }  # fmt: skip
        # what is kept must stay as it is; what is returned the caller may write to
        return output.clone() if save else output, *state

    @staticmethod
    @_autocast.off
    def backward(ctx, doutput, dh1, dc1, dreads1, dmemory1, _, dread_weights1):
        tensors = kept(ctx)  # once: every look unpacks them all
        inputs, (lengths, output), saved = tensors[:12], tensors[12:14], tensors[14:]
        state_grads = (dh1, dc1, dreads1, dmemory1, dread_weights1)
        if by_reference(doutput, *state_grads):
            made = {"lengths": lengths, "least_used": saved[1]}
            function = functools.partial(reference.mann_sequence, **made, **ctx.options)
            grads = reference_vjp(function, inputs, (doutput, *state_grads[:4], None, dread_weights1))
            return *grads, *[None] * 10
        x, h, c, reads, memory, _, read_weights, weight_ih, weight_hh, _, weight_head, bias_head = inputs
        dgates, dhead, dh, dc, dreads, dmemory, dread_weights = _library.operators(ctx.backend).mann_sequence_backward(
            torch.zeros_like(output) if doutput is None else doutput,
            *(*state_grads, weight_hh, weight_head, bias_head, c, memory, read_weights, lengths, output, *saved),
            *(*ctx.flags, ctx.options["eps"], CHECKPOINT_EVERY),
        )
        state = (dh, dc, dreads, dmemory, None, dread_weights)
        with torch.autocast(**ctx.products):
            weights = _weight_grads(ctx.needs_input_grad, x, h, reads, output, weight_ih, dgates, dhead)
        weights = [None if grad is None else grad.to(x.dtype) for grad in weights]
        return weights[0], *state, *weights[1:], *[None] * 10


def _weight_grads(needs, x, h, reads, output, weight_ih, dgates, dhead):
    """The gradients that are one matrix product over all steps: of x, weight_ih, weight_hh, bias, weight_head, bias_head."""
    hidden = h.shape[1]
    flat_dgates, flat_dhead = dgates.flatten(0, 1), dhead.flatten(0, 1)
    dx = (flat_dgates @ weight_ih).view(x.shape) if needs[0] else None
    dweight_ih = flat_dgates.t() @ x.flatten(0, 1) if needs[7] else None
    dweight_hh = None
    if needs[8]:  # the recurrent input of step t is (h, reads) of step t - 1
        first = torch.cat([h, reads.flatten(1)], dim=1)
        dweight_hh = flat_dgates.t() @ torch.cat([first[None], output])[:-1].flatten(0, 1)
    dbias = flat_dgates.sum(0) if needs[9] else None
    dweight_head = flat_dhead.t() @ output.flatten(0, 1)[:, :hidden] if needs[10] else None
    dbias_head = flat_dhead.sum(0) if needs[11] else None
    return dx, dweight_ih, dweight_hh, dbias, dweight_head, dbias_head


@_check.once
def _check_tensors(
    x, h, c, reads, memory, usage, read_weights, weight_ih, weight_hh, bias, weight_head, bias_head, key_strength, write
):
    sizes = {}
    _check.same_kind(
        x=x, h=h, c=c, reads=reads, memory=memory, usage=usage, read_weights=read_weights, weight_ih=weight_ih,
        weight_hh=weight_hh, bias=bias, weight_head=weight_head, bias_head=bias_head,
    )  # fmt: skip
    check_state(sizes, memory, usage, read_weights)
    _check.shape(sizes, "x", x, "T", "B", "I")
    _check.shape(sizes, "h", h, "B", "H")
    _check.shape(sizes, "c", c, "B", "H")
    _check.not_empty(sizes, "H")
    _check.shape(sizes, "reads", reads, "B", "R", "W")
    words = sizes["R"] * sizes["W"]
    sizes["4H"] = 4 * sizes["H"]
    sizes["H+R*W"] = sizes["H"] + words
    sizes["P"] = words + sizes["R"] + sizes["R"] * key_strength + words * (write == "add")
    _check.shape(sizes, "weight_ih", weight_ih, "4H", "I")
    _check.shape(sizes, "weight_hh", weight_hh, "4H", "H+R*W")
    _check.shape(sizes, "bias", bias, "4H")
    _check.shape(sizes, "weight_head", weight_head, "P", "H")
    _check.shape(sizes, "bias_head", bias_head, "P")


@_autocast.around_float32
def mann_sequence(
    x: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    reads: torch.Tensor,
    memory: torch.Tensor,
    usage: torch.Tensor,
    read_weights: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias: torch.Tensor,
    weight_head: torch.Tensor,
    bias_head: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    write: str = "key",
    key_strength: bool = False,
    squash: str = "tanh",
    lru: str = "per_head",
    erase: str = "least",
    decay: float = 0.99,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, ...]:
    """A whole episode of a MANN with an LSTM controller, in one call (Santoro et al. 2016, section 3).

    Args:
        x: [T, B, I], the input; in the paper (x_t, y_{t-1}).
        h: [B, H], the controller's output before the first step.
        c: [B, H], its cell.
        reads: [B, R, W], what was read last.
        memory: [B, N, W], before the first step.
        usage: [B, N], before the first step.
        read_weights: [B, R, N], before the first step; R is taken from it.
        weight_ih: [4H, I], of the LSTM (eq. 9 to 16), its gates in the order of nn.LSTM (input, forget, cell, output).
        weight_hh: [4H, H + R*W], for the previous (h, reads).
        bias: [4H], of the gates.
        weight_head: [P, H], from h to key (R*W), gate (R), key strength (R, with key_strength), add (R*W, with
            write="add"), in this order; P is their sum.
        bias_head: [P], of the same.
        lengths: int64 [B], the number of real steps of each example, or None for T. Later steps are padding: their output
            is zero and they change nothing.
        write: "key" writes what is looked for, as the paper does; "add" a vector of its own.
        key_strength: multiply the similarities by softplus of a head output; False is 1, as in the paper.
        squash: "tanh" or "identity", on key and add.
        lru: "per_head" or "shared", as in lrua_step.
        erase: "least" or "all", as in lrua_step.
        decay: of the usage (gamma of eq. 5).
        eps: inside the root of the cosine's denominator.

    Returns:
        output [T, B, H + R*W] = (h, reads) of every step, then h, c, reads, memory, usage, read_weights after the last
        real step. No gradient flows through usage.

    Raises:
        TypeError: a tensor that is not floating point, or not of the dtype of the others; lengths not int64.
        ValueError: a shape, device or option that does not fit; more heads than slots.

    Kept for the backward pass, beside the inputs and the output: 4H numbers and R slot numbers per step and example, and a
    copy of c, memory and read weights every CHECKPOINT_EVERY steps. The backward pass takes the memory's steps between two
    copies again, then undoes the writes.
    """
    inputs = (x, h, c, reads, memory, usage, read_weights, weight_ih, weight_hh, bias, weight_head, bias_head)
    _check.known_options(write=write, squash=squash)
    check_options(lru, erase, decay, eps)
    _check_tensors(*inputs, bool(key_strength), write)
    _check.step_lengths(lengths, x.shape[1], x.device)
    options = {
        "write": write, "key_strength": key_strength, "squash": squash,
        "lru": lru, "erase": erase, "decay": decay, "eps": eps,
    }  # fmt: skip
    backend = _backend.select("mann_sequence", x)
    if backend == "reference":
        return _autocast.in_float32(reference.mann_sequence)(*inputs, lengths, **options)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _MannSequence.apply(*inputs, lengths, *options.values(), save, backend)
