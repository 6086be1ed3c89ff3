"""The work of every stem, counted from its shape: floating-point operations of its products, bytes that must go in and out.

Both are lower bounds. Products are matrix products and convolutions by the cheapest way known, a multiply-add counted as two;
what is not a product is left out. Bytes are every input read once and every result written once, as if nothing else ever left
the caches.
"""

from typing import NamedTuple

from bench import metanet, metanet_augmented, stems
from bench.stems import Shape

#: What a slot's number takes, whatever the dtype.
INDEX_BYTES = 4


class Work(NamedTuple):
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


def _memory_products(stem: str, s: Shape) -> list[Product]:
    one = s.B * s.R * s.N * s.W  # all heads against all slots: to write, to match, to read
    per_step = {"content_address": 1, "lrua_write_weights": 0, "memory_update": 1}.get(stem, 3)
    steps = s.T if stem.endswith("_sequence") else 1
    found = [Product(steps * per_step, one)]
    if stem == "mann_sequence":
        recurrent, head = 4 * s.H * (s.H + s.R * s.W), s.H * (s.R * s.W + s.R)
        found += [
            Product(s.T, s.B * 4 * s.H * s.I, gradients=1),  # the input is data
            Product(1, s.B * recurrent, gradients=1),  # so is the state that an episode starts from
            Product(s.T - 1, s.B * recurrent),
            Product(s.T, s.B * head),
        ]
    return found


def _memory_sizes(stem: str, s: Shape) -> Sizes:
    memory, usage, weights, reads = s.B * s.N * s.W, s.B * s.N, s.B * s.R * s.N, s.B * s.R * s.W
    gate, words = s.B * s.R, s.R * s.W
    state = {"memory": memory, "usage": usage, "read_weights": weights}
    if stem == "content_address":
        return Sizes({"memory": memory, "key": reads}, (weights,))
    if stem == "lrua_write_weights":
        return Sizes({"usage": usage, "read_weights": weights, "gate": gate}, (weights,), (0, gate))
    if stem == "memory_update":
        return Sizes({"memory": memory, "write_weights": weights, "add": reads}, (memory,), (gate, 0))
    if stem != "mann_sequence":
        T = s.T if stem == "lrua_sequence" else 1
        return Sizes({**state, "key": T * reads, "gate": T * gate}, (T * reads, memory, usage, weights))
    hidden = s.B * s.H
    weight = {"weight_ih": 4 * s.H * s.I, "weight_hh": 4 * s.H * (s.H + words), "bias": 4 * s.H}
    weight |= {"weight_head": (words + s.R) * s.H, "bias_head": words + s.R}
    given = {"x": s.T * s.B * s.I, "h": hidden, "c": hidden, "reads": reads, **state, **weight}
    return Sizes(given, (s.T * (hidden + reads), hidden, hidden, reads, memory, usage, weights))


def _metanet_products(stem: str, s: metanet.Shape) -> list[Product]:
    if stem == "generate_fast_weights":
        return [Product(1, s.S * s.P * (2 * s.D + s.D * s.D + s.D))]
    return [Product(s.S, s.P * 4 * s.D * 2), Product(s.S - 1, s.P * 4 * s.D * s.D), Product(1, s.P * s.D)]


def _metanet_sizes(stem: str, s: metanet.Shape) -> Sizes:
    D = s.D
    if stem == "generate_fast_weights":
        named = {"weight1": 2 * D, "bias1": D, "weight2": D * D, "bias2": D, "weight3": D, "bias3": 1}
        return Sizes({"grads": s.S * s.P, **named}, (s.S * s.P,))
    named = {"weight_ih": 8 * D, "weight_hh": 4 * D * D, "bias": 4 * D, "weight_out": D, "bias_out": 1}
    return Sizes({"grads": s.S * s.P, **named}, (s.P,))


def _grid(stem: str, s: metanet_augmented.LayerShape) -> tuple[int, int, int]:
    """Taps of a filter, places where it is applied, places left by the pooling."""
    return (9, s.side**2, ((s.side + 1) // 2) ** 2) if stem == "augmented_conv2d" else (1, 1, 1)


def _layer_products(stem: str, s: metanet_augmented.LayerShape) -> list[Product]:
    taps, places, pooled = _grid(stem, s)
    gradients = 1 if s.C == 1 else 2  # in the first layer the input is data
    slow = Product(1, s.L * s.O * s.C * taps * places, gradients, pooled / places)
    rows = [slow, slow._replace(times=s.S), slow._replace(multiply_adds=s.L * s.S * s.O * places, gradients=2)]
    own = [slow, slow, Product(1, s.L * s.S * s.O * s.C * taps)]
    # every row of the memory, then mixed; or the rows mixed into weights of each example, then one product
    return min(rows, own, key=lambda way: _flops(way)["fwd+bwd"])


def _layer_sizes(stem: str, s: metanet_augmented.LayerShape) -> Sizes:
    taps, places, pooled = _grid(stem, s)
    weight = s.O * s.C * taps
    x = {"x" if s.C == 1 else "hidden": s.L * s.C * places}
    return Sizes({**x, "weight": weight, "fast": s.S * weight, "mix": s.L * s.S}, (s.L * s.O * pooled,))


def _flops(products: list[Product]) -> dict[str, int]:
    forward = sum(2 * p.times * p.multiply_adds for p in products)
    backward = sum(2 * p.times * p.gradients * round(p.multiply_adds * p.kept) for p in products)
    return {"fwd": forward, "fwd+bwd": forward + backward}


_FAMILIES = (
    (stems.STEMS, _memory_products, _memory_sizes),
    (metanet.STEMS, _metanet_products, _metanet_sizes),
    (metanet_augmented.STEMS, _layer_products, _layer_sizes),
)


def sizes(stem: str, shape) -> Sizes:
    return next(size(stem, shape) for names, _, size in _FAMILIES if stem in names)


def work(stem: str, shape, itemsize: int, constant: set[str]) -> dict[str, Work] | None:
    """By pass. `constant` names the inputs without a gradient. None where what is timed is no single operator."""
    found = next(((products, size) for names, products, size in _FAMILIES if stem in names), None)
    if found is None:
        return None
    products, size = found
    flops, (inputs, results, indices) = _flops(products(stem, shape)), size(stem, shape)
    forward = (sum(inputs.values()) + sum(results)) * itemsize + sum(indices) * INDEX_BYTES
    # the gradient of the first result comes in, those of the inputs go out
    grads = results[0] + sum(count for name, count in inputs.items() if name not in constant)
    moved = {"fwd": forward, "fwd+bwd": forward + grads * itemsize}
    return {name: Work(flops[name], moved[name]) for name in flops}
