"""Content-based addressing: softmax over slots of beta * cosine(key, memory)."""

import functools

import torch

from mann_kernels import _backend, _library, reference
from mann_kernels.ops import _autocast, _check
from mann_kernels.ops._vjp import by_reference, keep, kept, reference_vjp

_library.define(
    "content_address(Tensor memory, Tensor key, Tensor? beta, float eps) -> Tensor",
    lambda memory, key, beta, eps: memory.new_empty(memory.shape[0], key.shape[1], memory.shape[1]),
)
_library.define(
    "content_address_backward(Tensor dread_weights, Tensor memory, Tensor key, Tensor? beta, Tensor read_weights, float eps)"
    " -> (Tensor dmemory, Tensor dkey, Tensor dbeta)",
    lambda dread_weights, memory, key, beta, read_weights, eps: (
        memory.new_empty(memory.shape),
        key.new_empty(key.shape),
        key.new_empty(key.shape[:2]),
    ),
)


class _ContentAddress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, memory, key, beta, eps, backend):
        read_weights = _library.operators(backend).content_address(memory, key, beta, eps)
        keep(ctx, backend, memory, key, beta, read_weights)
        ctx.eps = eps
        return read_weights

    @staticmethod
    @_autocast.off
    def backward(ctx, dread_weights):
        memory, key, beta, read_weights = kept(ctx)
        if by_reference(dread_weights):
            function = functools.partial(reference.content_address, eps=ctx.eps)
            return *reference_vjp(function, (memory, key, beta), (dread_weights,)), None, None
        dmemory, dkey, dbeta = _library.operators(ctx.backend).content_address_backward(
            dread_weights, memory, key, beta, read_weights, ctx.eps
        )
        return dmemory, dkey, None if beta is None else dbeta, None, None


@_check.once
def _check_tensors(memory, key, beta):
    sizes = {}
    _check.same_kind(memory=memory, key=key, beta=beta)
    _check.shape(sizes, "memory", memory, "B", "N", "W")
    _check.shape(sizes, "key", key, "B", "R", "W")
    _check.shape(sizes, "beta", beta, "B", "R")
    _check.not_empty(sizes, "N", "W", "R")


@_autocast.in_float32
def content_address(
    memory: torch.Tensor, key: torch.Tensor, beta: torch.Tensor | None = None, *, eps: float = 1e-6
) -> torch.Tensor:
    """Read weights: softmax over slots of `beta * cosine(key, memory)` (Santoro et al. 2016, eq. 2 and 3).

    Args:
        memory: [B, N, W], N slots of width W.
        key: [B, R, W], one key per head.
        beta: [B, R], key strength; None is 1, as in the paper.
        eps: inside the root, `key . row / sqrt(|key|^2 |row|^2 + eps)`: an all-zero row has similarity 0, not NaN.

    Returns:
        read_weights [B, R, N]; each head's sum to 1.

    Raises:
        TypeError: a tensor that is not floating point, or not of the dtype of the others.
        ValueError: a shape or device that does not fit.

    float32, float64 and bfloat16 (float32 arithmetic) run fused on the CPU. Differentiable twice.
    """
    _check_tensors(memory, key, beta)
    _check.eps_of_cosine(eps)
    backend = _backend.select("content_address", memory)
    if backend == "reference":
        return reference.content_address(memory, key, beta, eps=eps)
    return _ContentAddress.apply(memory, key, beta, eps, backend)
