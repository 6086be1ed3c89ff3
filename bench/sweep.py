"""How time and saved memory of a training step grow with one size while the others stay."""

import functools
import math
from dataclasses import dataclass, replace

import torch

from bench import harness
from bench.devices import attempt
from bench.operators import DTYPES, Axis, Bench

OUT_OF_TIME, OUT_OF_MEMORY = "out of time", "out of memory"
#: For a point, in all sittings together: calls in turn for so long, and at least so many.
SECONDS, ROUNDS = 0.6, 3
#: A training step holds the gradients of what was kept as well.
HELD = 2


@dataclass(frozen=True)
class Bounds:
    """Bounds that no point may exceed: seconds of one training step, MiB that it holds."""

    seconds: float = 2.0
    memory_mb: float = 2048.0


def exponent(points: list[tuple[float, float]]) -> float | None:
    """The slope of log(y) over log(x) by least squares; None of fewer than two points."""
    if len({x for x, _ in points}) < 2:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def predicted(points: list[tuple[float, float]], value: float) -> float:
    """Predict y at a larger value: by a power law through the last two points, at least proportional."""
    if not points:
        return 0.0
    (x, y), slope = points[-1], max(1.0, exponent(points[-2:]) or 1.0)
    return y * (value / x) ** slope


class Contestant:
    """One that is measured at growing values until it would exceed the bounds; with `plain`, that one as a CUDA graph."""

    def __init__(self, name: str, function, plain: "Contestant | None" = None):
        self.name, self.function, self.plain = name, function, plain
        self.times: list[tuple[float, float]] = []
        self.saved: list[tuple[float, float]] = []
        self.note: str | None = None

    def may_run(self, value: int, bounds: Bounds) -> bool:
        """Say whether no bound would be exceeded. Who has once exceeded one is not asked again."""
        if self.note is None and predicted(self.times, value) > bounds.seconds:
            self.note = OUT_OF_TIME
        if self.note is None and HELD * predicted(self.saved, value) > bounds.memory_mb:
            self.note = OUT_OF_MEMORY
        return self.note is None

    def keep(self, value: int, median_ms: float, saved_mb: float | None, bounds: Bounds) -> None:
        self.times.append((value, median_ms / 1e3))
        if saved_mb:
            self.saved.append((value, saved_mb))
        if median_ms / 1e3 > bounds.seconds:
            self.note = OUT_OF_TIME


def entrants(bench: Bench, axis: Axis, compiled: bool, graphs: bool) -> list[Contestant]:
    """Ours, the eager one and, where it is wanted, the compiled one; on a GPU each as a graph too."""
    found = [Contestant("mann_kernels", bench.kernel()), Contestant("eager", bench.eager)]
    if axis.compiled_once or compiled:
        found.append(Contestant("compile_step", bench.compile(loop=False)))
    return found + [Contestant(f"{one.name} graph", one.function, one) for one in found if graphs]


class Point:
    """All contestants that run at one value, each on tensors of its own; notes on those that do not, or fail."""

    def __init__(
        self, bench: Bench, shape, value: int, everybody: list[Contestant], device, dtype: torch.dtype, bounds: Bounds
    ):
        self.bench, self.value, self.device = bench, value, device
        self.steps, self.saved, self.sittings = {}, {}, []
        running = [one for one in everybody if one.may_run(value, bounds)]
        self.notes = {one.name: one.note for one in everybody if one not in running}
        drawn = bench.inputs(shape, 0) if running else {}
        for one in running:
            make = functools.partial(self.make, one, drawn, dtype)
            if one.plain is None:
                step, one.note = attempt(device, make)
            elif one.plain.note is None:
                replays, one.note = attempt(device, lambda make=make: device.graphs(lambda: [make()]))
                step = None if replays is None else replays[0]
            else:  # who is called no more is not called for a capture either
                one.note = one.plain.note
            if one.note is None:
                self.steps[one.name] = step
        times, failed = self.sit()
        for one in running:
            one.note = self.notes[one.name] = one.note or failed.get(one.name)
            if one.note is None:
                one.keep(value, torch.tensor(times[one.name]).median().item(), self.saved.get(one.name), bounds)

    def make(self, one: Contestant, drawn: dict, dtype: torch.dtype):
        """A training step on tensors of its own; on the way it is compiled, or what it saves is noted."""
        work = harness.Work(self.bench, drawn, dtype, self.device.device)
        step = functools.partial(work.train, one.function)
        if one.name == "compile_step":  # here and not while the clock runs; the hooks of saved_mb would compile it anew
            step()
        elif one.plain is None:
            self.saved[one.name] = harness.saved_mb(work, one.function)
        return step

    def sit(self) -> tuple[dict, dict]:
        sittings = self.device.sittings
        rounds = math.ceil(ROUNDS / sittings)
        found = harness.interleave(self.steps, self.device, SECONDS / sittings, rounds, self.sittings)
        self.sittings.append(found)
        if len(self.sittings) == sittings:
            self.steps = {}  # their memory is free for the next
        return found

    def numbers(self, name: str) -> dict:
        """Statistics, saved memory and note of one contestant, of all sittings."""
        times, failed = harness.pooled(self.sittings)
        saved, note = self.saved.get(name), self.notes[name] or failed.get(name)
        return harness.statistics(times.get(name)) | {"saved_mb": saved, "note": note}


def run(bench: Bench, variable: str, device, dtype: str, threads: int, bounds: Bounds, compiled=False) -> list[dict]:
    """A row for every value and contestant; those that were not run, or failed, say why in `note`."""
    axis, points = bench.axes[variable], []
    everybody = entrants(bench, axis, compiled, device.has_graphs)
    for value in axis.values + (axis.on_gpu if device.type == "cuda" else ()):
        shape = replace(axis.base, **{variable: value})
        points.append(Point(bench, shape, value, everybody, device, DTYPES[dtype], bounds))
        if compiled and not axis.compiled_once:
            renew(bench, everybody)
    for _ in range(1, device.sittings):
        for point in points:
            point.sit()
    return [
        {"variable": variable, "value": point.value, "contestant": one.name, "threads": threads, "device": device.type}
        | {"dtype": dtype, "dominates": point.value >= axis.dominates, **point.numbers(one.name)}
        for point in points
        for one in everybody
    ]


def renew(bench: Bench, everybody: list[Contestant]) -> None:
    """A compiled step of other sizes is compiled anew, or torch would make its sizes symbols."""
    function = bench.compile(loop=False)
    for one in everybody:
        if one.name.startswith("compile_step"):
            one.function = function


def fits(rows: list[dict]) -> list[dict]:
    """Exponents of time, and of what is saved, where the size dominates, by device, size and contestant.

    The times are the shortest: what else a machine does only ever adds to them, to one point's more than to another's.
    """
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        kept = found.setdefault((row["device"], row["variable"], row["contestant"]), [])
        if row["dominates"] and row["median_ms"] is not None:
            kept.append(row)
    return [
        {
            "device": device,
            "variable": variable,
            "contestant": contestant,
            "from": min((row["value"] for row in kept), default=None),
            "to": max((row["value"] for row in kept), default=None),
            "time": exponent([(row["value"], row["min_ms"]) for row in kept]),
            "saved": exponent([(row["value"], row["saved_mb"]) for row in kept if row["saved_mb"]]),
        }
        for (device, variable, contestant), kept in found.items()
    ]
