"""Omniglot's drawings (Lake et al. 2015): from a packed file, torchvision's folder, or the official archives unpacked."""

from pathlib import Path

import torch

from mann_kernels._paths import PathError, about, reason_of
from mann_kernels.tasks._kind import on_cpu

#: The split of Vinyals et al. 2016 in three, as prototypical networks have it. "background" is the 1,200 classes that are not
#: for testing. Santoro et al. 2016 test on the classes 1201 to 1623: numbered as Omniglot's own files are, the same 423.
SPLITS = {"train": (0,), "validation": (1,), "background": (0, 1), "test": (2,)}
#: Lake et al. 2015's own: 964 classes of 30 alphabets, and 659 of 20 others, the folders images_background and images_evaluation.
LAKE_SPLITS = {"lake-background": (0,), "lake-evaluation": (1,)}
#: The shares of the three in the classes, taken in order: of all 1,623 the last 423 are for testing.
VALIDATION_FROM, TEST_FROM, CLASSES = 1028, 1200, 1623
WANT = (
    "want one of: an .npz with `images` (uint8 [classes, drawers, side, side], 255 is ink, or 105 x 105 packed by "
    "np.packbits) and `class_vinyals` (0 train, 1 validation, 2 test; for Lake's split `class_split`, 0 and 1); the root that "
    "torchvision.datasets.Omniglot downloaded to; the folder where images_background.zip and images_evaluation.zip of "
    "github.com/brendenlake/omniglot are unpacked"
)


@on_cpu
def load_omniglot(path: str | Path, split: str, side: int | None = None, seed: int | None = None) -> torch.Tensor:
    """The drawings of a split, uint8 [classes, drawers, 1, side, side], 255 is full ink.

    Args:
        path: an .npz or a folder, see Raises; a folder needs Pillow.
        split: one of SPLITS: the file's own `class_vinyals`; of a folder's classes, by name, the first 1,200 and the last 423.
            Or one of LAKE_SPLITS: the file's `class_split`, or the two folders.
        side: average the pixels down to this size; None keeps that of the data.
        seed: draw the split anew at random from all classes, with this seed and in the same shares, as the original code of
            Munkhdalai & Yu 2017 has it; then alphabets have classes in both. None keeps the split above, in which the classes
            for testing are harder.

    Raises:
        FileNotFoundError, ValueError: naming the file and what it lacks, or all that can be read.
    """
    parts = SPLITS | LAKE_SPLITS
    if split not in parts:
        raise ValueError(f"split: got {split!r}, want one of {', '.join(parts)}")
    if split in LAKE_SPLITS and seed is not None:
        raise ValueError(f"seed: got {seed} for {split!r}, want None: Lake's split is not drawn")
    path = Path(path)
    with about(path, "cannot be read"):
        there, folder = path.exists(), path.is_dir()
    if not there:
        raise FileNotFoundError(f"{path}: no such file, {WANT}")
    halves = _halves(path) if folder else None
    with about(path, "cannot be read as Omniglot"):
        key = "class_split" if split in LAKE_SPLITS else "class_vinyals"
        images, part = _from_file(path, key) if halves is None else _from_folder(path, halves, key)
        images = torch.from_numpy(images[_belongs(part, parts[split], seed)]).unsqueeze(2)
        if side is None or side == images.shape[-1]:
            return images
        if side > images.shape[-1]:
            raise PathError(f"{path}: got images of {images.shape[-1]} pixels, want at least {side}")
        return _smaller(images, side)


def _in_shares(classes: int):
    """0 train, 1 validation or 2 test for each of the classes, taken in order."""
    import numpy as np

    number = np.arange(classes) * CLASSES // classes
    return np.uint8((number >= VALIDATION_FROM) * 1 + (number >= TEST_FROM) * 1)


def _belongs(part, parts: tuple[int, ...], seed: int | None):
    """Which classes are in one of the parts."""
    import numpy as np

    if seed is not None:
        part = _in_shares(len(part))[torch.randperm(len(part), generator=torch.Generator().manual_seed(seed)).numpy()]
    return np.isin(part, parts)


