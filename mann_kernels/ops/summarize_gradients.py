"""MetaNet's d: gradient preprocessing and an LSTM over the support gradients at every coordinate."""

import functools

import torch

from mann_kernels import _backend, _library, reference
from mann_kernels.ops import _autocast, _check
from mann_kernels.ops._vjp import by_reference, keep, kept, reference_vjp
from mann_kernels.ops.generate_fast_weights import sides_of_kernel

WEIGHTS = "Tensor weight_ih, Tensor weight_hh, Tensor bias, Tensor weight_out, Tensor bias_out"

_library.define(
    f"summarize_gradients(Tensor grads, {WEIGHTS}, float p) -> Tensor",
    lambda grads, *rest: grads.new_empty(grads.shape[1:]),
)
_library.define(
    f"summarize_gradients_backward(Tensor dfast, Tensor grads, {WEIGHTS}, float p)"
    " -> (Tensor dgrads, Tensor dweight_ih, Tensor dweight_hh, Tensor dbias, Tensor dweight_out, Tensor dbias_out)",
    lambda dfast, *inputs: tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:-1]),
)


class _SummarizeGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *inputs, p, backend = arguments
        ctx.p = p
        keep(ctx, backend, *inputs)
        return _library.operators(backend).summarize_gradients(*inputs, p)

    @staticmethod
    @_autocast.off
    def backward(ctx, dfast):
        inputs = kept(ctx)
        if by_reference(dfast):
            none = [inputs[0].new_empty(shape) for shape in ((0, 2), (0,), (0, 0), (0,))]
            sides = sides_of_kernel(ctx.backend, inputs[0], none, ctx.p)
            function = functools.partial(reference.summarize_gradients, p=ctx.p, sides=sides)
            return *reference_vjp(function, inputs, (dfast,)), None, None
        return *_library.operators(ctx.backend).summarize_gradients_backward(dfast, *inputs, ctx.p), None, None


@_check.once
def _check_tensors(grads, weight_ih, weight_hh, bias, weight_out, bias_out):
    _check.same_kind(
        grads=grads, weight_ih=weight_ih, weight_hh=weight_hh, bias=bias, weight_out=weight_out, bias_out=bias_out
    )
    if grads.dim() == 0 or grads.shape[0] == 0:
        raise ValueError(f"grads: got shape {list(grads.shape)}, want [T, ...] with at least one support gradient (T)")
    sizes = {"1": 1, "2": 2}
    _check.shape(sizes, "weight_out", weight_out, "1", "D")
    _check.shape(sizes, "bias_out", bias_out, "1")
    _check.not_empty(sizes, "D")
    sizes["4D"] = 4 * sizes["D"]
    _check.shape(sizes, "weight_ih", weight_ih, "4D", "2")
    _check.shape(sizes, "weight_hh", weight_hh, "4D", "D")
    _check.shape(sizes, "bias", bias, "4D")


@_autocast.in_float32
def summarize_gradients(
    grads: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias: torch.Tensor,
    weight_out: torch.Tensor,
    bias_out: torch.Tensor,
    *,
    p: float = 7.0,
) -> torch.Tensor:
    """MetaNet's d: one fast weight from T support gradients, at every coordinate (Munkhdalai and Yu 2017, eq. 4, appendix A).

    Each element becomes the two features of `generate_fast_weights`. An LSTM of D units, which all coordinates share, runs
    over the T support examples from a zero state; a linear layer reads its last hidden state.

    Args:
        grads: [T, ...]: T support gradients first, T >= 1; every element of the rest is one coordinate.
        weight_ih: [4D, 2], weight_hh: [4D, D], bias: [4D], gates in the order of nn.LSTM (input, forget, cell, output);
            D is 20 in the paper.
        weight_out: [1, D], bias_out: [1].
        p: where gradients count as small, at e^-p; in (0, 80].

    Returns:
        the fast weights, of the shape [...] of one gradient.

    Raises:
        TypeError: a tensor that is not floating point, or not of the dtype of the others.
        ValueError: a shape, device or p that does not fit.

    Differentiable twice, grads included. The backward pass computes the states again: only the inputs are kept. Weight
    gradients are sums over all coordinates in one fixed order, so they repeat bit for bit.
    """
    weights = (weight_ih, weight_hh, bias, weight_out, bias_out)
    _check_tensors(grads, *weights)
    _check.preprocessing(p)
    backend = _backend.select("summarize_gradients", grads)
    if backend == "reference":
        return reference.summarize_gradients(grads, *weights, p=p)
    return _SummarizeGradients.apply(grads, *weights, p, backend)
