"""Measures what a call costs beside its kernels: microseconds of checks, autograd and dispatch, at the smallest size."""

import statistics
import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import harness
from bench.operators import DTYPES, Bench

#: Of each part: calls in a turn, and turns, of which the median counts.
CALLS, TURNS = 200, 25
PARTS = {
    "checks": "forward: checks, options, what makes an operator's call of a function's",
    "graph": "more, where gradients are wanted",
    "operator": "forward: the compiled operator, dispatch and a very short kernel",
    "engine": "backward: torch's engine, and what it calls in Python",
    "backward": "backward: the compiled operator",
}


class Recorded(TorchDispatchMode):
    """Keeps the operators of this package that are called in the block, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith("mann"):
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def recorded(call: Callable) -> Callable:
    """Return a function that calls the operators that `call` calls, and nothing else."""
    with Recorded() as record:
        call()

    def again():
        with torch.no_grad():
            for function, args, kwargs in record.calls:
                function(*args, **kwargs)

    return again


def microseconds(calls: dict[str, Callable], device) -> dict[str, float]:
    """Measure the host's time of each call, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            device.synchronize()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def row(bench: Bench, device, dtype: str = "float32") -> dict[str, float]:
    """Measure PARTS in microseconds, in a training step of an operator, at the first size that it is verified on."""
    tensors = bench.inputs(bench.verified[0], 0)
    work = harness.Work(bench, tensors, DTYPES[dtype], device.device)
    function, values = bench.kernel(), list(work.tensors.values())

    def plain():
        with torch.no_grad():
            return function(*values)

    outputs = function(*values)
    outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.requires_grad]
    given = [torch.ones_like(out) for out in outputs]

    def backward():
        torch.autograd.grad(outputs, work.leaves, given, retain_graph=True)

    found = microseconds(
        {
            "plain": plain,
            "forward": recorded(plain),
            "with a graph": lambda: function(*values),
            "back": backward,
            "backward": recorded(backward),
        },
        device,
    )
    return {
        "checks": found["plain"] - found["forward"],
        "graph": found["with a graph"] - found["plain"],
        "operator": found["forward"],
        "engine": found["back"] - found["backward"],
        "backward": found["backward"],
    }