def _from_file(path: Path, key: str):
    """All drawings, and which part each class is in by the array `key`."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            images, classes = file["images"], file[key]
    except Exception as error:  # a file can hold anything
        raise PathError(f"{path}: cannot read `images` and `{key}` from it: {reason_of(error)}; {WANT}") from None
    got = f"images {images.dtype} {list(images.shape)}, {key} {list(classes.shape)}"
    if images.dtype != np.uint8 or images.ndim != 4 or classes.shape != images.shape[:1]:
        raise PathError(f"{path}: got {got}, want uint8 [classes, drawers, side, side] and [classes]")
    side = images.shape[2]
    if images.shape[3] == -(-side // 8):
        images = np.unpackbits(images, axis=-1, count=side) * np.uint8(255)
    if images.shape[3] != side:
        raise PathError(f"{path}: got {got}, want square images")
    return images, classes


def _halves(root: Path) -> list[Path]:
    """<root>/[omniglot-py|python]/images_{background,evaluation}."""
    for base in (root, root / "omniglot-py", root / "python"):
        halves = [base / f"images_{half}" for half in ("background", "evaluation")]
        if all(half.is_dir() for half in halves):
            return halves
    raise FileNotFoundError(f"{root}: no images_background and images_evaluation in it, {WANT}")


def _from_folder(root: Path, halves: list[Path], key: str):
    """As from a file, of the <alphabet>/<character>/<drawing>.png in the two."""
    import numpy as np

    try:
        from PIL import Image
    except ImportError:
        raise PathError(f"{root}: reading a folder of PNGs needs Pillow (pip install pillow)") from None

    def read(file: Path):
        with about(file, "cannot be read as a picture"), Image.open(file) as picture:
            return 255 - np.asarray(picture.convert("L"))  # ink is black, that is 0, in the files

    of_half = [[folder for folder in _shown(half, "*/*") if folder.is_dir()] for half in halves]
    folders = [folder for of_one in of_half for folder in of_one]
    images = [[read(file) for file in _shown(folder, "*.png")] for folder in folders]
    shapes = {(len(drawn), *drawn[0].shape) if drawn else (0,) for drawn in images}
    if len(shapes) != 1 or shapes == {(0,)}:
        got = f"{len(folders)} classes" if images else f"only {len(folders)} classes"
        raise PathError(f"{root}: got {got} of {sorted(shapes)} drawings, want 1623 classes of 20 drawings of one size")
    part = np.repeat(np.arange(2, dtype=np.uint8), [len(of_one) for of_one in of_half])
    return np.array(images, np.uint8), part if key == "class_split" else _in_shares(len(folders))


def _shown(folder: Path, pattern: str) -> list[Path]:
    """In order, without what archivers and file managers leave beside the files: `._name`, `.DS_Store`, `__MACOSX`."""
    found = sorted(folder.glob(pattern))
    return [path for path in found if not any(p.startswith((".", "__")) for p in path.relative_to(folder).parts)]


def _smaller(images: torch.Tensor, side: int) -> torch.Tensor:
    """Each new pixel is the mean of the area under it, rounded."""
    old = images.shape[-1]
    edges, starts = torch.arange(side + 1, dtype=torch.float32) * (old / side), torch.arange(old)
    covered = torch.minimum(edges[1:, None], starts + 1) - torch.maximum(edges[:-1, None], starts)
    weights = covered.clamp(min=0) * (side / old)  # [side, old], rows sum to 1
    parts = (weights @ part.float() @ weights.t() for part in images.split(64))
    return torch.cat([part.round().to(torch.uint8) for part in parts])


def with_rotations(images: torch.Tensor) -> torch.Tensor:
    """[classes, ...] -> [4 * classes, ...]: each class turned by 0, 90, 180 and 270 degrees, each turn a class of its own."""
    return torch.cat([torch.rot90(images, turns, (-2, -1)) for turns in range(4)])
