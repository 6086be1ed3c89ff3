"""The description of an operator for the bench, and the search for all of them: each file bench_<op>.py holds one, and
nothing else names any."""

import functools
import importlib
import itertools
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mann_kernels
from bench import counts
from mann_kernels import _backend, reference

# What an earlier run compiled would hide how long compiling takes. torch warns of that.
torch.compiler.config.force_disable_caches = True
warnings.filterwarnings("ignore", "dynamo_pgo force disabled")

#: By name, the dtypes that every operator takes.
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


@dataclass(frozen=True)
class Case:
    """Describes a size at which an operator is timed, and what is left out there."""

    name: str
    shape: Any
    rank: int = 1  # --minutes takes the lowest first: 0 is what the package is for
    devices: tuple[str, ...] = ("cpu", "cuda")  # where it is timed unless it is asked for
    quick: bool = True  # whether --quick has it unless it is asked for
    loop: bool = False  # torch.compile the whole loop over time, not the step
    heavy: bool = False  # few rounds, nothing compiled
    uncompiled: str | None = None  # why nothing is compiled otherwise
    alternatives: bool = True  # with the operator's alternatives

    @property
    def size(self) -> str:
        """The name that --shape knows it by."""
        return self.name.split("@")[0]


@dataclass(frozen=True)
class Axis:
    """Describes which size of an operator a sweep lets grow while the others stay."""

    base: Any
    values: tuple[int, ...]
    #: The values from which on this size dominates the time: the exponent is fitted there.
    dominates: int
    #: torch.compile has the step alone, so that one compilation does for every value.
    compiled_once: bool = False
    #: More values, on a GPU.
    on_gpu: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bench:
    """An operator: how its inputs are drawn, what it is verified and timed on, and what it is compared with."""

    op: str
    suite: str
    #: inputs(shape, seed) -> float64 CPU tensors by name, in the order of the operator's arguments.
    inputs: Callable[[Any, int], dict[str, torch.Tensor]]
    #: The names of inputs that are data or state and get no gradient.
    constant: Collection[str]
    #: The sizes that the kernels are verified on.
    verified: tuple
    #: cases(quick) -> the sizes to time, the paper's first.
    cases: Callable[[bool], list[Case]]
    #: What one would write in plain PyTorch: the same arguments, the same results.
    eager: Callable
    #: products(shape), sizes(shape) -> the work, see bench.counts; None where what is timed is no single operator.
    products: Callable[[Any], list[counts.Product]] | None = None
    sizes: Callable[[Any], counts.Sizes] | None = None
    #: What the operator and its reference are called with beside the tensors.
    options: Mapping[str, Any] = field(default_factory=dict)
    #: What is timed as ours and what is taken as its definition; by default the operator and the reference of this name.
    ours: Callable | None = None
    plain: Callable | None = None
    #: The operators that it runs; by default the one of this name.
    parts: tuple[str, ...] = ()
    #: The names of the dtypes that it is verified in, as far as a device takes them.
    dtypes: Collection[str] = tuple(DTYPES)
    #: Other ways to write it, by name, which lose at most sizes.
    alternatives: Mapping[str, Callable] = field(default_factory=dict)
    #: compiled(loop) -> the eager contestant under torch.compile, its step alone or with the loop over time.
    compiled: Callable[[bool], Callable] | None = None
    #: others(shape, tensors) -> functions by name that make a (forward pass, training step) of another kind.
    others: Callable[[Any, dict], dict[str, Callable]] = lambda shape, tensors: {}
    #: real(path, shape) -> what --data has in the place of drawn inputs, by name.
    real: Callable[[Path, Any], dict[str, torch.Tensor]] = lambda path, shape: {}
    #: Which contestants are left out on this machine, and why.
    notices: Callable[[], list[str]] = list
    #: What a sweep lets grow, by name.
    axes: Mapping[str, Axis] = field(default_factory=dict)

    def kernel(self) -> Callable:
        """Return the function that is timed as ours."""
        return self.ours or functools.partial(getattr(mann_kernels, self.op), **self.options)

    def reference(self) -> Callable:
        """Return the function that defines the right result."""
        return self.plain or functools.partial(getattr(reference, self.op), **self.options)

    def compile(self, loop: bool) -> Callable:
        """The eager contestant under torch.compile."""
        return self.compiled(loop) if self.compiled else compiled_anew(self.eager)

    def work(self, shape, itemsize: int) -> dict[str, counts.Work] | None:
        """Count the least work of a shape, by pass."""
        if self.products is None or self.sizes is None:
            return None
        return counts.work(self.products(shape), self.sizes(shape), itemsize, self.constant)

    def planned(self, device: str, quick: bool, shapes: Collection[str] | None = None) -> list[Case]:
        """The cases to time on a kind of device: the usual ones, or those of the sizes asked for."""
        return [
            case
            for case in self.cases(quick)
            if (case.size in shapes if shapes else device in case.devices and (case.quick or not quick))
        ]


_numbers = itertools.count()


def compiled_anew(function: Callable) -> Callable:
    """Under torch.compile, whatever was compiled before, and leaving that: code of its own, which is what torch goes by."""

    def fresh(*arguments):
        return function(*arguments)

    fresh.__code__ = fresh.__code__.replace(co_name=f"compiled_{next(_numbers)}")
    return torch.compile(fresh, dynamic=False)


def normals(seed: int) -> Callable[..., torch.Tensor]:
    """A function from sizes to float64 tensors drawn from the normal distribution, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *sizes: torch.randn(sizes, generator=generator, dtype=torch.float64)


def forced(function: Callable, backend: str) -> Callable:
    """The function with all its operators, backward too, on one implementation."""

    def run(*arguments):
        with mann_kernels.backend(backend):
            return function(*arguments)

    return run


def kernels_of(bench: Bench, device: str, dtype: torch.dtype) -> dict[str, str | None]:
    """The contestants that are ours, with the implementation that each asks for: the default, and on a GPU the others that can."""
    parts, found = bench.parts or (bench.op,), {"mann_kernels": None}
    defaults = {_backend.default(part, device, dtype)[0] for part in parts}
    for other in ("cuda", "triton") if device == "cuda" else ():
        able = not any(_backend.missing(other, part, device, dtype) for part in parts)
        if able and defaults != {other}:
            found[f"mann_kernels {other}"] = other
    return found


def backend_of(bench: Bench, device: str, dtype: torch.dtype) -> tuple[str, str | None]:
    """The implementations that run, and why one of them is not a kernel (None if each is one)."""
    found = [_backend.default(part, device, dtype) for part in bench.parts or (bench.op,)]
    return ", ".join(sorted({name for name, _ in found})), next((why for _, why in found if why is not None), None)


@functools.cache
def operators() -> dict[str, Bench]:
    """All of them by name, in the order of the package: what is made of several comes last."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    found = [importlib.import_module(f"bench.{name}").BENCH for name in names]
    place = {op: number for number, op in enumerate(_backend.OPS)}
    return {bench.op: bench for bench in sorted(found, key=lambda bench: place.get(bench.op, len(place)))}
