"""augmented_conv2d: sizes, inputs, contestants and work."""

import torch
import torch.nn.functional as F

from bench import layers
from bench.layers import LayerShape, own_weights
from bench.operators import Bench, Case

#: The layers of the paper's Omniglot network at 5-way 1-shot with 50 queries.
SHAPES = {
    "conv 28": LayerShape(50, 5, 1, 64, 28),
    "conv 14": LayerShape(50, 5, 64, 64, 14),
    "conv 7": LayerShape(50, 5, 64, 64, 7),
    "conv 4": LayerShape(50, 5, 64, 64, 4),
    "conv 2": LayerShape(50, 5, 64, 64, 2),
}
#: What verification runs on: odd sizes, one of everything, and a layer of the paper's.
VERIFIED = (LayerShape(3, 2, 2, 5, 9), LayerShape(1, 1, 1, 1, 1), LayerShape(10, 5, 64, 64, 7))


def cases(quick: bool) -> list[Case]:
    return [Case(name, shape, quick=name not in ("conv 14", "conv 4")) for name, shape in SHAPES.items()]


def inputs(s: LayerShape, seed: int = 0) -> dict[str, torch.Tensor]:
    return layers.inputs(s, seed, (3, 3))


def grid(s: LayerShape) -> tuple[int, int, int]:
    """Taps of a filter, places where it is applied, places left by the pooling."""
    return 9, s.side**2, ((s.side + 1) // 2) ** 2


def pooled(slow, fast):
    return F.max_pool2d(F.relu(slow) + F.relu(fast), 2, 2, ceil_mode=True)


def conv_grouped(x, weight, fast, mix):
    """A weight for every example, and one convolution with as many groups."""
    own = own_weights(fast, mix).flatten(0, 1)
    each = F.conv2d(x.flatten(0, 1)[None], own, padding=1, groups=len(x)).unflatten(1, (len(x), -1))[0]
    return pooled(F.conv2d(x, weight, padding=1), each)


def conv_vmap(x, weight, fast, mix):
    """A weight for every example, and torch.func.vmap over them."""
    each = torch.func.vmap(lambda image, own: F.conv2d(image[None], own, padding=1)[0])(x, own_weights(fast, mix))
    return pooled(F.conv2d(x, weight, padding=1), each)


def conv_shared(x, weight, fast, mix):
    """Run one convolution with all rows of the memory side by side and mix afterwards: S times the work, no weight per example."""
    rows, outputs = fast.shape[:2]
    each = F.conv2d(x, fast.flatten(0, 1), padding=1).unflatten(1, (rows, outputs))
    return pooled(F.conv2d(x, weight, padding=1), torch.einsum("ls,lsohw->lohw", mix, each))


def conv(x, weight, fast, mix):
    """Whichever of them was the fastest for images of this size."""
    return (conv_shared if x.shape[-1] <= 4 else conv_vmap)(x, weight, fast, mix)


BENCH = Bench(
    op="augmented_conv2d",
    suite="metanet",
    inputs=inputs,
    constant=("x",),
    verified=VERIFIED,
    cases=cases,
    eager=conv,
    alternatives={"eager_grouped": conv_grouped, "eager_vmap": conv_vmap, "eager_shared": conv_shared},
    options={"pool": True},
    products=lambda s: layers.products(s, *grid(s)),
    sizes=lambda s: layers.sizes(s, *grid(s)),
)
