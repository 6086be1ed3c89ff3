"""A convolution with a slow and a fast weight, and the max-pooling that follows it."""

import functools

import torch

from mann_kernels import _backend, _library, reference
from mann_kernels.ops import _autocast
from mann_kernels.ops._augment import ACTIVATION, Form, activation_of, check_layer, keeps_slopes
from mann_kernels.ops._vjp import arithmetic_dtype, by_reference, keep, kept, reference_vjp


def _output_size(x, weight, padding, pool):
    size = [n + 2 * padding - weight.shape[-1] + 1 for n in x.shape[-2:]]
    return [(n + 1) // 2 for n in size] if pool else size


def _fake_forward(x, weight, fast, mix, bias, padding, activation, pool, save):
    height, width = _output_size(x, weight, padding, pool)
    lead = x.shape[:-3]
    kept = (*([1] if x.dim() == 4 else []), *lead, height * width, weight.shape[0])
    return (
        x.new_empty(*lead, weight.shape[0], height, width),
        x.new_empty(kept if save else (0,), dtype=torch.uint8),
        x.new_empty((2, *kept) if save and keeps_slopes(activation) else (0,), dtype=arithmetic_dtype(x.dtype)),
    )


def _fake_backward(dy, x, weight, fast, mix, codes, slopes, padding, pool, need_dx):
    dmix = x.new_empty(mix.shape if mix is not None else (0,))
    dx = x.new_empty(x.shape if need_dx else (0,))
    return dx, weight.new_empty(weight.shape), fast.new_empty(fast.shape), dmix, x.new_empty(weight.shape[:1])


_library.define(
    "augmented_conv2d(Tensor x, Tensor weight, Tensor fast, Tensor? mix, Tensor? bias, int padding, int activation,"
    " bool pool, bool save) -> (Tensor y, Tensor saved_codes, Tensor saved_slopes)",
    _fake_forward,
)
_library.define(
    "augmented_conv2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor fast, Tensor? mix, Tensor saved_codes,"
    " Tensor saved_slopes, int padding, bool pool, bool need_dx)"
    " -> (Tensor dx, Tensor dweight, Tensor dfast, Tensor dmix, Tensor dbias)",
    _fake_backward,
)


#: Bits of a saved code: which of the four pixels of a window was the largest, and where the slow and the fast side let a
#: gradient through.
PIXEL_BITS, SIDE_BITS = 3, (4, 8)


def _chosen(codes, y, pool: bool, activation: str) -> dict:
    """What the forward pass chose, from its codes [G,L,P,O], as arguments of the reference; y is of the output's shape."""
    codes = codes.transpose(2, 3).reshape(y.shape)
    chosen = {"pixel": (codes & PIXEL_BITS).long()} if pool else {}
    return chosen | ({"sides": torch.stack([codes & bit != 0 for bit in SIDE_BITS])} if activation == "relu" else {})


class _AugmentedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, fast, mix, bias, padding, activation, pool, save, backend):
        """-> y; of several tasks that share one fast weight as the operator gives it, see Form."""
        form = Form(x, weight, fast, mix)
        y, codes, slopes = _library.operators(backend).augmented_conv2d(
            form.rows(x), weight, form.memory(fast), mix, bias, padding, ACTIVATION.index(activation), pool, save
        )
        keep(ctx, backend, x, weight, fast, mix, bias, codes, slopes)
        ctx.options = {"padding": padding, "activation": activation, "pool": pool}
        return y if form.joined else form.rows_back_(y, x)

    @staticmethod
    @_autocast.off
    def backward(ctx, dy):
        *inputs, codes, slopes = kept(ctx)
        if by_reference(dy):
            dy = dy.reshape(*inputs[0].shape[:-3], *dy.shape[-3:])
            chosen = _chosen(codes, dy, ctx.options["pool"], ctx.options["activation"])
            function = functools.partial(reference.augmented_conv2d, **chosen, **ctx.options)
            return *reference_vjp(function, inputs, (dy,)), *[None] * 5
        x, weight, fast, mix, bias = inputs
        form = Form(x, weight, fast, mix)
        dy = dy if form.joined else form.rows(dy)
        need_dx = ctx.needs_input_grad[0]
        dx, dweight, dfast, dmix, dbias = _library.operators(ctx.backend).augmented_conv2d_backward(
            *(dy, form.rows(x), weight, form.memory(fast), mix, codes, slopes),
            *(ctx.options["padding"], ctx.options["pool"], need_dx),
        )
        dmix, dbias = None if mix is None else dmix, None if bias is None else dbias
        dx = form.rows_back_(dx, x) if need_dx else None
        return dx, dweight, form.memory_back_(dfast), dmix, dbias, *[None] * 5


