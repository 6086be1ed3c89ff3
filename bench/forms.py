"""`python -m bench.forms [SHAPE ...]`: on a GPU, every form of a cluster that mann_sequence can run in, beside the one it takes.

A form is the blocks of a cluster, its examples, the blocks that share an example's slots, and whether weights are held in
registers, forward and backward. Each is verified against the reference in float64 and timed as a CUDA graph. The rates in
csrc/cuda/mann_plan.cpp are checked with this.
"""

import argparse
import ctypes
import itertools
import statistics

import torch

import mann_kernels
from bench.bench_mann_sequence import inputs
from bench.devices import Cuda
from bench.mann import SHAPES
from mann_kernels import _library

ROUNDS = 20
NO_GRADIENT = 5  # the output that is the usage


def forms(batch: int):
    """Yield every form for a batch: blocks, examples, parts, held forward, held backward."""
    powers = (1, 2, 4, 8, 16)
    for blocks, examples, parts in itertools.product(powers[1:], powers[:4], powers):
        if examples * parts <= blocks and examples < 2 * batch:
            for held in itertools.product((0, 1), repeat=2):
                yield blocks, examples, parts, *held


def step_of(tensors):
    """The function that makes outputs and gradients of a call, by a fixed gradient of each output."""
    leaves = {name: value.detach().requires_grad_(name != "usage") for name, value in tensors.items()}
    wanted = [value for value in leaves.values() if value.requires_grad]

    def step():
        outputs = mann_kernels.mann_sequence(**leaves)
        outputs = [out for i, out in enumerate(outputs) if i != NO_GRADIENT]
        return [*outputs, *torch.autograd.grad(outputs, wanted, [torch.cos(out.detach() * 1e3) for out in outputs])]

    return step


def worst(found, exact) -> float:
    return max(float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, exact, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.forms", description=__doc__)
    parser.add_argument(
        "shapes", nargs="*", default=["paper", "single", "small", "wide", "batch"], choices=sorted(SHAPES)
    )
    given = parser.parse_args()
    device = Cuda()
    plan = ctypes.CDLL(_library._cuda_origin).mann_cuda_plan
    for name in given.shapes:
        exact = {key: value.cuda() for key, value in inputs(SHAPES[name]).items()}
        with mann_kernels.backend("reference"):
            right = step_of(exact)()
        step = step_of({key: value.float() for key, value in exact.items()})
        for form in ((0,) * 5, (-1, 0, 0, 0, 0), *forms(SHAPES[name].B)):
            label = {0: "as chosen", -1: "on no cluster"}.get(form[0], str(form))
            plan(*form)
            try:
                with mann_kernels.backend("cuda"):
                    error = worst(step(), right)
                    (graph,) = device.graphs(lambda step=step: [step])
                times = [device.measure(graph) for _ in range(ROUNDS)]
            except RuntimeError as failed:
                if "does not compile" not in str(failed) and "memory" not in str(failed):
                    raise
                continue  # does not fit
            print(f"{name:8s} {label:22s} {statistics.median(times):8.3f} ms, worst error {error:.1e}", flush=True)
        plan(0, 0, 0, 0, 0)


if __name__ == "__main__":
    main()
