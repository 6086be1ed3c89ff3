"""How the work of an operator is counted from its shape: floating-point operations of its products, bytes that must go in and out.

Both are lower bounds. Products are matrix products and convolutions by the cheapest way known, a multiply-add counted as two;
what is not a product is left out. Bytes are every input read once and every result written once, as if nothing else ever left
the caches.
"""

from collections.abc import Collection
from typing import NamedTuple

#: What a slot's number takes, whatever the dtype.
INDEX_BYTES = 4


class Work(NamedTuple):
    """Floating-point operations and bytes of one pass."""

    flops: int
    bytes: int


class Product(NamedTuple):
    """A product of two tensors, done `times` times."""

    times: int
    multiply_adds: int
    #: How many of its factors have a gradient: each is one more product in the backward pass, ...
    gradients: int = 2
    #: ... over so large a part of it: where the result is max-pooled, the gradient of the other places is zero.
    kept: float = 1.0


class Sizes(NamedTuple):
    """Numbers of every tensor: inputs by name, results in order; and the indices among the inputs and among the results."""

    inputs: dict[str, int]
    results: tuple[int, ...]
    indices: tuple[int, int] = (0, 0)


def flops(products: list[Product]) -> dict[str, int]:
    """Floating-point operations by pass."""
    forward = sum(2 * p.times * p.multiply_adds for p in products)
    backward = sum(2 * p.times * p.gradients * round(p.multiply_adds * p.kept) for p in products)
    return {"fwd": forward, "fwd+bwd": forward + backward}


def work(products: list[Product], sizes: Sizes, itemsize: int, constant: Collection[str]) -> dict[str, Work]:
    """The work by pass. `constant` names the inputs without a gradient."""
    inputs, results, indices = sizes
    forward = (sum(inputs.values()) + sum(results)) * itemsize + sum(indices) * INDEX_BYTES
    # the gradient of the first result comes in, those of the inputs go out
    grads = results[0] + sum(count for name, count in inputs.items() if name not in constant)
    moved = {"fwd": forward, "fwd+bwd": forward + grads * itemsize}
    return {name: Work(count, moved[name]) for name, count in flops(products).items()}
