"""A small file of the schema of the packed Omniglot, with classes that can be told apart."""

from pathlib import Path

import numpy as np


def write_packed(path: Path, classes: int = 24, drawers: int = 6, side: int = 28) -> Path:
    """`images` uint8 [classes, drawers, side, side]: one random coarse pattern for a class, noise on top; two thirds of the
    classes are the training split, one sixth validation, one sixth test; the first two thirds are Lake's background."""
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 2, (classes, 1, side // 4, side // 4)) * 40
    images = np.kron(coarse, np.ones((1, 1, 4, 4), int)) + draw.integers(0, 216, (classes, drawers, side, side))
    split = np.repeat(np.uint8([0, 1, 2]), [classes - 2 * (classes // 6), classes // 6, classes // 6])
    lake = np.uint8(np.arange(classes) >= 2 * classes // 3)
    np.savez(path, images=images.astype(np.uint8), class_vinyals=draw.permutation(split), class_split=lake)
    return path
