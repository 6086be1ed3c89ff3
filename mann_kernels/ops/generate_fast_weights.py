"""MetaNet's m: gradient preprocessing and a three-layer network at every coordinate."""

import functools

import torch

from mann_kernels import _backend, _library, reference
from mann_kernels.ops import _autocast, _check
from mann_kernels.ops._vjp import arithmetic_dtype, by_reference, keep, kept, reference_vjp
from mann_kernels.reference.generate_fast_weights import hidden_units, raw_features

FIRST_WEIGHTS = "Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2"
WEIGHTS = f"{FIRST_WEIGHTS}, Tensor weight3, Tensor bias3"

_library.define(
    f"generate_fast_weights(Tensor grads, {WEIGHTS}, float p) -> Tensor",
    lambda grads, *rest: grads.new_empty(grads.shape),
)
_library.define(
    f"generate_fast_weights_backward(Tensor dfast, Tensor grads, {WEIGHTS}, float p)"
    " -> (Tensor dgrads, Tensor dweight1, Tensor dbias1, Tensor dweight2, Tensor dbias2, Tensor dweight3, Tensor dbias3)",
    lambda dfast, *inputs: tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:-1]),
)


def _sides_of_reference(grads, *weights_and_p):
    """generate_fast_weights_sides where a device has the other kernels but not this one."""
    *weights, p = weights_and_p
    grads, *weights = (tensor.to(arithmetic_dtype(tensor.dtype)) for tensor in (grads, *weights))
    magnitude, sign = raw_features(grads, p)
    hidden = hidden_units(grads, *weights, p=p)
    passes = [torch.stack([magnitude >= -1, sign.abs() <= 1]), *(~(units <= 0).t() for units in hidden)]
    return torch.cat(passes).to(torch.uint8)


_library.define(
    f"generate_fast_weights_sides(Tensor grads, {FIRST_WEIGHTS}, float p) -> Tensor",
    lambda grads, weight1, bias1, *rest: grads.new_empty(2 + 2 * len(bias1), len(grads), dtype=torch.uint8),
    default=_sides_of_reference,
)


def sides_of_kernel(backend: str, grads, weights, p: float) -> torch.Tensor:
    """bool [2 + 2*D, *grads.shape]: where the kernels let a gradient pass, as arguments of the reference; they keep no such thing.

    weights: the first four of generate_fast_weights; with D = 0 the features alone.
    """
    sides = _library.operators(backend).generate_fast_weights_sides(grads.flatten(), *weights, p)
    return sides.bool().unflatten(1, grads.shape)


class _GenerateFastWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *inputs, p, backend = arguments
        ctx.p = p
        keep(ctx, backend, *inputs)
        return _library.operators(backend).generate_fast_weights(*inputs, p)

    @staticmethod
    @_autocast.off
    def backward(ctx, dfast):
        inputs = kept(ctx)
        if by_reference(dfast):
            sides = sides_of_kernel(ctx.backend, inputs[0], inputs[1:5], ctx.p)
            function = functools.partial(reference.generate_fast_weights, p=ctx.p, sides=sides)
            return *reference_vjp(function, inputs, (dfast,)), None, None
        return *_library.operators(ctx.backend).generate_fast_weights_backward(dfast, *inputs, ctx.p), None, None


@_check.once
def _check_tensors(grads, weight1, bias1, weight2, bias2, weight3, bias3):
    _check.same_kind(
        grads=grads, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2, weight3=weight3, bias3=bias3
    )
    sizes = {"1": 1, "2": 2}
    _check.shape(sizes, "weight1", weight1, "D", "2")
    _check.shape(sizes, "bias1", bias1, "D")
    _check.shape(sizes, "weight2", weight2, "D", "D")
    _check.shape(sizes, "bias2", bias2, "D")
    _check.shape(sizes, "weight3", weight3, "1", "D")
    _check.shape(sizes, "bias3", bias3, "1")
    _check.not_empty(sizes, "D")


@_autocast.in_float32
def generate_fast_weights(
    grads: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    weight3: torch.Tensor,
    bias3: torch.Tensor,
    *,
    p: float = 7.0,
) -> torch.Tensor:
    """MetaNet's m: a fast weight from every gradient element by itself (Munkhdalai and Yu 2017, eq. 1 and appendix A).

    Each element g becomes the pair `max(log(|g| + eps) / p, -1), clip(g * e^p, -1, 1)` (Andrychowicz et al. 2016,
    appendix A), which goes through a network of two hidden layers of D units with ReLU. All elements share it.

    Args:
        grads: any shape; every element is one coordinate.
        weight1: [D, 2], bias1: [D], weight2: [D, D], bias2: [D], weight3: [1, D], bias3: [1]; D is 20 in the paper.
        p: where gradients count as small, at e^-p; in (0, 80]. eps is that of float32, in float64 too.

    Returns:
        the fast weights, of the shape of grads.

    Raises:
        TypeError: a tensor that is not floating point, or not of the dtype of the others.
        ValueError: a shape, device or p that does not fit.

    Differentiable twice, grads included. The backward pass computes the hidden layers again: only the inputs are kept.
    Weight gradients are sums over all coordinates in one fixed order, so they repeat bit for bit.
    """
    weights = (weight1, bias1, weight2, bias2, weight3, bias3)
    _check_tensors(grads, *weights)
    _check.preprocessing(p)
    backend = _backend.select("generate_fast_weights", grads)
    if backend == "reference":
        return reference.generate_fast_weights(grads, *weights, p=p)
    return _GenerateFastWeights.apply(grads, *weights, p, backend)
