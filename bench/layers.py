"""Sizes, inputs and counts that the benches of the two augmented layers have in common."""

from dataclasses import dataclass

import torch

from bench.counts import Product, Sizes, flops
from bench.operators import normals


@dataclass(frozen=True)
class LayerShape:
    """L queries of one task, whose memory has S rows; C input channels or features, O outputs, images of side x side pixels
    (side 0: a fully connected layer). Every convolution is 3 x 3 and followed by max-pooling, as in MetaNet."""

    L: int
    S: int
    C: int
    O: int  # noqa: E741
    side: int


def inputs(s: LayerShape, seed: int, taps: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """float64 inputs of a layer by name; what it convolves is "x", which needs no gradient, in the first layer alone."""
    normal = normals(seed)
    example = (s.C, s.side, s.side) if taps else (s.C,)
    k = (s.C * 9 if taps else s.C) ** -0.5
    return {
        "x" if s.C == 1 else "hidden": normal(s.L, *example),
        "weight": normal(s.O, s.C, *taps) * k,
        "fast": normal(s.S, s.O, s.C, *taps) * k,
        "mix": torch.softmax(normal(s.L, s.S), -1),
    }


def own_weights(fast, mix):
    """The weight of every example, [L, O, ...]."""
    return (mix @ fast.flatten(1)).unflatten(1, fast.shape[1:])


def products(s: LayerShape, taps: int, places: int, pooled: int) -> list[Product]:
    """The cheapest way: taps of a filter, places where it is applied, places left by the pooling."""
    gradients = 1 if s.C == 1 else 2  # in the first layer the input is data
    slow = Product(1, s.L * s.O * s.C * taps * places, gradients, pooled / places)
    rows = [slow, slow._replace(times=s.S), slow._replace(multiply_adds=s.L * s.S * s.O * places, gradients=2)]
    own = [slow, slow, Product(1, s.L * s.S * s.O * s.C * taps)]
    # every row of the memory, then mixed; or the rows mixed into weights of each example, then one product
    return min(rows, own, key=lambda way: flops(way)["fwd+bwd"])


def sizes(s: LayerShape, taps: int, places: int, pooled: int) -> Sizes:
    """Numbers of each tensor, with the same three."""
    weight = s.O * s.C * taps
    x = {"x" if s.C == 1 else "hidden": s.L * s.C * places}
    return Sizes({**x, "weight": weight, "fast": s.S * weight, "mix": s.L * s.S}, (s.L * s.O * pooled,))