@_autocast.in_low_type
def augmented_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    fast: torch.Tensor,
    mix: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    padding: int = 1,
    form: str = "hidden",
    activation: str = "relu",
    pool: bool = False,
) -> torch.Tensor:
    """A convolution (stride 1) with a slow weight W and a fast weight F (Munkhdalai & Yu 2017, section 3.3 and eq. 9).

    The hidden form is `act(conv(x, W) + bias) + act(conv(x, F))`, the output form `conv(x, W) + bias + conv(x, F)`.

    Args:
        x: [L, C, H, W], L examples, or [G, L, C, H, W], those of G tasks.
        weight: [O, C, k, k], slow.
        fast: one weight for everything [O, C, k, k] or [1, O, C, k, k]; for each example [L, O, C, k, k]; for each task
            [G, O, C, k, k] or [G, 1, O, C, k, k]; or, with `mix`, the S rows of a memory, [S, O, C, k, k] or
            [G, S, O, C, k, k]: as in augmented_linear.
            Rows may be slices of a larger memory [G, S, P] (contiguous in O, C, k, k): they are not copied.
        mix: [L, S] or [G, L, S]: the fast weight of example l is sum_s mix[l, s] fast[s], as in augmented_linear.
            On the CPU and in Triton the fast weights of the examples, [L, O, C, k, k], are never built; in CUDA those of as
            many tasks at a time as take 32 MB, of one at least.
        bias: [O], slow.
        padding: zeros on each side.
        form: "hidden" or "output".
        activation: "relu", "gelu" (with the error function), "tanh" or "identity"; the output form has none.
        pool: take the maximum of every 2 x 2 pixels of the sum, with stride 2, in ceil mode (28, 14, 7, 4, 2, 1); of
            equal ones the first, as torch does.

    Returns:
        [L, O, H', W'] or [G, L, O, H', W'] with H' = H + 2*padding - k + 1, halved and rounded up by `pool`.

    Raises:
        TypeError: a tensor that is not floating point, or not of the dtype of the others; a padding that is not an int.
        ValueError: a shape, device or option that does not fit; a kernel larger than the padded image.

    Kept for the backward pass, beside the inputs: a byte per output number (with gelu and tanh also two slopes), which
    says which pixel was the largest and which side was above zero. Differentiable twice.
    """
    function = activation_of(form, activation)
    check_layer(x, weight, fast, mix, bias, ("O", "C", "k", "k"), ("C", "H", "W"))
    if not isinstance(padding, int) or isinstance(padding, bool):
        raise TypeError(f"padding: got {type(padding).__name__}, want an int")
    if padding < 0 or min(x.shape[-2:]) + 2 * padding < weight.shape[-1]:
        raise ValueError(
            f"padding: got {padding}, want at least 0, and an image [{x.shape[-2]}, {x.shape[-1]}] that with it is at least as"
            f" large as the kernel, {weight.shape[-1]}"
        )
    backend = _backend.select("augmented_conv2d", x)
    if backend == "reference":
        return reference.augmented_conv2d(x, weight, fast, mix, bias, padding=padding, activation=function, pool=pool)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, fast, mix, bias))
    y = _AugmentedConv2d.apply(x, weight, fast, mix, bias, padding, function, bool(pool), save, backend)
    return y if y.shape[:-3] == x.shape[:-3] else y.view(*x.shape[:-3], *y.shape[1:])
