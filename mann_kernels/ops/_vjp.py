"""Second order: the vector-Jacobian product of a reference, itself differentiable."""

import torch

from mann_kernels import _backend

#: A tensor of no numbers whose shape says which implementation ran.
_MARKS = {name: torch.empty(0, n, device="cpu") for n, name in enumerate(_backend.NAMES)}


def keep(ctx, backend: str, *tensors) -> None:
    """Save tensors for the backward pass, and which implementation ran.

    The name goes with the tensors: torch.utils.checkpoint, which recomputes the forward pass, refuses saved tensors of other
    shapes than the first time. So what it took again on another implementation, which breaks ties in another way, is an error.
    """
    ctx.backend, ctx.marked = backend, not torch.compiler.is_compiling()
    ctx.save_for_backward(*tensors, *([_MARKS[backend]] if ctx.marked else []))


def kept(ctx) -> tuple:
    """The tensors of `keep`. Each look unpacks them all."""
    return ctx.saved_tensors[:-1] if ctx.marked else ctx.saved_tensors


def by_reference(*grads: torch.Tensor | None) -> bool:
    """Whether a backward pass is to be differentiated in turn, or is under a transform that the kernels have no rules for.

    grads: of the outputs. torch.autograd's own batches (is_grads_batched, vectorize) show in them alone.
    """
    if torch.is_grad_enabled() or _backend.transformed():
        return True
    if torch.compiler.is_compiling():
        return False
    for grad in grads:  # noqa: SIM110 (any() takes longer than what it asks)
        if grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad):
            return True
    return False


def reference_vjp(function, inputs, output_grads):
    """Gradients of `function(*inputs)` weighted by output_grads, with a graph where gradients are enabled.

    function: a reference that is given every choice which the forward pass has made (slots, pixels, the sides of a ReLU or a
    clamp): its own sums round in another way, and would break ties in another way.
    inputs: tensors or None; output_grads: one per output, None for "no gradient". Returns one gradient (or None) per input.
    Each input enters under a fresh name (a view), so that one input which was computed from another does not send its
    gradient there a second time. The 16-bit types are computed in float32, as the kernels do.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        outputs = function(*(None if alias is None else alias.to(arithmetic_dtype(alias.dtype)) for alias in aliases))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [
        (output, grad.to(output.dtype))
        for output, grad in zip(outputs, output_grads, strict=True)
        if grad is not None and output.requires_grad
    ]
    wanted = [i for i, tensor in enumerate(aliases) if tensor is not None and tensor.requires_grad]
    result = [None] * len(inputs)
    if pairs and wanted:
        grads = torch.autograd.grad(
            [output for output, _ in pairs],
            [aliases[i] for i in wanted],
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
        for i, grad in zip(wanted, grads, strict=True):
            result[i] = grad
    return tuple(result)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel computes in, and saves in: float32 for the 16-bit types."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
