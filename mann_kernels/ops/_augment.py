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


def one_row(x, weight, fast) -> bool:
    """Whether fast, without a mixture, is the one row of a memory, [1, ...] or [G, 1, ...], for all examples of a task."""
    dim = fast.dim() - weight.dim()
    return dim == x.dim() + 1 - weight.dim() and fast.shape[dim - 1] == 1


@_check.once
def check_layer(x, weight, fast, mix, bias, layer: tuple[str, ...], example: tuple[str, ...]) -> None:
    """The tensors of a layer whose weight has the sizes `layer` and whose examples have the sizes `example`."""
    sizes = {"1": 1}
    _check.same_kind(x=x, weight=weight, fast=fast, mix=mix, bias=bias)
    _check.shape(sizes, "weight", weight, *layer)
    lead = ("G", "L") if x.dim() == len(example) + 2 else ("L",)
    _check.shape(sizes, "x", x, *lead, *example)
    _check.shape(sizes, "bias", bias, "O")
    if mix is not None:
        _check.shape(sizes, "mix", mix, *lead, "S")
        _check.shape(sizes, "fast", fast, *lead[:-1], "S", *layer)
    elif one_row(x, weight, fast):
        _check.shape(sizes, "fast", fast, *lead[:-1], "1", *layer)
    else:
        _check.shape(sizes, "fast", fast, *(lead[:1] if fast.dim() > weight.dim() else ()), *layer)
    for letter in (*layer, "S"):
        if sizes.get(letter, 1) < 1:
            raise ValueError(f"an augmented layer needs at least one of each size: got {letter}=0")


class Form:
    """How the operators take a layer: x [G, L, ...], fast [G, S, ...] and mix [G, L, S] or None, and then S = 1. With one task
    all of them may lack G.

    What goes in is a view, but for an x of several tasks that share one fast weight where it cannot be one. What comes out, `y`
    and the gradients, loses the dimension that its own had not, in place: it would otherwise be a view, which cannot be written
    to, and a node of its own in the graph.
    """

    def __init__(self, x, weight, fast, mix):
        tasks = x.dim() == weight.dim() + 1
        shared = mix is None and fast.dim() == weight.dim()
        rows = mix is not None or one_row(x, weight, fast)
        #: One fast weight for the examples of all tasks, which are taken as those of one.
        self.joined = shared and tasks
        #: Each example is a task of its own.
        self.alone = not rows and not shared and not tasks
        #: Where S is put into fast.
        self.of_fast = None if rows else 0 if shared else 1

    def rows(self, x):
        """x, or the gradient of y."""
        return x.flatten(0, 1) if self.joined else x.unsqueeze(1) if self.alone else x

    def memory(self, fast):
        return fast if self.of_fast is None else fast.unsqueeze(self.of_fast)

    def rows_back_(self, y, x):
        """y, or the gradient of x."""
        return y.view(*x.shape[:2], *y.shape[1:]) if self.joined else y.squeeze_(1) if self.alone else y

    def memory_back_(self, dfast):
        return dfast if self.of_fast is None else dfast.squeeze_(self.of_fast)
