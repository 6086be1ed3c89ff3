"""Verification, timing and memory: the one place where each is measured, on every device in the same way."""

import functools
import gc
import itertools
import math
import os
import platform
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench import limits
from bench.devices import WARM_UP, attempt
from bench.operators import DTYPES, Bench, Case, backend_of, forced, kernels_of
from mann_kernels import _library
from mann_kernels.testing import accuracy

# The profiler would write lines of its own between the bench's.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


#: Seconds after which nothing is cold any more.
LONG_WARM_UP = 0.5


class Work:
    """An operator's work on one set of leaf tensors: a forward pass without gradients, or a training step, forward and backward
    from a given gradient of the first output, so that no loss is timed."""

    def __init__(self, bench: Bench, tensors: dict[str, torch.Tensor], dtype: torch.dtype, device="cpu"):
        self.tensors = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True).detach()
            for name, tensor in tensors.items()
        }
        self.leaves = [t.requires_grad_() for name, t in self.tensors.items() if name not in bench.constant]
        self.gradient: torch.Tensor | None = None

    def forward(self, function):
        with torch.no_grad():
            return function(*self.tensors.values())

    def train(self, function):
        for leaf in self.leaves:
            leaf.grad = None
        out = function(*self.tensors.values())
        first = out[0] if isinstance(out, tuple) else out
        if self.gradient is None:
            self.gradient = torch.randn(first.shape, generator=torch.Generator().manual_seed(1)).to(first)
        first.backward(self.gradient)
        return out

    def results(self, function) -> dict[str, torch.Tensor]:
        """Outputs and gradients of a training step, by name."""
        out = self.train(function)
        out = out if isinstance(out, tuple) else (out,)
        named = {f"output {i}": tensor for i, tensor in enumerate(out)}
        return named | {f"d{name}": t.grad for name, t in self.tensors.items() if t.grad is not None}


def verify(benches, device, dtypes=None, candidates=None) -> list[dict]:
    """A row for each output and gradient of each operator, dtype and shape: the kernel against the float64 reference.

    `dtypes` are names, by default all that the device takes; `candidates` by operator stand in for the kernels.
    """
    rows = []
    for bench in benches:
        ours = (candidates or {}).get(bench.op, bench.kernel())
        named = [name for name in device.verified if name in bench.dtypes and name in (dtypes or device.verified)]
        for dtype, (number, shape) in itertools.product(named, enumerate(bench.verified)):
            for asked in kernels_of(bench, device.type, DTYPES[dtype]).values():
                backend = asked or backend_of(bench, device.type, DTYPES[dtype])[0]
                candidate = ours if asked is None else forced(ours, asked)
                head = {"op": bench.op, "device": device.type, "backend": backend, "dtype": dtype}
                run = functools.partial(compared, bench, candidate, bench.inputs(shape, number), DTYPES[dtype], device)
                found, note = attempt(device, run)
                failed = {"quantity": note, "error": math.inf, "budget": 0.0, "ok": False}
                rows += [head | {"shape": str(shape)} | row for row in ([failed] if note else found)]
    return rows


def compared(bench, candidate, drawn, dtype, device) -> list[dict]:
    """Error and budget of every output and gradient."""
    drawn = {name: t.to(dtype) if t.is_floating_point() else t for name, t in drawn.items()}
    plain = bench.reference()
    kinds = ((candidate, dtype), (plain, dtype), (plain, torch.float64))
    runs = [Work(bench, drawn, kind, device.device).results(function) for function, kind in kinds]
    rows = []
    for quantity in runs[2]:
        actual, same, exact = (run[quantity] for run in runs)
        if actual.is_floating_point():
            found = accuracy(actual, same, exact)
            error, budget, ok = found.error, found.budget, found.ok
        else:
            error, budget, ok = float((actual != exact).sum()), 0.0, torch.equal(actual, exact)
        rows.append({"quantity": quantity, "error": error, "budget": budget, "ok": bool(ok)})
    return rows


