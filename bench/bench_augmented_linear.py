"""augmented_linear: sizes, inputs, contestants and work."""

import torch
import torch.nn.functional as F

from bench import layers
from bench.layers import LayerShape, own_weights
from bench.operators import Bench, Case

#: The layers of the paper's Omniglot network at 5-way 1-shot with 50 queries.
SHAPES = {"fc 64-64": LayerShape(50, 5, 64, 64, 0), "fc 64-5": LayerShape(50, 5, 64, 5, 0)}
#: What verification runs on: odd sizes, several tiles, and a layer of the paper's.
VERIFIED = (LayerShape(3, 2, 7, 5, 0), LayerShape(70, 3, 65, 17, 0), LayerShape(50, 5, 64, 64, 0))


def inputs(s: LayerShape, seed: int = 0) -> dict[str, torch.Tensor]:
    return layers.inputs(s, seed)


def linear_own(x, weight, fast, mix):
    return F.relu(x @ weight.t()) + F.relu((own_weights(fast, mix) @ x.unsqueeze(2)).squeeze(2))


def linear_shared(x, weight, fast, mix):
    each = (x @ fast.flatten(0, 1).t()).unflatten(1, fast.shape[:2])
    return F.relu(x @ weight.t()) + F.relu((mix.unsqueeze(1) @ each).squeeze(1))


BENCH = Bench(
    op="augmented_linear",
    suite="metanet",
    inputs=inputs,
    constant=("x",),
    verified=VERIFIED,
    cases=lambda quick: [Case(name, shape, rank=2) for name, shape in SHAPES.items()],
    eager=linear_shared,
    alternatives={"eager_own_weights": linear_own},
    products=lambda s: layers.products(s, 1, 1, 1),
    sizes=lambda s: layers.sizes(s, 1, 1, 1),
)
