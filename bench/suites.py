"""The suites: for each family of operators its stems, and what verification and timing need to know of them."""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import mann_kernels
from bench import contestants, metanet, metanet_augmented, metanet_update, peers, stems
from mann_kernels import _backend, reference


@dataclass(frozen=True)
class Case:
    """One line of a plan: a stem at a size, and what is left out there."""

    stem: str
    name: str
    shape: Any
    loop: bool = False  # torch.compile the whole loop, not the step
    heavy: bool = False  # few rounds, nothing compiled
    uncompiled: str | None = None  # why nothing is compiled otherwise
    alternatives: bool = True  # with the suite's for the stem


@dataclass(frozen=True)
class Suite:
    stems: tuple[str, ...]
    #: operators(stem) -> the operators that it runs: itself, or the several that it is made of.
    operators: Callable[[str], tuple[str, ...]]
    #: Sizes by name, of all its stems; the first that is planned for a stem is the paper's.
    shapes: Mapping[str, Any]
    #: Names of the sizes that are timed unless others are asked for, by device type.
    usual: Mapping[str, tuple[str, ...]]
    #: verified(stem) -> the sizes that its kernels are verified on.
    verified: Callable[[str], tuple]
    #: dtypes(stem) -> the names of the dtypes that its kernels are verified in, as far as a device takes them.
    dtypes: Callable[[str], Collection[str]]
    #: inputs(stem, shape, seed=0) -> float64 CPU tensors by name, in the order of the operator's arguments.
    inputs: Callable
    #: constant(stem) -> the names of inputs that are data or state and get no gradient.
    constant: Callable[[str], set[str]]
    #: ours(stem), plain(stem) -> the operator and its reference, with the options that it is measured with; what is made of
    #: several has no reference and is verified against the eager one.
    ours: Callable[[str], Callable]
    plain: Callable[[str], Callable]
    #: What one would write in plain PyTorch, by stem: the same arguments, the same results.
    eager: Mapping[str, Callable]
    #: Other ways to write it, by name, which lose at most sizes; by stem, where there are any.
    alternatives: Mapping[str, Mapping[str, Callable]]
    #: compiled(stem, loop) -> the eager contestant under torch.compile, its step alone or with the loop over time.
    compiled: Callable[[str, bool], Callable]
    #: others(stem, shape, tensors) -> functions by name that make a (forward pass, training step) of another kind.
    others: Callable[[str, Any, dict], dict[str, Callable]]
    #: plan(stems, shape names, quick) -> the cases.
    plan: Callable[[Iterable[str], Iterable[str], bool], Iterable[Case]]
    #: notices(stems) -> which contestants are left out on this machine, and why.
    notices: Callable[[Iterable[str]], list[str]] = lambda stems: []


#: By name, those that every operator takes.
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


def _called(module, options, others):
    return lambda stem: others.get(stem) or functools.partial(getattr(module, stem), **options.get(stem, {}))


#: Steps of the loop that torch.compile unrolls: at 50 steps it compiles for minutes, at 12 for most of one; --quick has fewer.
LOOP_STEPS, QUICK_LOOP_STEPS = 12, 6


def _mann_plan(chosen, shapes, quick):
    for stem in chosen:
        episode = stem == "mann_sequence"
        for name in shapes:
            if name == "long" and (quick or not episode):
                continue
            if not episode and name not in ("paper", "wide", "batch"):
                continue
            shape = stems.SHAPES[name]
            # the other structures take twice as long as everybody else together: --quick has them at the paper's size alone
            yield Case(stem, name, shape, heavy=name == "long", alternatives=not quick or name == "paper")
            if episode and (name == "paper" or (name not in ("long", "batch") and not quick)):
                steps = QUICK_LOOP_STEPS if quick else LOOP_STEPS
                yield Case(stem, f"{name}@T={steps}", shape.at(steps), loop=True)


MANN = Suite(
    stems=stems.STEMS,
    operators=lambda stem: (stem,),
    shapes=stems.SHAPES,
    usual={"cpu": tuple(name for name in stems.SHAPES if name != "batch"), "cuda": tuple(stems.SHAPES)},
    verified=lambda stem: stems.VERIFIED,
    dtypes=lambda stem: DTYPES,
    inputs=stems.inputs,
    constant=stems.constant,
    ours=_called(mann_kernels, {}, {}),
    plain=_called(reference, {}, {}),
    eager=contestants.EAGER,
    alternatives=peers.ALTERNATIVES,
    compiled=contestants.compiled,
    others=contestants.others,
    plan=_mann_plan,
    notices=lambda stems: peers.notices() if "mann_sequence" in stems else [],
)

