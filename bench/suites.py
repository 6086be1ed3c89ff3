"""Which operators a suite verifies and times, and on what."""

from collections.abc import Callable
from dataclasses import dataclass

from bench import metanet, metanet_update, stems
from mann_kernels import _backend


@dataclass(frozen=True)
class Suite:
    stems: tuple[str, ...]
    shapes: dict  # by name
    verified: tuple  # shapes of the verification
    inputs: Callable  # (stem, shape, seed) -> float64 tensors by name
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16")  # of the verification


_METANET = Suite(metanet.STEMS, metanet.SHAPES, metanet.VERIFIED, metanet.inputs)
_MANN_STEMS = tuple(stem for stem in _backend.STEMS if stem not in _METANET.stems)
SUITES = {
    "mann": Suite(_MANN_STEMS, stems.SHAPES, stems.VERIFIED, stems.inputs),
    "metanet": _METANET,
    metanet_update.STEM: Suite(
        (metanet_update.STEM,), metanet_update.SHAPES, metanet_update.VERIFIED, metanet_update.inputs, ("float64",)
    ),
}


def suite_of(stem: str) -> Suite:
    return next(suite for suite in SUITES.values() if stem in suite.stems)
