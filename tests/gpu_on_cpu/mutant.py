"""Copies of the Triton kernels with one mistake planted in their source."""

import shutil
from pathlib import Path

import mann_kernels

KERNELS = Path(mann_kernels.__file__).parent / "triton"


def mutant(folder: Path, file: str, right: str, wrong: str) -> str:
    """A copy of mann_kernels.triton in `folder`, in which `right`, found once in `file`, became `wrong`; its package name."""
    package = f"mutant_{folder.name}"
    shutil.copytree(KERNELS, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / package).glob("*.py"):
        path.write_text(path.read_text().replace("mann_kernels.triton", package))
    source = (folder / package / file).read_text()
    assert source.count(right) == 1
    (folder / package / file).write_text(source.replace(right, wrong))
    return package
