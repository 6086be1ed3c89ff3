"""lrua_sequence: sizes, inputs, contestants and work."""

import torch

from bench.bench_lrua_step import sizes, state, step
from bench.mann import VERIFIED, Shape, cases, over_slots
from bench.operators import Bench, compiled_anew, normals


def inputs(s: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    normal = normals(seed)
    return state(s, normal) | {"key": normal(s.T, s.B, s.R, s.W), "gate": normal(s.T, s.B, s.R)}


def over_time(one_step):
    """The loop over time that everybody writes."""

    def run(memory, usage, read_weights, key, gate):
        outputs = []
        for t in range(key.shape[0]):
            reads, memory, usage, read_weights = one_step(memory, usage, read_weights, key[t], gate[t])
            outputs.append(reads)
        return torch.stack(outputs), memory, usage, read_weights

    return run


BENCH = Bench(
    op="lrua_sequence",
    suite="mann",
    inputs=inputs,
    constant=("usage",),
    verified=VERIFIED,
    cases=cases,
    eager=over_time(step),
    products=lambda s: [over_slots(s, 3 * s.T)],
    sizes=lambda s: sizes(s, s.T),
    compiled=lambda loop: over_time(compiled_anew(step)),
)
