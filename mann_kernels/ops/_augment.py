"""The forms in which fast weights come, and how the two augmented layers' operators take them."""

from mann_kernels.ops import _check

ACTIVATION = _check.OPTIONS["activation"]


def activation_of(form: str, activation: str) -> str:
    """slow + fast, the output form, is the hidden form without an activation. The operators take its place in ACTIVATION."""
    _check.known_options(form=form, activation=activation)
    return "identity" if form == "output" else activation


def keeps_slopes(activation: int) -> bool:
    """Whether the derivative at a point is more than a bit."""
    return ACTIVATION[activation] in ("gelu", "tanh")


def check_layer(x, weight, fast, mix, bias, layer: tuple[str, ...], example: tuple[str, ...]) -> None:
    """The tensors of a layer whose weight has the sizes `layer` and whose examples have the sizes `example`."""
    sizes: dict[str, int] = {}
    _check.same_kind(x=x, weight=weight, fast=fast, mix=mix, bias=bias)
    _check.shape(sizes, "weight", weight, *layer)
    lead = ("G", "L") if x.dim() == len(example) + 2 else ("L",)
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


def canonical(x, weight, fast, mix, tasks: bool):
    """x [G,L,...], fast [G,S,...] and mix [G,L,S] (or None, then S = 1) of the operators: views, but for an x that cannot be one.

    tasks: whether x has a dimension of tasks.
    """
    if mix is not None:
        return (x, fast, mix) if tasks else (x.unsqueeze(0), fast.unsqueeze(0), mix.unsqueeze(0))
    if fast.dim() == weight.dim():
        return (x.flatten(0, 1) if tasks else x).unsqueeze(0), fast.unsqueeze(0).unsqueeze(0), None
    return x if tasks else x.unsqueeze(1), fast.unsqueeze(1), None
