"""The suite metanet, its augmented layers: shapes, inputs and contestants."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

STEMS = ("augmented_linear", "augmented_conv2d")


@dataclass(frozen=True)
class LayerShape:
    """L queries of one task, whose memory has S rows; C input channels or features, O outputs, images of side x side pixels
    (side 0: a fully connected layer). Every convolution is 3 x 3 and followed by max-pooling, as in MetaNet."""

    L: int
    S: int
    C: int
    O: int  # noqa: E741
    side: int


#: The layers of the paper's Omniglot network at 5-way 1-shot with 50 queries.
LINEAR_SHAPES = {"fc 64-64": LayerShape(50, 5, 64, 64, 0), "fc 64-5": LayerShape(50, 5, 64, 5, 0)}
CONV_SHAPES = {
    "conv 28": LayerShape(50, 5, 1, 64, 28),
    "conv 14": LayerShape(50, 5, 64, 64, 14),
    "conv 7": LayerShape(50, 5, 64, 64, 7),
    "conv 4": LayerShape(50, 5, 64, 64, 4),
    "conv 2": LayerShape(50, 5, 64, 64, 2),
}
SHAPES = {"augmented_linear": LINEAR_SHAPES, "augmented_conv2d": CONV_SHAPES}
#: What verification runs on: odd sizes, several tiles, one of everything, and a layer of the paper's.
VERIFIED = {
    "augmented_linear": (LayerShape(3, 2, 7, 5, 0), LayerShape(70, 3, 65, 17, 0), LayerShape(50, 5, 64, 64, 0)),
    "augmented_conv2d": (LayerShape(3, 2, 2, 5, 9), LayerShape(1, 1, 1, 1, 1), LayerShape(10, 5, 64, 64, 7)),
}


def inputs(stem: str, s: LayerShape, seed: int = 0) -> dict[str, torch.Tensor]:
    """float64 inputs of a layer by name; what it convolves is "x", which needs no gradient, in the first layer alone."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    taps, example = ((3, 3), (s.C, s.side, s.side)) if stem == "augmented_conv2d" else ((), (s.C,))
    k = (s.C * 9 if taps else s.C) ** -0.5
    return {
        "x" if s.C == 1 else "hidden": normal(s.L, *example),
        "weight": normal(s.O, s.C, *taps) * k,
        "fast": normal(s.S, s.O, s.C, *taps) * k,
        "mix": torch.softmax(normal(s.L, s.S), -1),
    }


def _own_weights(fast, mix):
    """The weight of every example, [L, O, ...]."""
    return (mix @ fast.flatten(1)).unflatten(1, fast.shape[1:])


def _pooled(slow, fast):
    return F.max_pool2d(F.relu(slow) + F.relu(fast), 2, 2, ceil_mode=True)


def conv_grouped(x, weight, fast, mix):
    """A weight for every example, and one convolution with as many groups."""
    own = _own_weights(fast, mix).flatten(0, 1)
    each = F.conv2d(x.flatten(0, 1)[None], own, padding=1, groups=len(x)).unflatten(1, (len(x), -1))[0]
    return _pooled(F.conv2d(x, weight, padding=1), each)


def conv_vmap(x, weight, fast, mix):
    """A weight for every example, and torch.func.vmap over them."""
    each = torch.func.vmap(lambda image, own: F.conv2d(image[None], own, padding=1)[0])(x, _own_weights(fast, mix))
    return _pooled(F.conv2d(x, weight, padding=1), each)


def conv_shared(x, weight, fast, mix):
    """One convolution with all rows of the memory side by side, mixed afterwards: S times the work, no weight per example."""
    rows, outputs = fast.shape[:2]
    each = F.conv2d(x, fast.flatten(0, 1), padding=1).unflatten(1, (rows, outputs))
    return _pooled(F.conv2d(x, weight, padding=1), torch.einsum("ls,lsohw->lohw", mix, each))


def conv(x, weight, fast, mix):
    """Whichever of them was the fastest for images of this size."""
    return (conv_shared if x.shape[-1] <= 4 else conv_vmap)(x, weight, fast, mix)


def linear_own(x, weight, fast, mix):
    return F.relu(x @ weight.t()) + F.relu((_own_weights(fast, mix) @ x.unsqueeze(2)).squeeze(2))


def linear_shared(x, weight, fast, mix):
    each = (x @ fast.flatten(0, 1).t()).unflatten(1, fast.shape[:2])
    return F.relu(x @ weight.t()) + F.relu((mix.unsqueeze(1) @ each).squeeze(1))


EAGER = {"augmented_linear": linear_shared, "augmented_conv2d": conv}
#: Other ways to say the same, which lose at most sizes.
ALTERNATIVES = {
    "augmented_linear": {"eager_own_weights": linear_own},
    "augmented_conv2d": {"eager_grouped": conv_grouped, "eager_vmap": conv_vmap, "eager_shared": conv_shared},
}
#: What the operators are called with beside the tensors.
OPTIONS = {"augmented_conv2d": {"pool": True}}
