"""Real input: episodes from a packed Omniglot file, in the paper's protocol."""

from pathlib import Path

import torch

CLASSES = 5


def omniglot(path: Path, T: int, B: int, seed: int = 0) -> torch.Tensor:
    """Episodes [T, B, 405]: 20 x 20 pixels in [0, 1] and the one-hot label of the step before (Santoro et al. 2016, section 4.1).

    Classes, their labels and the order of samples are drawn anew for every element of the batch.

    Raises:
        SystemExit: naming the file, where it is missing or does not hold `images` uint8 [classes, drawers, 20, 20].
    """
    import numpy as np

    try:
        images = np.load(path, allow_pickle=False)["images"]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"--data: cannot read images from {path}: {error}; want an .npz with `images`") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[2:] != (20, 20) or images.shape[0] < CLASSES:
        raise SystemExit(f"--data: got images {images.dtype} {images.shape}, want uint8 [classes, drawers, 20, 20]")
    draw = np.random.default_rng(seed)
    x = np.zeros((T, B, 400 + CLASSES), np.float32)
    for b in range(B):
        classes = draw.choice(images.shape[0], CLASSES, replace=False)
        labels = draw.integers(CLASSES, size=T)
        drawers = draw.integers(images.shape[1], size=T)
        x[:, b, :400] = images[classes[labels], drawers].reshape(T, 400) / 255.0
        x[range(1, T), b, 400 + labels[:-1]] = 1
    return torch.from_numpy(x)
