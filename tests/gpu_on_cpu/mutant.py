"""Copies of the Triton and of the CUDA kernels with one mistake planted in their source."""

import shutil
from pathlib import Path

import mann_kernels

KERNELS = Path(mann_kernels.__file__).parent / "triton"
CSRC = Path(__file__).parents[2] / "csrc"


def mutant_of(folder: Path, change) -> str:
    """A copy of mann_kernels.triton in `folder`, every file of which went through `change`; its package name."""
    package = f"mutant_{folder.name}"
    shutil.copytree(KERNELS, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / package).glob("*.py"):
        path.write_text(change(path.name, path.read_text()).replace("mann_kernels.triton", package))
    return package


def mutant(folder: Path, file: str, right: str, wrong: str) -> str:
    """A copy in `folder`, in which `right`, found once in `file`, became `wrong`; its package name."""

    def change(name, source):
        if name != file:
            return source
        assert source.count(right) == 1
        return source.replace(right, wrong)

    return mutant_of(folder, change)


def cuda_mutant(folder: Path, file: str, right: str, wrong: str) -> Path:
    """A copy of csrc in `folder`, in which `right`, found once in csrc/cuda/`file`, became `wrong`."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    path = csrc / "cuda" / file
    source = path.read_text()
    assert source.count(right) == 1
    path.write_text(source.replace(right, wrong))
    return csrc
