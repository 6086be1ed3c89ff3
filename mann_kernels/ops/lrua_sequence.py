"""An episode of memory steps in one call, for keys that do not depend on what is read."""

import functools

import torch

from mann_kernels import _backend, _library, reference
from mann_kernels.ops import _autocast, _check
from mann_kernels.ops._vjp import arithmetic_dtype, by_reference, keep, kept, reference_vjp
from mann_kernels.ops.lrua_step import check_options, check_tensors

#: Backward goes by segments of so many steps. Forward keeps the state between two segments; backward takes the steps of a
#: segment again from there, then undoes them one by one. The scratch memory of backward grows with it, what is kept shrinks.
CHECKPOINT_EVERY = 128


def empty_saved(memory, time, heads, checkpoint_every, save):
    """Make the tensors that a sequence keeps for its backward, not initialised: least-used slots, and checkpoints of
    memory and read weights.

    The copies are taken after every `checkpoint_every` steps but the last ones.
    """
    batch, slots, width = memory.shape
    dtype = arithmetic_dtype(memory.dtype)
    copies = max(time - 1, 0) // checkpoint_every

    def empty(dtype, *shape):
        return memory.new_empty(shape if save else (0,), dtype=dtype)

    return (
        empty(torch.int32, time, batch, heads),
        empty(dtype, copies, batch, slots, width),
        empty(dtype, copies, batch, heads, slots),
    )


def _fake_forward(
    memory, usage, read_weights, key, gate, beta, add, lengths, shared, erase_all, decay, eps, checkpoint_every, save
):
    return (
        key.new_empty(key.shape),
        memory.new_empty(memory.shape),
        usage.new_empty(usage.shape),
        read_weights.new_empty(read_weights.shape),
        *empty_saved(memory, key.shape[0], key.shape[2], checkpoint_every, save),
    )


def _fake_backward(dreads, dmemory1, dread_weights1, memory, read_weights, key, gate, beta, add, *_):
    return (
        memory.new_empty(memory.shape),
        read_weights.new_empty(read_weights.shape),
        key.new_empty(key.shape),
        gate.new_empty(gate.shape),
        gate.new_empty(gate.shape if beta is not None else (0,)),
        key.new_empty(key.shape if add is not None else (0,)),
    )


_library.define(
    "lrua_sequence(Tensor memory, Tensor usage, Tensor read_weights, Tensor key, Tensor gate, Tensor? beta, Tensor? add,"
    " Tensor? lengths, bool shared, bool erase_all, float decay, float eps, int checkpoint_every, bool save)"
    " -> (Tensor reads, Tensor memory1, Tensor usage1, Tensor read_weights1,"
    " Tensor saved_least_used, Tensor saved_memory, Tensor saved_read_weights)",
    _fake_forward,
)
_library.define(
    "lrua_sequence_backward(Tensor dreads, Tensor? dmemory1, Tensor? dread_weights1, Tensor memory, Tensor read_weights,"
    " Tensor key, Tensor gate, Tensor? beta, Tensor? add, Tensor? lengths, Tensor saved_least_used, Tensor saved_memory,"
    " Tensor saved_read_weights, bool shared, bool erase_all, float eps, int checkpoint_every)"
    " -> (Tensor dmemory, Tensor dread_weights, Tensor dkey, Tensor dgate, Tensor dbeta, Tensor dadd)",
    _fake_backward,
)


class _LruaSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, memory, usage, read_weights, key, gate, beta, add, lengths, lru, erase, decay, eps, save, backend):
        reads, memory1, usage1, read_weights1, *saved = _library.operators(backend).lrua_sequence(
            *(memory, usage, read_weights, key, gate, beta, add, lengths),
            *(lru == "shared", erase == "all", decay, eps, CHECKPOINT_EVERY, save),
        )
        ctx.mark_non_differentiable(usage1)
        ctx.set_materialize_grads(False)
        keep(ctx, backend, memory, usage, read_weights, key, gate, beta, add, lengths, *saved)
        ctx.options = {"lru": lru, "erase": erase, "decay": decay, "eps": eps}
        return reads, memory1, usage1, read_weights1

    @staticmethod
    @_autocast.off
    def backward(ctx, dreads, dmemory1, _, dread_weights1):
        memory, usage, read_weights, key, gate, beta, add, lengths, *saved = kept(ctx)
        options = ctx.options
        if by_reference(dreads, dmemory1, dread_weights1):
            function = functools.partial(reference.lrua_sequence, lengths=lengths, least_used=saved[0], **options)
            inputs = (memory, usage, read_weights, key, gate, beta, add)
            return *reference_vjp(function, inputs, (dreads, dmemory1, None, dread_weights1)), *[None] * 7
        dmemory, dread_weights, dkey, dgate, dbeta, dadd = _library.operators(ctx.backend).lrua_sequence_backward(
            torch.zeros_like(key) if dreads is None else dreads,
            *(dmemory1, dread_weights1, memory, read_weights, key, gate, beta, add, lengths, *saved),
            *(options["lru"] == "shared", options["erase"] == "all", options["eps"], CHECKPOINT_EVERY),
        )
        dbeta, dadd = None if beta is None else dbeta, None if add is None else dadd
        return dmemory, None, dread_weights, dkey, dgate, dbeta, dadd, *[None] * 7


@_autocast.in_float32
def lrua_sequence(
    memory: torch.Tensor,
    usage: torch.Tensor,
    read_weights: torch.Tensor,
    key: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    lru: str = "per_head",
    erase: str = "least",
    decay: float = 0.99,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """T steps of the memory (lrua_step) in one call (Santoro et al. 2016, eq. 2 to 8).

    Args:
        memory: [B, N, W], before the first step.
        usage: [B, N], before the first step.
        read_weights: [B, R, N], before the first step.
        key: [T, B, R, W], as in lrua_step, for every step.
        gate: [T, B, R], the same.
        beta: [T, B, R] or None, the same.
        add: [T, B, R, W] or None, the same.
        lengths: int64 [B], the number of real steps of each example, or None for T. Later steps are padding: they read
            zeros and change nothing.
        lru: "per_head" or "shared", as in lrua_step.
        erase: "least" or "all", as in lrua_step.
        decay: of the usage (gamma of eq. 5).
        eps: inside the root of the cosine's denominator.

    Returns:
        reads [T, B, R, W], and memory, usage, read_weights after the last real step. No gradient flows through usage.

    Raises:
        TypeError: a tensor that is not floating point, or not of the dtype of the others; lengths not int64.
        ValueError: a shape, device or option that does not fit; more heads than slots.

    Kept for the backward pass, beside the inputs: R slot numbers per step and example, and a copy of memory and read
    weights every CHECKPOINT_EVERY steps. The backward pass recomputes the steps between two checkpoints, then undoes the writes.
    """
    check_tensors(memory, usage, read_weights, key, gate, beta, add, ("T",))
    _check.step_lengths(lengths, memory.shape[0], memory.device)
    check_options(lru, erase, decay, eps)
    options = {"lru": lru, "erase": erase, "decay": decay, "eps": eps}
    inputs = (memory, usage, read_weights, key, gate, beta, add)
    backend = _backend.select("lrua_sequence", memory)
    if backend == "reference":
        return reference.lrua_sequence(*inputs, lengths, **options)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    return _LruaSequence.apply(*inputs, lengths, *options.values(), save, backend)
