"""Which operators a suite verifies and times, and on what."""

from collections.abc import Callable
from dataclasses import dataclass

from bench import metanet, metanet_augmented, metanet_update, stems
from mann_kernels import _backend


@dataclass(frozen=True)
class Family:
    """Operators that are measured at the same shapes."""

    stems: tuple[str, ...]
    shapes: dict  # by name
    verified: tuple  # shapes of the verification
    inputs: Callable  # (stem, shape, seed) -> float64 tensors by name
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16")  # of the verification


_LAYERS = tuple(
    Family((stem,), metanet_augmented.SHAPES[stem], metanet_augmented.VERIFIED[stem], metanet_augmented.inputs)
    for stem in metanet_augmented.STEMS
)
_UPDATE = Family(
    (metanet_update.STEM,), metanet_update.SHAPES, metanet_update.VERIFIED, metanet_update.inputs, ("float64",)
)
_METANET = (Family(metanet.STEMS, metanet.SHAPES, metanet.VERIFIED, metanet.inputs), *_LAYERS, _UPDATE)
_OTHERS = {stem for family in _METANET for stem in family.stems}
_MANN = Family(
    tuple(stem for stem in _backend.STEMS if stem not in _OTHERS), stems.SHAPES, stems.VERIFIED, stems.inputs
)
SUITES = {"mann": (_MANN,), "metanet": _METANET}


def family_of(stem: str) -> Family:
    return next(family for suite in SUITES.values() for family in suite if stem in family.stems)


def in_metanet(stem: str) -> bool:
    return stem in _OTHERS