def together(times: dict[str, list[float]]) -> float:
    """Milliseconds of one call of each function."""
    return sum(torch.tensor(values).median().item() for values in times.values())


def interleave(
    functions: dict, device, seconds: float, rounds: int, before=()
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of each function, one call of each in turn, and notes on those that cannot be called.

    Beforehand all are called three times in turn, or once where that takes long, and more often where a device takes its time
    to reach full speed. Those that have had earlier sittings, `before`, are called once, or where that takes long not at all.
    """
    notes: dict[str, str] = {}

    def call(name, function):
        result, note = attempt(device, function)
        if note is not None:
            notes[name] = note
        return result

    wanted = WARM_UP if not before else int(together(before[-1][0]) <= LONG_WARM_UP * 1e3)
    start = time.perf_counter()
    for calls in itertools.count():
        spent = time.perf_counter() - start
        enough = calls >= wanted or (calls > 0 and spent > LONG_WARM_UP)
        if enough and spent >= device.warm_up_seconds:
            break
        for name, function in functions.items():
            if name not in notes:
                call(name, lambda function=function: device.measure(function))
    times: dict[str, list[float]] = {name: [] for name in functions if name not in notes}
    gc.collect(1)  # of the young alone: to go through all that compilers have left takes half a second
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while times and (done < rounds or time.perf_counter() - start < seconds):
            for name in list(times):
                took = call(name, lambda name=name: device.measure(functions[name]))
                if took is None:
                    del times[name]
                else:
                    times[name].append(took)
            done += 1
            if time.perf_counter() - start > 4 * seconds and done >= 3:
                break
    finally:
        gc.enable()
    return times, notes


def statistics(times: list[float] | None) -> dict[str, float | None]:
    """Summarise milliseconds: quartiles and what pytest-benchmark knows beside them; None where there are none."""
    names = ("q1_ms", "median_ms", "q3_ms", "min_ms", "max_ms", "mean_ms", "stddev_ms")
    if not times:
        return dict.fromkeys(names)
    every = torch.tensor(times, dtype=torch.float64)
    spread = every.std(correction=0)
    found = (*every.quantile(every.new_tensor([0.25, 0.5, 0.75])), every.min(), every.max(), every.mean(), spread)
    return {name: float(value) for name, value in zip(names, found, strict=True)}


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


def peak_mb(work: Work, function, device) -> float:
    """MiB by which a training step raises what torch has allocated, at its highest."""
    work.train(function)
    for leaf in work.leaves:  # the gradients are the step's
        leaf.grad = None
    return device.peak_bytes(lambda: work.train(function)) / 2**20


#: The order in which a contestant's functions are given.
PASSES = ("fwd", "fwd+bwd")


#: What of the contestants a comparison takes: everybody; or, where time is short, one such part after the other. "mann_kernels",
#: the yardstick of all ratios, is in every part.
PARTS = ("all", "graphs", "plain", "compiled")


def belongs(name: str, part: str) -> bool:
    """Say whether a contestant is in a part."""
    if part == "all":
        return True
    compiled, graph = name.startswith("compile"), name.endswith(" graph")
    return part == ("compiled" if compiled else "graphs" if graph else "plain")


def contestants_of(bench: Bench, case: Case, device, dtype, drawn, part="all"):
    """The contestants that do the operator's work, by name; the seconds that compiling took; notes on what cannot be made."""
    ours = bench.kernel()
    functions = {
        name: ours if asked is None else forced(ours, asked)
        for name, asked in kernels_of(bench, device.type, dtype).items()
    }
    functions["eager"] = bench.eager
    functions |= bench.alternatives if case.alternatives else {}
    seconds, notes = {}, {}
    if part not in ("all", "compiled"):
        return functions, seconds, notes
    if case.uncompiled:
        notes["compile_step"] = case.uncompiled
    elif not case.heavy:
        name, function = "compile_loop" if case.loop else "compile_step", bench.compile(case.loop)
        work = Work(bench, drawn, dtype, device.device)
        before = time.perf_counter()
        _, note = attempt(device, lambda: (work.train(function), device.synchronize()))
        if note is None:
            functions[name], seconds[name] = function, time.perf_counter() - before
        else:
            notes[name] = note
    return functions, seconds, notes


def makers_of(bench: Bench, case: Case, device, dtype, drawn, functions) -> tuple[dict, dict]:
    """Functions that make the two passes of a contestant on one set of inputs, each on leaves of its own: those that do the
    operator's work, and the others."""

    def make(function):
        own = Work(bench, drawn, dtype, device.device)
        return (lambda: own.forward(function)), (lambda: own.train(function))

    tensors = Work(bench, drawn, dtype, device.device).tensors
    same = {name: functools.partial(make, function) for name, function in functions.items()}
    return same, bench.others(case.shape, tensors)


def in_turn(made):
    """The passes of a contestant, made once for every set of inputs: each call takes the next set."""

    def rotating(functions):
        turns = itertools.cycle(functions)
        return lambda: next(turns)()

    return [rotating(functions) for functions in zip(*made, strict=True)]


def memory_of(device, work: Work, functions, compiled) -> dict[str, dict]:
    """MiB kept for backward (not of the compiled ones, which the hooks would compile anew) and, at the highest, of a training
    step, by contestant; None where it does not run."""
    found = {}
    for name, function in functions.items():
        saved = None if name in compiled else attempt(device, functools.partial(saved_mb, work, function))[0]
        peak = attempt(device, functools.partial(peak_mb, work, function, device))[0]
        found[name] = {"saved_mb": saved, "peak_mb": peak}
    return found


class Comparison:
    """All contestants of one operator and size, or a part of them, both passes; on a GPU each of them as a CUDA graph as well.

    Everything is made, compiled too, before anything is timed: so the time can be taken in several sittings, with those of
    others between them. `data` is a file whose contents take the place of drawn inputs, where the operator knows it.
    """

    def __init__(
        self,
        bench: Bench,
        case: Case,
        device,
        dtype: str,
        threads: int,
        quick: bool,
        data: Path | None = None,
        part="all",
    ):
        self.bench, self.case, self.device, self.dtype, self.threads = bench, case, device, dtype, threads
        self.part = part
        self.seconds = (1.0 if quick or case.heavy else device.seconds) / device.sittings
        self.rounds = math.ceil((3 if case.heavy else 12) / device.sittings)
        self.passes = PASSES[1:] if quick else PASSES  # torch.compile has more to do for each
        real = {} if data is None else bench.real(data, case.shape)
        drawn = [bench.inputs(case.shape, seed) | real for seed in range(device.input_sets)]
        functions, self.compile_seconds, self.notes = contestants_of(bench, case, device, DTYPES[dtype], drawn[0], part)
        self.memory = self._memory(functions, drawn[0])
        self.others: set[str] = set()
        self.runs: dict[str, dict] = {name_of_pass: {} for name_of_pass in self.passes}
        self._make(functions, drawn)
        self.sittings: dict[str, list] = {name_of_pass: [] for name_of_pass in self.passes}

    def _memory(self, functions, drawn) -> dict[str, dict]:
        wanted = {name: function for name, function in functions.items() if self._is_wanted(name)}
        work = Work(self.bench, drawn, DTYPES[self.dtype], self.device.device)
        return memory_of(self.device, work, wanted, self.compile_seconds)

    def _is_wanted(self, name: str) -> bool:
        return name == "mann_kernels" or belongs(name, self.part)

    def _make(self, functions, drawn) -> None:
        """Both passes of every contestant, on all sets of inputs."""
        device = self.device
        sets = [makers_of(self.bench, self.case, device, DTYPES[self.dtype], one, functions) for one in drawn]
        self.others = set(sets[0][1])
        makers = {name: [(same | other)[name] for same, other in sets] for name in [*functions, *sets[0][1]]}
        kinds = {name: lambda make: make() for name in makers}
        if device.has_graphs:  # after the others: a capture that fails leaves those already made
            makers |= {f"{name} graph": every for name, every in makers.items()}
            kinds |= dict.fromkeys(makers.keys() - kinds.keys(), device.graphs)
        for name, every in makers.items():
            if not self._is_wanted(name):
                continue
            made, note = attempt(device, lambda name=name, every=every: in_turn([kinds[name](make) for make in every]))
            if note is not None:
                self.notes[name] = note
                continue
            for name_of_pass, function in zip(self.passes, made[-len(self.passes) :], strict=True):
                self.runs[name_of_pass][name] = function

    def sit(self) -> None:
        """Time every contestant for a while, in turns."""
        for name_of_pass, group in self.runs.items():
            before = self.sittings[name_of_pass]
            before.append(interleave(group, self.device, self.seconds, self.rounds, before))

    def rows(self) -> list[dict]:
        """The rows of all sittings, with each contestant's `of_ours`: over the rounds, its time over our first one's.

        What else a machine does slows down whole rounds: it is in the times, but hardly in the ratios.
        """
        case, device = self.case, self.device
        kind = DTYPES[self.dtype]
        work = self.bench.work(case.shape, kind.itemsize)
        limit = None if work is None else limits.peak(device, kind, self.threads)
        rows = []
        for name_of_pass, group in self.runs.items():
            if not self.sittings[name_of_pass]:  # the run was cut short before it
                continue
            times, failed = pooled(self.sittings[name_of_pass])
            ours = next((times[name] for name in group if name.startswith("mann_kernels") and name in times), [])
            for name in [*group, *self.notes]:
                kept = self.memory.get(name, {}) if name_of_pass == "fwd+bwd" else {}
                same = name.removesuffix(" graph") not in self.others
                needed = work[name_of_pass] if work is not None and same else None
                rows.append(
                    {"op": self.bench.op, "shape": case.name, "pass": name_of_pass, "contestant": name}
                    | {"threads": self.threads, "device": device.type, "dtype": self.dtype}
                    | {**statistics(times.get(name)), "rounds": len(times.get(name, ()))}
                    | ratios(times.get(name, []), ours)
                    | {"saved_mb": kept.get("saved_mb"), "peak_mb": kept.get("peak_mb")}
                    | {"compile_s": self.compile_seconds.get(name), "same_work": same}
                    | {"flops": needed and needed.flops, "bytes": needed and needed.bytes}
                    | {"least_ms": needed and limits.least_ms(needed, limit), "note": (self.notes | failed).get(name)}
                )
        return rows


def pooled(sittings) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The rounds of all sittings, and all notes; who failed in one of them has no times."""
    notes = {name: note for _, failed in sittings for name, note in failed.items()}
    times = {
        name: [one for every, _ in sittings for one in every[name]] for name in sittings[0][0] if name not in notes
    }
    return times, notes


def ratios(times: list[float], others: list[float]) -> dict[str, float | None]:
    """Median and quartiles, over the rounds that both have, of the times in the same round."""
    names, found = ("of_ours_q1", "of_ours", "of_ours_q3"), [a / b for a, b in zip(times, others, strict=False)]
    if not found:
        return dict.fromkeys(names)
    quartiles = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return dict(zip(names, quartiles.tolist(), strict=True))


def time_case(*case, **options) -> list[dict]:
    """The rows of one `Comparison` with these arguments, its sittings one after the other."""
    comparison = Comparison(*case, **options)
    for _ in range(comparison.device.sittings):
        comparison.sit()
    return comparison.rows()


def machine(threads: int, where) -> dict:
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
        "devices": {device.type: device.facts() | device.state() for device in where},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
