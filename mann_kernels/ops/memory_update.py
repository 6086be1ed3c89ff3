"""Erase the least-used slot, add the R outer products."""

import functools

import torch

from mann_kernels import _backend, _library, reference
from mann_kernels.ops import _autocast, _check
from mann_kernels.ops._vjp import by_reference, keep, kept, reference_vjp

_library.define(
    "memory_update(Tensor memory, Tensor write_weights, Tensor add, Tensor least_used, bool erase_all) -> Tensor",
    lambda memory, write_weights, add, least_used, erase_all: memory.new_empty(memory.shape),
)
_library.define(
    "memory_update_backward(Tensor dmemory, Tensor write_weights, Tensor add, Tensor least_used, bool erase_all)"
    " -> (Tensor dmemory0, Tensor dwrite_weights, Tensor dadd)",
    lambda dmemory, write_weights, add, least_used, erase_all: (
        dmemory.new_empty(dmemory.shape),
        write_weights.new_empty(write_weights.shape),
        add.new_empty(add.shape),
    ),
)


class _MemoryUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, memory, write_weights, add, least_used, erase, backend):
        keep(ctx, backend, memory, write_weights, add, least_used)
        ctx.erase = erase
        return _library.operators(backend).memory_update(memory, write_weights, add, least_used, erase == "all")

    @staticmethod
    @_autocast.off
    def backward(ctx, dmemory):
        memory, write_weights, add, least_used = kept(ctx)
        if by_reference(dmemory):
            function = functools.partial(reference.memory_update, least_used=least_used, erase=ctx.erase)
            return *reference_vjp(function, (memory, write_weights, add), (dmemory,)), None, None, None
        grads = _library.operators(ctx.backend).memory_update_backward(
            dmemory, write_weights, add, least_used, ctx.erase == "all"
        )
        return *grads, None, None, None


@_check.once
def _check_tensors(memory, write_weights, add, least_used):
    sizes = {}
    _check.same_kind(memory=memory, write_weights=write_weights, add=add)
    _check.shape(sizes, "memory", memory, "B", "N", "W")
    _check.shape(sizes, "write_weights", write_weights, "B", "R", "N")
    _check.shape(sizes, "add", add, "B", "R", "W")
    if not isinstance(least_used, torch.Tensor) or least_used.dtype not in (torch.int32, torch.int64):
        got = least_used.dtype if isinstance(least_used, torch.Tensor) else type(least_used).__name__
        raise TypeError(f"least_used: got {got}, want an int32 or int64 tensor [B, R]")
    if least_used.device != memory.device:
        raise ValueError(f"least_used: got device {least_used.device}, want {memory.device}, the device of memory")
    _check.shape(sizes, "least_used", least_used, "B", "R")
    _check.not_empty(sizes, "N", "W", "R")


@_autocast.in_float32
def memory_update(
    memory: torch.Tensor,
    write_weights: torch.Tensor,
    add: torch.Tensor,
    least_used: torch.Tensor,
    *,
    erase: str = "least",
) -> torch.Tensor:
    """Zero the least-used slot, then add the outer product of every head (Santoro et al. 2016, section 3.2 and eq. 8).

    Args:
        memory: [B, N, W].
        write_weights: [B, R, N].
        add: [B, R, W], what each head writes; the paper writes its key.
        least_used: int32 or int64 [B, R] in ascending usage, each in [0, N).
        erase: "least" zeroes the first slot of least_used only, "all" every one of them.

    Returns:
        the new memory [B, N, W]; the argument is left as it was.

    Raises:
        TypeError: a tensor that is not floating point, or not of the dtype of the others; least_used not of integers.
        ValueError: a shape, device or option that does not fit.
        RuntimeError: an index of least_used outside [0, N).
    """
    _check_tensors(memory, write_weights, add, least_used)
    _check.known_options(erase=erase)
    backend = _backend.select("memory_update", memory)
    if backend == "reference":
        return reference.memory_update(memory, write_weights, add, least_used, erase=erase)
    return _MemoryUpdate.apply(memory, write_weights, add, least_used.to(torch.int32), erase, backend)
