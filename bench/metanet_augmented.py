"""The suite metanet, its augmented layers: shapes, inputs and contestants."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import mann_kernels

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


def layer(stem: str, x, weight, fast, mix):
    """Our operator as the bench calls it."""
    if stem == "augmented_linear":
        return mann_kernels.augmented_linear(x, weight, fast, mix)
    return mann_kernels.augmented_conv2d(x, weight, fast, mix, pool=True)


def inputs(stem: str, s: LayerShape, seed: int = 0) -> dict[str, torch.Tensor]:
    """float64 inputs of a layer by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    taps, example = ((3, 3), (s.C, s.side, s.side)) if stem == "augmented_conv2d" else ((), (s.C,))
    k = (s.C * 9 if taps else s.C) ** -0.5
    return {
        "x": normal(s.L, *example),
        "weight": normal(s.O, s.C, *taps) * k,
        "fast": normal(s.S, s.O, s.C, *taps) * k,
        "mix": torch.softmax(normal(s.L, s.S), -1),
    }
