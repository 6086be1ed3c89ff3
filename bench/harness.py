"""Verification, timing and memory: the one place where each is measured."""

import gc
import os
import platform
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench import contestants
from bench.suites import family_of, in_metanet
from mann_kernels import _backend, _library
from mann_kernels.testing import accuracy

# The profiler would write lines of its own between the bench's.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

#: Inputs without a gradient in every contestant: data and the state an episode starts from.
CONSTANT = {"x", "usage", "h", "c", "reads", "least_used", "support_x", "query_x"}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class Work:
    """One stem on one set of leaf tensors: a forward pass without, a training step with gradients."""

    def __init__(self, stem: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype):
        constant = CONSTANT | ({"memory", "read_weights"} if stem == "mann_sequence" else set())
        self.tensors = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().clone()
            for name, tensor in tensors.items()
        }
        self.leaves = [t.requires_grad_() for name, t in self.tensors.items() if name not in constant]
        self.weights = None

    def forward(self, function):
        with torch.no_grad():
            return function(*self.tensors.values())

    def loss(self, function):
        out = function(*self.tensors.values())
        first = out[0] if isinstance(out, tuple) else out
        if self.weights is None:
            self.weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(1)).to(first.dtype)
        return (first * self.weights).sum(), out

    def train(self, function):
        for leaf in self.leaves:
            leaf.grad = None
        loss, out = self.loss(function)
        loss.backward()
        return out


def verify(stems, candidates=None) -> list[dict]:
    """Every stem, dtype and shape: outputs and all gradients of the kernel against the float64 reference."""
    rows = []
    for stem in stems:
        family = family_of(stem)
        candidate = (candidates or {}).get(stem, contestants.ours(stem))
        for dtype_name in family.dtypes:
            dtype = DTYPES[dtype_name]
            backend = _backend.default(stem, "cpu", dtype)[0] if stem in _backend.STEMS else "the defaults"
            for number, shape in enumerate(family.verified):
                drawn = {
                    name: t.to(dtype) if t.is_floating_point() else t
                    for name, t in family.inputs(stem, shape, number).items()
                }
                runs = []
                kinds = (
                    (candidate, dtype),
                    (contestants.plain(stem), dtype),
                    (contestants.plain(stem), torch.float64),
                )
                for function, kind in kinds:
                    work = Work(stem, drawn, kind)
                    out = work.train(function)
                    out = out if isinstance(out, tuple) else (out,)
                    named = {f"output {i}": tensor for i, tensor in enumerate(out)}
                    named |= {f"d{name}": t.grad for name, t in work.tensors.items() if t.grad is not None}
                    runs.append(named)
                for quantity in runs[2]:
                    actual, same, exact = (run[quantity] for run in runs)
                    if actual.is_floating_point():
                        found = accuracy(actual, same, exact)
                        error, budget, ok = found.error, found.budget, found.ok
                    else:
                        error, budget, ok = float((actual != exact).sum()), 0.0, torch.equal(actual, exact)
                    rows.append(
                        {
                            "stem": stem,
                            "backend": backend,
                            "dtype": dtype_name,
                            "shape": str(shape),
                            "quantity": quantity,
                        }
                        | {"error": error, "budget": budget, "ok": bool(ok)}
                    )
    return rows


def interleave(functions: dict, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each function, one call of each in turn, after three warm-up calls of each."""
    for function in functions.values():
        for _ in range(3):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while len(next(iter(times.values()))) < rounds or time.perf_counter() - start < seconds:
            for name, function in functions.items():
                before = time.perf_counter()
                function()
                times[name].append((time.perf_counter() - before) * 1e3)
            if time.perf_counter() - start > 4 * seconds and len(next(iter(times.values()))) >= 3:
                break
    finally:
        gc.enable()
    return times


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    lower, median, upper = torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return lower, median, upper


def saved_mb(work: Work, function) -> float:
    """MiB that the forward pass keeps for backward: each storage once, parameters and other leaves left out."""
    parameters = {leaf.untyped_storage().data_ptr() for leaf in work.leaves}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*work.tensors.values())
    return sum(kept.values()) / 2**20


def peak_mb(work: Work, function) -> float:
    """MiB by which a training step raises what torch has allocated, at its highest, from the profiler's record."""
    work.train(function)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work.train(function)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak / 2**20


def time_stem(stem, shape_name, shape, threads, quick, x=None, loop=False) -> list[dict]:
    """All contestants of one stem and shape, both passes; x [T,B,I] replaces the random input of mann_sequence."""
    tensors = family_of(stem).inputs(stem, shape)
    work = Work(stem, tensors if x is None else tensors | {"x": x.double()}, torch.float32)
    functions = {"mann_kernels": contestants.ours(stem), "eager": contestants.EAGER[stem]}
    functions |= contestants.ALTERNATIVES.get(stem, {})
    heavy = shape_name == "long"
    if not heavy:
        kind = contestants.compiled_loop if loop else contestants.compiled_step
        functions["compile_loop" if loop else "compile_step"] = kind(stem)
    compile_seconds = {}
    for name, function in functions.items():
        if name.startswith("compile"):
            before = time.perf_counter()
            work.train(function)
            compile_seconds[name] = time.perf_counter() - before
    runs = {"fwd": {}, "fwd+bwd": {}}
    for name, function in functions.items():
        runs["fwd"][name] = lambda function=function: work.forward(function)
        runs["fwd+bwd"][name] = lambda function=function: work.train(function)
    if stem == "mann_sequence":
        others = {"lstm": contestants.lstm(shape, work.tensors["x"]), "gemm_floor": contestants.gemm_floor(shape)}
        for name, (forward, train) in others.items():
            runs["fwd"][name], runs["fwd+bwd"][name] = forward, train
    # torch.func, in a whole update written out, does not run under hooks on what is saved
    counted = ("mann_kernels", "eager") if stem in _backend.STEMS else ()
    memory = {name: saved_mb(work, functions[name]) for name in counted}
    whole = stem.endswith("sequence") or in_metanet(stem)  # and not a small part of something
    peaks = {name: peak_mb(work, functions[name]) for name in functions} if whole else {}
    rows = []
    for name_of_pass, group in runs.items():
        seconds, rounds = (1.0, 5) if quick or heavy else (5.0, 11)
        for name, times in interleave(group, seconds, 2 if heavy else rounds).items():
            q1, median, q3 = quartiles(times)
            training = name_of_pass == "fwd+bwd"
            rows.append(
                {"stem": stem, "shape": shape_name, "pass": name_of_pass, "contestant": name, "threads": threads}
                | {"dtype": "float32", "median_ms": median, "q1_ms": q1, "q3_ms": q3}
                | {"saved_mb": memory.get(name) if training else None, "peak_mb": peaks.get(name) if training else None}
                | {"compile_s": compile_seconds.get(name), "rounds": len(times)}
            )
    return rows


def machine(threads: int) -> dict:
    """The facts a reader needs to repeat a figure."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernel_instruction_set": _library.cpu_isa(),
        "openmp": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "KMP_", "MKL_"))},
        "load_average": os.getloadavg()[0],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def pytest_benchmark_of(stem: str):
    """The pytest-benchmark test of one stem at the paper's shape: verified first."""

    def test_training_step(benchmark):
        assert all(row["ok"] for row in verify([stem]))
        family = family_of(stem)
        paper = next(iter(family.shapes.values()))
        work = Work(stem, family.inputs(stem, paper), torch.float32)
        benchmark(lambda: work.train(contestants.ours(stem)))

    return test_training_step
