"""generate_fast_weights: sizes, inputs, contestants and work."""

import torch

from bench.counts import Product, Sizes
from bench.metanet import VERIFIED, Shape, cases, features, gradients
from bench.operators import Bench, normals


def inputs(s: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    normal = normals(seed)
    k = s.D**-0.5
    found = {"grads": gradients(s, normal), "weight1": normal(s.D, 2), "bias1": normal(s.D)}
    found |= {"weight2": normal(s.D, s.D) * k, "bias2": normal(s.D) * k}
    return found | {"weight3": normal(1, s.D) * k, "bias3": normal(1) * k}


def generate(grads, weight1, bias1, weight2, bias2, weight3, bias3):
    hidden = torch.relu(torch.addmm(bias1[:, None], weight1, features(grads.flatten())))
    hidden = torch.relu(torch.addmm(bias2[:, None], weight2, hidden))
    return torch.addmm(bias3[:, None], weight3, hidden).view(grads.shape)


def sizes(s: Shape) -> Sizes:
    D = s.D
    weights = {"weight1": 2 * D, "bias1": D, "weight2": D * D, "bias2": D, "weight3": D, "bias3": 1}
    return Sizes({"grads": s.S * s.P, **weights}, (s.S * s.P,))


BENCH = Bench(
    op="generate_fast_weights",
    suite="metanet",
    inputs=inputs,
    constant=(),
    verified=VERIFIED,
    cases=cases,
    eager=generate,
    products=lambda s: [Product(1, s.S * s.P * (2 * s.D + s.D * s.D + s.D))],
    sizes=sizes,
)
