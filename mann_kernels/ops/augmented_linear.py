"""A fully connected layer with a slow and a fast weight."""

import functools

import torch

from mann_kernels import _backend, _library, reference
from mann_kernels.ops import _autocast
from mann_kernels.ops._augment import ACTIVATION, Form, activation_of, check_layer
from mann_kernels.ops._vjp import arithmetic_dtype, by_reference, keep, kept, reference_vjp


def _fake_forward(x, weight, fast, mix, bias, activation, save):
    shape = (*x.shape[:-1], weight.shape[0])
    kept = (2, *([1] if x.dim() == 2 else []), *shape) if save and ACTIVATION[activation] != "identity" else (0,)
    return x.new_empty(shape), x.new_empty(kept, dtype=arithmetic_dtype(x.dtype))


def _fake_backward(dy, x, weight, fast, mix, slopes):
    dmix = x.new_empty(mix.shape if mix is not None else (0,))
    grads = (tensor.new_empty(tensor.shape) for tensor in (x, weight, fast))
    return *grads, dmix, x.new_empty(weight.shape[:1])


_library.define(
    "augmented_linear(Tensor x, Tensor weight, Tensor fast, Tensor? mix, Tensor? bias, int activation, bool save)"
    " -> (Tensor y, Tensor saved_slopes)",
    _fake_forward,
)
_library.define(
    "augmented_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor fast, Tensor? mix, Tensor saved_slopes)"
    " -> (Tensor dx, Tensor dweight, Tensor dfast, Tensor dmix, Tensor dbias)",
    _fake_backward,
)


class _AugmentedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, fast, mix, bias, activation, save, backend):
        """-> y; of several tasks that share one fast weight as the operator gives it, see Form."""
        form = Form(x, weight, fast, mix)
        y, slopes = _library.operators(backend).augmented_linear(
            form.rows(x), weight, form.memory(fast), mix, bias, ACTIVATION.index(activation), save
        )
        keep(ctx, backend, x, weight, fast, mix, bias, slopes)
        ctx.activation = activation
        return y if form.joined else form.rows_back_(y, x)

    @staticmethod
    @_autocast.off
    def backward(ctx, dy):
        *inputs, slopes = kept(ctx)
        if by_reference(dy):
            dy = dy.reshape(*inputs[0].shape[:-1], dy.shape[-1])
            sides = (slopes != 0).view(2, *dy.shape) if ctx.activation == "relu" else None
            function = functools.partial(reference.augmented_linear, activation=ctx.activation, sides=sides)
            return *reference_vjp(function, inputs, (dy,)), None, None, None
        x, weight, fast, mix, bias = inputs
        form = Form(x, weight, fast, mix)
        dx, dweight, dfast, dmix, dbias = _library.operators(ctx.backend).augmented_linear_backward(
            dy if form.joined else form.rows(dy), form.rows(x), weight, form.memory(fast), mix, slopes
        )
        dmix, dbias = None if mix is None else dmix, None if bias is None else dbias
        return form.rows_back_(dx, x), dweight, form.memory_back_(dfast), dmix, dbias, None, None, None


@_autocast.in_low_type
def augmented_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    fast: torch.Tensor,
    mix: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    form: str = "hidden",
    activation: str = "relu",
) -> torch.Tensor:
    """A fully connected layer with a slow weight W and a fast weight F (Munkhdalai & Yu 2017, section 3.3 and eq. 9).

    The hidden form is `act(x W^T + bias) + act(x F^T)`, the output form `x W^T + bias + x F^T`.

    Args:
        x: [L, I], L examples, or [G, L, I], those of G tasks.
        weight: [O, I], slow.
        fast: one weight for everything [O, I] or, of x [L, I], [1, O, I]; for each example [L, O, I], of x [L, I]; for each
            task [G, O, I] or [G, 1, O, I], of x [G, L, I]; or, with `mix`, the S rows of a memory, [S, O, I] for x [L, I] or
            [G, S, O, I] for x [G, L, I].
            Rows may be slices of a larger memory [G, S, P] (contiguous in O and I): they are not copied.
        mix: [L, S] or [G, L, S]: the fast weight of example l is sum_s mix[l, s] fast[s]. In MetaNet the softmax of
            cosine similarities, as content_address gives it. The weight of an example is never built.
        bias: [O], slow.
        form: "hidden" or "output".
        activation: "relu", "gelu" (with the error function), "tanh" or "identity"; the output form has none.

    Returns:
        [L, O] or [G, L, O].

    Raises:
        TypeError: a tensor that is not floating point, or not of the dtype of the others.
        ValueError: a shape, device or option that does not fit.

    Kept for the backward pass, beside the inputs: two slopes of the activation per output number. Differentiable twice.
    """
    function = activation_of(form, activation)
    check_layer(x, weight, fast, mix, bias, ("O", "I"), ("I",))
    backend = _backend.select("augmented_linear", x)
    if backend == "reference":
        return reference.augmented_linear(x, weight, fast, mix, bias, activation=function)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, fast, mix, bias))
    y = _AugmentedLinear.apply(x, weight, fast, mix, bias, function, save, backend)
    return y if y.shape[:-1] == x.shape[:-1] else y.view(*x.shape[:-1], weight.shape[0])
