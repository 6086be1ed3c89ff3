"""Second order: the vector-Jacobian product of a reference, itself differentiable."""

import torch


def reference_vjp(function, inputs, output_grads):
    """Gradients of `function(*inputs)` weighted by output_grads, with a graph.

    inputs: tensors or None; output_grads: one per output, None for "no gradient". Returns one gradient (or None) per input.
    Each input enters under a fresh name (a view), so that one input which was computed from another does not send its
    gradient there a second time.
    """
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    outputs = function(*aliases)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [
        (output, grad)
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
            create_graph=True,
            allow_unused=True,
        )
        for i, grad in zip(wanted, grads, strict=True):
            result[i] = grad
    return tuple(result)
