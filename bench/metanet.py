"""The suite metanet: shapes, inputs and contestants of MetaNet's operators."""

import math
from dataclasses import dataclass

import torch

STEMS = ("generate_fast_weights", "summarize_gradients")


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


def inputs(stem: str, s: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    """float64 inputs of a stem by name; a third of the gradients are below e^-7."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    k = s.D**-0.5
    grads = {"grads": normal(s.S, s.P) ** 3 * 0.01}
    out = {"weight": normal(1, s.D) * k, "bias": normal(1) * k}
    if stem == "summarize_gradients":
        ih, hh, bias = normal(4 * s.D, 2) * k, normal(4 * s.D, s.D) * k, normal(4 * s.D) * k
        lstm = {"weight_ih": ih, "weight_hh": hh, "bias": bias}
        return grads | lstm | {"weight_out": out["weight"], "bias_out": out["bias"]}
    first, second = {"weight1": normal(s.D, 2), "bias1": normal(s.D)}, {"weight2": normal(s.D, s.D) * k}
    return grads | first | second | {"bias2": normal(s.D) * k, "weight3": out["weight"], "bias3": out["bias"]}


# The coordinates stand last, so that a unit is a row: on the CPU that is up to twice as fast as the layout of nn.Linear and
# nn.LSTM, with and without torch.compile.


def features(grads, p=7.0):
    magnitude = torch.clamp(torch.log(grads.abs() + torch.finfo(torch.float32).eps) / p, min=-1)
    return torch.stack([magnitude, torch.clamp(grads * math.exp(p), -1, 1)], -2)


def generate(grads, weight1, bias1, weight2, bias2, weight3, bias3):
    hidden = torch.relu(torch.addmm(bias1[:, None], weight1, features(grads.flatten())))
    hidden = torch.relu(torch.addmm(bias2[:, None], weight2, hidden))
    return torch.addmm(bias3[:, None], weight3, hidden).view(grads.shape)


def summarize(grads, weight_ih, weight_hh, bias, weight_out, bias_out):
    h = c = None
    for x in features(grads):
        gates = torch.addmm(bias[:, None], weight_ih, x)
        if h is not None:
            gates = torch.addmm(gates, weight_hh, h)
        gate_in, gate_forget, cell, gate_out = gates.chunk(4, 0)
        new = torch.sigmoid(gate_in) * torch.tanh(cell)
        c = new if c is None else torch.sigmoid(gate_forget) * c + new
        h = torch.sigmoid(gate_out) * torch.tanh(c)
    return torch.addmm(bias_out[:, None], weight_out, h)[0]


EAGER = {"generate_fast_weights": generate, "summarize_gradients": summarize}
