"""The suites: for each family of operators its stems, and what verification and timing need to know of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench import contestants, stems


@dataclass(frozen=True)
class Case:
    """One line of a plan: a stem at a size, and what is left out there."""

    stem: str
    name: str
    shape: Any
    loop: bool = False  # torch.compile the whole loop, not the step
    heavy: bool = False  # two rounds, nothing compiled


@dataclass(frozen=True)
class Suite:
    stems: tuple[str, ...]
    #: Sizes by name; the first is the paper's.
    shapes: Mapping[str, Any]
    #: Names of the sizes that are timed unless others are asked for, by device type.
    usual: Mapping[str, tuple[str, ...]]
    #: Sizes that every kernel is verified on.
    verified: tuple
    #: inputs(stem, shape, seed=0, x=None) -> float64 CPU tensors by name, in the order of the operator's arguments.
    inputs: Callable
    #: constant(stem) -> the names of inputs that are data or state and get no gradient.
    constant: Callable[[str], set[str]]
    #: What one would write in plain PyTorch, by stem: the same arguments, the same results.
    eager: Mapping[str, Callable]
    #: compiled(stem, loop) -> the eager contestant under torch.compile, its step alone or with the loop over time.
    compiled: Callable[[str, bool], Callable]
    #: others(stem, shape, tensors) -> functions by name that make a (forward pass, training step) of another kind.
    others: Callable[[str, Any, dict], dict[str, Callable]]
    #: plan(stems, shape names, quick) -> the cases.
    plan: Callable[[Iterable[str], Iterable[str], bool], Iterable[Case]]


#: Steps of the loop that torch.compile unrolls: at 50 steps it compiles for minutes.
LOOP_STEPS = 12


def _mann_plan(chosen, shapes, quick):
    for stem in chosen:
        episode = stem == "mann_sequence"
        for name in shapes:
            if name == "long" and (quick or not episode):
                continue
            if not episode and name not in ("paper", "wide", "batch"):
                continue
            shape = stems.SHAPES[name]
            yield Case(stem, name, shape, heavy=name == "long")
            if episode and name not in ("long", "batch") and not quick:
                yield Case(stem, f"{name}@T={LOOP_STEPS}", shape.at(LOOP_STEPS), loop=True)


MANN = Suite(
    stems=tuple(contestants.EAGER),
    shapes=stems.SHAPES,
    usual={"cpu": tuple(name for name in stems.SHAPES if name != "batch"), "cuda": tuple(stems.SHAPES)},
    verified=stems.VERIFIED,
    inputs=stems.inputs,
    constant=stems.constant,
    eager=contestants.EAGER,
    compiled=contestants.compiled,
    others=contestants.others,
    plan=_mann_plan,
)

SUITES: dict[str, Suite] = {"mann": MANN}


def suite_of(stem: str) -> Suite:
    return next(suite for suite in SUITES.values() if stem in suite.stems)
