"""Omniglot's drawings (Lake et al. 2015) from a packed file."""

from pathlib import Path

import torch

#: The split of Vinyals et al. 2016 in three, as prototypical networks have it; "background" is the 1,200 classes that are not
#: for testing, in the numbers of Santoro et al. 2016.
SPLITS = {"train": (0,), "validation": (1,), "background": (0, 1), "test": (2,)}


def load_omniglot(path: str | Path, split: str) -> torch.Tensor:
    """The drawings of a split, uint8 [classes, drawers, 1, height, width], 255 is full ink.

    Args:
        path: an .npz with `images`, uint8 [classes, drawers, height, width], and `class_vinyals`, [classes], one of SPLITS.
        split: one of SPLITS.

    Raises:
        FileNotFoundError, ValueError: naming the file and what it lacks.
    """
    import numpy as np

    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, want one of {', '.join(SPLITS)}")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file, want Omniglot packed as .npz with `images` (uint8 [classes, drawers, height, width], "
            "255 is ink) and `class_vinyals` (0 train, 1 validation, 2 test)"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            images, classes = file["images"], file["class_vinyals"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: cannot read `images` and `class_vinyals` from it: {error}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or classes.shape != images.shape[:1]:
        got = f"images {images.dtype} {list(images.shape)}, class_vinyals {list(classes.shape)}"
        raise ValueError(f"{path}: got {got}, want uint8 [classes, drawers, height, width] and [classes]")
    return torch.from_numpy(images[np.isin(classes, SPLITS[split])]).unsqueeze(2)


def with_rotations(images: torch.Tensor) -> torch.Tensor:
    """[classes, ...] -> [4 * classes, ...]: each class turned by 0, 90, 180 and 270 degrees, each turn a class of its own."""
    return torch.cat([torch.rot90(images, turns, (-2, -1)) for turns in range(4)])