_UPDATE = metanet_update.STEM
_METANET_EAGER = metanet.EAGER | metanet_augmented.EAGER | {_UPDATE: metanet_update.eager}
_METANET_SHAPES = dict.fromkeys(metanet.STEMS, metanet.SHAPES) | metanet_augmented.SHAPES
_METANET_SHAPES |= {_UPDATE: metanet_update.SHAPES}
_METANET_VERIFIED = dict.fromkeys(metanet.STEMS, metanet.VERIFIED) | metanet_augmented.VERIFIED
_METANET_VERIFIED |= {_UPDATE: metanet_update.VERIFIED}
_METANET_INPUTS = dict.fromkeys(metanet.STEMS, metanet.inputs)
_METANET_INPUTS |= dict.fromkeys(metanet_augmented.STEMS, metanet_augmented.inputs) | {_UPDATE: metanet_update.inputs}
_METANET_NAMES = {name: shape for shapes in _METANET_SHAPES.values() for name, shape in shapes.items()}


def _metanet_plan(chosen, shapes, quick):
    for stem in chosen:
        for name in shapes:
            if name in _METANET_SHAPES[stem]:
                # --quick leaves out the compiling that takes as long as all the others together
                why = "not compiled by --quick" if quick and stem == _UPDATE else None
                yield Case(stem, name, _METANET_SHAPES[stem][name], uncompiled=why)


METANET = Suite(
    stems=tuple(_METANET_EAGER),
    operators=lambda stem: metanet_update.OPERATORS if stem == _UPDATE else (stem,),
    shapes=_METANET_NAMES,
    usual={"cpu": tuple(_METANET_NAMES), "cuda": tuple(_METANET_NAMES)},
    verified=_METANET_VERIFIED.__getitem__,
    dtypes=lambda stem: metanet_update.DTYPES if stem == _UPDATE else DTYPES,
    inputs=lambda stem, shape, seed=0: _METANET_INPUTS[stem](stem, shape, seed),
    constant=lambda stem: {"x", "support_x", "query_x"},
    ours=_called(mann_kernels, metanet_augmented.OPTIONS, {_UPDATE: metanet_update.ours}),
    plain=_called(reference, metanet_augmented.OPTIONS, {_UPDATE: metanet_update.eager}),
    eager=_METANET_EAGER,
    alternatives=metanet_augmented.ALTERNATIVES,
    compiled=lambda stem, loop: contestants.compiled_anew(_METANET_EAGER[stem]),
    others=lambda stem, shape, tensors: {},
    plan=_metanet_plan,
)

#: Sizes beside others that --quick leaves out, unless they are asked for.
NOT_QUICK = ("single", "small", "miniimagenet", "conv 14", "conv 4")

SUITES: dict[str, Suite] = {"mann": MANN, "metanet": METANET}


def suite_of(stem: str) -> Suite:
    return next(suite for suite in SUITES.values() if stem in suite.stems)


def forced(function: Callable, backend: str) -> Callable:
    """The function with all its operators, backward too, on one implementation."""

    def run(*arguments):
        with mann_kernels.backend(backend):
            return function(*arguments)

    return run


def _sizes(stem: str, shape) -> dict | None:
    """What the choice of an implementation depends on, as in mann_kernels._backend.missing."""
    if stem != "mann_sequence" or shape is None:
        return None
    return {name: getattr(shape, name) for name in "NWRH"} | {"write_add": False, "key_strength": False}


def kernels_of(stem: str, device: str, dtype: torch.dtype, shape=None) -> dict[str, str | None]:
    """The contestants that are ours, with the implementation that each asks for: the default, and on a GPU the others that can."""
    operators, sizes, found = suite_of(stem).operators(stem), _sizes(stem, shape), {"mann_kernels": None}
    defaults = {_backend.default(operator, device, dtype)[0] for operator in operators}
    for other in ("cuda", "triton") if device == "cuda" else ():
        able = not any(_backend.missing(other, operator, device, dtype) for operator in operators)
        if able and defaults != {other}:
            found[f"mann_kernels {other}"] = other
    return found


def backend_of(stem: str, device: str, dtype: torch.dtype, shape=None) -> tuple[str, str | None]:
    """The implementations of a stem's operators there, and why one of them is not a kernel (None if each is one)."""
    sizes = _sizes(stem, shape)
    found = [_backend.default(operator, device, dtype) for operator in suite_of(stem).operators(stem)]
    return ", ".join(sorted({name for name, _ in found})), next((why for _, why in found if why is not None), None)
