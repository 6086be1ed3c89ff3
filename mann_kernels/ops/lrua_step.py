"""One time step of the memory: write, then read, in one pass over the slots."""

import functools

import torch

from mann_kernels import _backend, _library, reference
from mann_kernels.ops import _autocast, _check
from mann_kernels.ops._vjp import by_reference, keep, kept, reference_vjp

_library.define(
    "lrua_step(Tensor memory, Tensor usage, Tensor read_weights, Tensor key, Tensor gate, Tensor? beta, Tensor? add,"
    " bool shared, bool erase_all, float decay, float eps)"
    " -> (Tensor reads, Tensor memory1, Tensor usage1, Tensor read_weights1, Tensor least_used)",
    lambda memory, usage, read_weights, key, gate, beta, add, shared, erase_all, decay, eps: (
        key.new_empty(key.shape),
        memory.new_empty(memory.shape),
        usage.new_empty(usage.shape),
        read_weights.new_empty(read_weights.shape),
        gate.new_empty(gate.shape, dtype=torch.int32),
    ),
)
_library.define(
    "lrua_step_backward(Tensor dreads, Tensor? dmemory1, Tensor? dread_weights1, Tensor memory, Tensor read_weights,"
    " Tensor key, Tensor gate, Tensor? beta, Tensor? add, Tensor least_used, bool shared, bool erase_all, float eps)"
    " -> (Tensor dmemory, Tensor dread_weights, Tensor dkey, Tensor dgate, Tensor dbeta, Tensor dadd)",
    lambda dreads, dmemory1, dread_weights1, memory, read_weights, key, gate, beta, add, least_used, *_: (
        memory.new_empty(memory.shape),
        read_weights.new_empty(read_weights.shape),
        key.new_empty(key.shape),
        gate.new_empty(gate.shape),
        gate.new_empty(gate.shape if beta is not None else (0,)),
        key.new_empty(key.shape if add is not None else (0,)),
    ),
)


class _LruaStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, memory, usage, read_weights, key, gate, beta, add, lru, erase, decay, eps, backend):
        reads, memory1, usage1, read_weights1, least_used = _library.operators(backend).lrua_step(
            memory, usage, read_weights, key, gate, beta, add, lru == "shared", erase == "all", decay, eps
        )
        ctx.mark_non_differentiable(usage1)
        ctx.set_materialize_grads(False)
        keep(ctx, backend, memory, usage, read_weights, key, gate, beta, add, least_used)
        ctx.options = {"lru": lru, "erase": erase, "decay": decay, "eps": eps}
        return reads, memory1, usage1, read_weights1

    @staticmethod
    @_autocast.off
    def backward(ctx, dreads, dmemory1, _, dread_weights1):
        *inputs, least_used = kept(ctx)
        memory, _, read_weights, key, gate, beta, add = inputs
        options = ctx.options
        if by_reference(dreads, dmemory1, dread_weights1):
            function = functools.partial(reference.lrua_step, least_used=least_used, **options)
            return *reference_vjp(function, inputs, (dreads, dmemory1, None, dread_weights1)), *[None] * 5
        dmemory, dread_weights, dkey, dgate, dbeta, dadd = _library.operators(ctx.backend).lrua_step_backward(
            torch.zeros_like(key) if dreads is None else dreads,
            *(dmemory1, dread_weights1, memory, read_weights, key, gate, beta, add, least_used),
            *(options["lru"] == "shared", options["erase"] == "all", options["eps"]),
        )
        dbeta, dadd = None if beta is None else dbeta, None if add is None else dadd
        return dmemory, None, dread_weights, dkey, dgate, dbeta, dadd, *[None] * 5


@_autocast.in_float32
def lrua_step(
    memory: torch.Tensor,
    usage: torch.Tensor,
    read_weights: torch.Tensor,
    key: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    *,
    lru: str = "per_head",
    erase: str = "least",
    decay: float = 0.99,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of the memory: choose, erase, write, then address and read (Santoro et al. 2016, eq. 2 to 8).

    Args:
        memory: [B, N, W], usage: [B, N], read_weights: [B, R, N]: the state after the previous step.
        key: [B, R, W], what each head looks for, and what it writes unless `add` is given.
        gate: [B, R], before its sigmoid.
        beta: [B, R], key strength; None is 1, as in the paper.
        add: [B, R, W], a separate vector to write; None writes the key, as in the paper.
        lru: "per_head" or "shared", see lrua_write_weights.
        erase: "least" or "all", see memory_update.
        decay: of the usage (gamma of eq. 5); the paper has 0.99.
        eps: see content_address.

    Returns:
        reads [B, R, W], memory, usage, read_weights after this step. No gradient flows through usage.

    Raises:
        TypeError: a tensor that is not floating point, or not of the dtype of the others.
        ValueError: a shape, device or option that does not fit; more heads than slots.
    """
    check_tensors(memory, usage, read_weights, key, gate, beta, add)
    check_options(lru, erase, decay, eps)
    options = {"lru": lru, "erase": erase, "decay": decay, "eps": eps}
    backend = _backend.select("lrua_step", memory)
    if backend == "reference":
        return reference.lrua_step(memory, usage, read_weights, key, gate, beta, add, **options)
    return _LruaStep.apply(memory, usage, read_weights, key, gate, beta, add, *options.values(), backend)


@_check.once
def check_tensors(memory, usage, read_weights, key, gate, beta, add, steps: tuple[str, ...] = ()) -> None:
    """The tensors of one step, or with a dimension before B of `steps`, fit each other."""
    sizes: dict[str, int] = {}
    _check.same_kind(memory=memory, usage=usage, read_weights=read_weights, key=key, gate=gate, beta=beta, add=add)
    check_state(sizes, memory, usage, read_weights)
    _check.shape(sizes, "key", key, *steps, "B", "R", "W")
    _check.shape(sizes, "gate", gate, *steps, "B", "R")
    _check.shape(sizes, "beta", beta, *steps, "B", "R")
    _check.shape(sizes, "add", add, *steps, "B", "R", "W")


def check_state(sizes: dict[str, int], memory, usage, read_weights) -> None:
    """The state of the memory has fitting shapes, and a slot for each head."""
    _check.shape(sizes, "memory", memory, "B", "N", "W")
    _check.shape(sizes, "usage", usage, "B", "N")
    _check.shape(sizes, "read_weights", read_weights, "B", "R", "N")
    _check.not_empty(sizes, "N", "W", "R")
    _check.heads_fit(sizes)


def check_options(lru: str, erase: str, decay: float, eps: float) -> None:
    """The options that every memory operator shares."""
    _check.known_options(lru=lru, erase=erase)
    _check.number("decay", decay, 0, 1)
    _check.eps_of_cosine(eps)
