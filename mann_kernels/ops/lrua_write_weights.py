"""Least-recently-used write weights: exactly R least-used slots, and the gated write weights."""

import functools

import torch

from mann_kernels import _backend, _library, reference
from mann_kernels.ops import _autocast, _check
from mann_kernels.ops._vjp import by_reference, keep, kept, reference_vjp

_library.define(
    "lrua_write_weights(Tensor usage, Tensor read_weights, Tensor gate, bool shared)"
    " -> (Tensor write_weights, Tensor least_used)",
    lambda usage, read_weights, gate, shared: (
        read_weights.new_empty(read_weights.shape),
        gate.new_empty(gate.shape, dtype=torch.int32),
    ),
)
_library.define(
    "lrua_write_weights_backward(Tensor dwrite_weights, Tensor read_weights, Tensor gate, Tensor least_used, bool shared)"
    " -> (Tensor dread_weights, Tensor dgate)",
    lambda dwrite_weights, read_weights, gate, least_used, shared: (
        read_weights.new_empty(read_weights.shape),
        gate.new_empty(gate.shape),
    ),
)


class _LruaWriteWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, usage, read_weights, gate, lru, backend):
        write_weights, least_used = _library.operators(backend).lrua_write_weights(
            usage, read_weights, gate, lru == "shared"
        )
        ctx.mark_non_differentiable(least_used)
        keep(ctx, backend, usage, read_weights, gate, least_used)
        ctx.lru = lru
        return write_weights, least_used

    @staticmethod
    @_autocast.off
    def backward(ctx, dwrite_weights, _):
        usage, read_weights, gate, least_used = kept(ctx)
        if by_reference(dwrite_weights):
            function = functools.partial(reference.lrua_write_weights, lru=ctx.lru, least_used=least_used)
            return *reference_vjp(function, (usage, read_weights, gate), (dwrite_weights, None)), None, None
        dread_weights, dgate = _library.operators(ctx.backend).lrua_write_weights_backward(
            dwrite_weights, read_weights, gate, least_used, ctx.lru == "shared"
        )
        return None, dread_weights, dgate, None, None


@_check.once
def _check_tensors(usage, read_weights, gate):
    sizes = {}
    _check.same_kind(usage=usage, read_weights=read_weights, gate=gate)
    _check.shape(sizes, "usage", usage, "B", "N")
    _check.shape(sizes, "read_weights", read_weights, "B", "R", "N")
    _check.shape(sizes, "gate", gate, "B", "R")
    _check.not_empty(sizes, "N", "R")
    _check.heads_fit(sizes)


@_autocast.in_float32
def lrua_write_weights(
    usage: torch.Tensor, read_weights: torch.Tensor, gate: torch.Tensor, *, lru: str = "per_head"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write weights between where was read last and what is least used (Santoro et al. 2016, eq. 6 and 7).

    Args:
        usage: [B, N], of the previous step. It only chooses slots: no gradient reaches it.
        read_weights: [B, R, N], of the previous step.
        gate: [B, R], the interpolation gate before its sigmoid.
        lru: "per_head", head h writes to the h-th least-used slot; "shared", every head to all R of them.

    Returns:
        write_weights [B, R, N], and least_used int32 [B, R]: exactly R slots in ascending usage, ties to the lowest
        index, NaN counted as the largest.

    Raises:
        TypeError: a tensor that is not floating point, or not of the dtype of the others.
        ValueError: a shape, device or option that does not fit; more heads than slots.
    """
    _check_tensors(usage, read_weights, gate)
    _check.known_options(lru=lru)
    backend = _backend.select("lrua_write_weights", usage)
    if backend == "reference":
        return reference.lrua_write_weights(usage, read_weights, gate, lru=lru)
    return _LruaWriteWeights.apply(usage, read_weights, gate, lru, backend)
