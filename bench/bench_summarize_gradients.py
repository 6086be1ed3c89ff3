"""summarize_gradients: sizes, inputs, contestants and work."""

import torch

from bench.counts import Product, Sizes
from bench.metanet import VERIFIED, Shape, cases, features, gradients
from bench.operators import Bench, normals


def inputs(s: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    normal = normals(seed)
    k = s.D**-0.5
    found = {"grads": gradients(s, normal), "weight_ih": normal(4 * s.D, 2) * k, "weight_hh": normal(4 * s.D, s.D) * k}
    return found | {"bias": normal(4 * s.D) * k, "weight_out": normal(1, s.D) * k, "bias_out": normal(1) * k}


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


def products(s: Shape) -> list[Product]:
    D = s.D
    return [Product(s.S, s.P * 4 * D * 2), Product(s.S - 1, s.P * 4 * D * D), Product(1, s.P * D)]


def sizes(s: Shape) -> Sizes:
    D = s.D
    weights = {"weight_ih": 8 * D, "weight_hh": 4 * D * D, "bias": 4 * D, "weight_out": D, "bias_out": 1}
    return Sizes({"grads": s.S * s.P, **weights}, (s.P,))


BENCH = Bench(
    op="summarize_gradients",
    suite="metanet",
    inputs=inputs,
    constant=(),
    verified=VERIFIED,
    cases=cases,
    eager=summarize,
    products=products,
    sizes=sizes,
)
