"""lrua_step: sizes, inputs, contestants and work."""

import torch

from bench.bench_content_address import address
from bench.bench_lrua_write_weights import write_weights
from bench.bench_memory_update import update
from bench.counts import Sizes
from bench.mann import DECAY, VERIFIED, Shape, cases, over_slots
from bench.operators import Bench, normals


def state(s: Shape, normal) -> dict[str, torch.Tensor]:
    """Draw the memory, usage and read weights that an episode starts from."""
    read_weights = torch.softmax(normal(s.B, s.R, s.N), -1)
    return {"memory": normal(s.B, s.N, s.W), "usage": normal(s.B, s.N).abs(), "read_weights": read_weights}


def inputs(s: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    normal = normals(seed)
    return state(s, normal) | {"key": normal(s.B, s.R, s.W), "gate": normal(s.B, s.R)}


def step(memory, usage, read_weights, key, gate):
    weights, slots = write_weights(usage, read_weights, gate)
    memory = update(memory, weights, key, slots)
    read_weights = address(memory, key)
    with torch.no_grad():
        usage = DECAY * usage + read_weights.sum(1) + weights.sum(1)
    return torch.bmm(read_weights, memory), memory, usage, read_weights


def sizes_of_state(s: Shape) -> dict[str, int]:
    """Numbers of each tensor of the memory's state."""
    return {"memory": s.B * s.N * s.W, "usage": s.B * s.N, "read_weights": s.B * s.R * s.N}


def sizes(s: Shape, steps: int = 1) -> Sizes:
    """Count the numbers of each tensor, for so many steps in one call."""
    of_state, reads = sizes_of_state(s), steps * s.B * s.R * s.W
    return Sizes({**of_state, "key": reads, "gate": steps * s.B * s.R}, (reads, *of_state.values()))


BENCH = Bench(
    op="lrua_step",
    suite="mann",
    inputs=inputs,
    constant=("usage",),
    verified=VERIFIED,
    cases=cases,
    eager=step,
    products=lambda s: [over_slots(s, 3)],
    sizes=sizes,
)
