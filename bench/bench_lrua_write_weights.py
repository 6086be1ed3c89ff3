"""lrua_write_weights: sizes, inputs, contestants and work."""

import torch

from bench.counts import Sizes
from bench.mann import VERIFIED, Shape, cases, over_slots
from bench.operators import Bench, normals


def inputs(s: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    normal = normals(seed)
    read_weights = torch.softmax(normal(s.B, s.R, s.N), -1)
    return {"usage": normal(s.B, s.N).abs(), "read_weights": read_weights, "gate": normal(s.B, s.R)}


def write_weights(usage, read_weights, gate):
    # the lowest usages in order; a stable sort makes ties go to the lowest slot, which topk does not promise
    slots = torch.argsort(usage, dim=1, stable=True)[:, : gate.shape[1]]
    sigma = torch.sigmoid(gate)[..., None]
    return (sigma * read_weights).scatter_add(2, slots[..., None], 1 - sigma), slots


def sizes(s: Shape) -> Sizes:
    weights, gate = s.B * s.R * s.N, s.B * s.R
    return Sizes({"usage": s.B * s.N, "read_weights": weights, "gate": gate}, (weights,), (0, gate))


BENCH = Bench(
    op="lrua_write_weights",
    suite="mann",
    inputs=inputs,
    constant=("usage",),
    verified=VERIFIED,
    cases=cases,
    eager=write_weights,
    products=lambda s: [over_slots(s, 0)],
    sizes=sizes,
)
