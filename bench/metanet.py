"""Sizes, gradients and features that the benches of MetaNet's two generators have in common."""

import math
from dataclasses import dataclass

import torch

from bench.operators import Case


@dataclass(frozen=True)
class Shape:
    """P coordinates of each of S support examples, D hidden units of a generator."""

    P: int
    S: int
    D: int


#: The paper's Omniglot network at 5-way 1-shot, its mini-ImageNet one at 10-way in training.
SHAPES = {"omniglot": Shape(152_448, 5, 20), "miniimagenet": Shape(104_256, 10, 20)}
#: What verification runs on: odd sizes, one of everything, several chunks of coordinates.
VERIFIED = (Shape(7, 3, 5), Shape(1, 1, 1), Shape(4416, 5, 20))


def cases(quick: bool) -> list[Case]:
    """The sizes at which a generator is timed."""
    return [Case(name, shape, quick=name == "omniglot") for name, shape in SHAPES.items()]


def gradients(s: Shape, normal) -> torch.Tensor:
    """Draw the gradients that a generator reads, [S, P]; a third of them is below e^-7."""
    return normal(s.S, s.P) ** 3 * 0.01


# The coordinates stand last, so that a unit is a row: on the CPU that is up to twice as fast as the layout of nn.Linear and
# nn.LSTM, with and without torch.compile.


def features(grads, p=7.0):
    magnitude = torch.clamp(torch.log(grads.abs() + torch.finfo(torch.float32).eps) / p, min=-1)
    return torch.stack([magnitude, torch.clamp(grads * math.exp(p), -1, 1)], -2)
