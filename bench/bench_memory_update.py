"""memory_update: sizes, inputs, contestants and work."""

import torch

from bench.counts import Sizes
from bench.mann import VERIFIED, Shape, cases, over_slots
from bench.operators import Bench, normals


def inputs(s: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    normal = normals(seed)
    write_weights = torch.softmax(normal(s.B, s.R, s.N), -1)
    slots = normal(s.B, s.N).abs().argsort(-1)[:, : s.R].int()
    memory, add = normal(s.B, s.N, s.W), normal(s.B, s.R, s.W)
    return {"memory": memory, "write_weights": write_weights, "add": add, "least_used": slots}


def update(memory, weights, add, slots):
    kept = memory.scatter(1, slots[:, :1, None].expand(-1, -1, memory.shape[2]).long(), 0.0)
    return torch.baddbmm(kept, weights.transpose(1, 2), add)


def sizes(s: Shape) -> Sizes:
    memory = s.B * s.N * s.W
    given = {"memory": memory, "write_weights": s.B * s.R * s.N, "add": s.B * s.R * s.W}
    return Sizes(given, (memory,), (s.B * s.R, 0))


BENCH = Bench(
    op="memory_update",
    suite="mann",
    inputs=inputs,
    constant=("least_used",),
    verified=VERIFIED,
    cases=cases,
    eager=update,
    products=lambda s: [over_slots(s, 1)],
    sizes=sizes,
)
