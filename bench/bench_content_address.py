"""content_address: sizes, inputs, contestants and work."""

import torch

from bench.counts import Sizes
from bench.mann import EPS, VERIFIED, Shape, cases, over_slots
from bench.operators import Bench, normals


def inputs(s: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    normal = normals(seed)
    return {"memory": normal(s.B, s.N, s.W), "key": normal(s.B, s.R, s.W)}


def address(memory, key):
    dot = torch.bmm(key, memory.transpose(1, 2))
    squares = (key * key).sum(-1)[:, :, None] * (memory * memory).sum(-1)[:, None, :]
    return torch.softmax(dot * torch.rsqrt(squares + EPS), dim=-1)


def sizes(s: Shape) -> Sizes:
    return Sizes({"memory": s.B * s.N * s.W, "key": s.B * s.R * s.W}, (s.B * s.R * s.N,))


BENCH = Bench(
    op="content_address",
    suite="mann",
    inputs=inputs,
    constant=(),
    verified=VERIFIED,
    cases=cases,
    eager=address,
    products=lambda s: [over_slots(s, 1)],
    sizes=sizes,
)
