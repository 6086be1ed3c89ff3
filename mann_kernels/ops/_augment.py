"""What the two augmented layers share: the forms in which fast weights come, brought to one, and the options."""

from mann_kernels.ops import _check

FORM = ("hidden", "output")
ACTIVATION = ("relu", "gelu", "tanh", "identity")


def activation_number(form: str, activation: str) -> int:
    """The operators take a number. slow + fast, the output form, is the hidden form without an activation."""
    _check.choice("form", form, *FORM)
    _check.choice("activation", activation, *ACTIVATION)
    return ACTIVATION.index("identity" if form == "output" else activation)


def keeps_slopes(activation: int) -> bool:
    """Whether the derivative at a point is more than a bit."""
    return ACTIVATION[activation] in ("gelu", "tanh")


def canonical(x, weight, fast, mix, bias, layer: tuple[str, ...], example: tuple[str, ...]):
    """Checks the tensors of a layer whose weight has the sizes `layer` and whose examples have the sizes `example`.

    Returns x [G,L,...], fast [G,S,...], mix [G,L,S] or None (S = 1): views, but for an x that cannot be one.
    """
    sizes: dict[str, int] = {}
    _check.same_kind(x=x, weight=weight, fast=fast, mix=mix, bias=bias)
    _check.shape(sizes, "weight", weight, *layer)
    tasks = x.dim() == len(example) + 2
    lead = ("G", "L") if tasks else ("L",)
    _check.shape(sizes, "x", x, *lead, *example)
    _check.shape(sizes, "bias", bias, "O")
    if mix is not None:
        _check.shape(sizes, "mix", mix, *lead, "S")
        _check.shape(sizes, "fast", fast, *lead[:-1], "S", *layer)
    else:
        _check.shape(sizes, "fast", fast, *(lead[:1] if fast.dim() > weight.dim() else ()), *layer)
    for letter in (*layer, "S"):
        if sizes.get(letter, 1) < 1:
            raise ValueError(f"an augmented layer needs at least one of each size: got {letter}=0")
    if mix is not None:
        return (x, fast, mix) if tasks else (x[None], fast[None], mix[None])
    if fast.dim() == weight.dim():
        return (x.flatten(0, 1) if tasks else x)[None], fast[None, None], None
    return x if tasks else x[:, None], fast[:, None], None


def of_canonical(reference, **options):
    """A reference as a function of the canonical tensors: without a mixture, the S = 1 fast weight is that of the task."""

    def function(x, weight, fast, mix, bias):
        return reference(x, weight, fast.squeeze(1) if mix is None else fast, mix, bias, **options)

    return function
