"""What is published: the source archive is whole, the wheel works where nothing but torch is. From the archive: make test-wheel."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.compiles


def run(*command, cwd=ROOT):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_source_archive_is_whole(tmp_path):
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path)
    with tarfile.open(next(tmp_path.glob("mann_kernels-*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "mann_kernels/py.typed"}
    for folder, pattern in (("mann_kernels", "*.py"), ("csrc", "*.h"), ("csrc", "*.c*")):
        wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)}
    assert len(wanted) > 100
    assert wanted <= held, wanted - held


def clean_environment(folder: Path) -> Path:
    """The Python of a new environment, with what is installed beside torch here, by links, but not with this package."""
    site = folder / "site"
    site.mkdir(parents=True)
    for path in Path(torch.__file__).parent.parent.iterdir():
        if "mann_kernels" not in path.name:
            (site / path.name).symlink_to(path)
    venv.create(folder / "env", symlinks=True)
    next((folder / "env").glob("lib/python*/site-packages")).joinpath("linked.pth").write_text(f"{site}\n")
    return folder / "env" / "bin" / "python"


def test_the_wheel_in_a_clean_environment(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, ".")
    wheel = next(tmp_path.glob("*.whl"))
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as held:
        names = held.namelist()
    assert "mann_kernels/_C.abi3.so" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mann_kernels"}, "something else would be installed"
    python = clean_environment(tmp_path)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert "works, on baseline" in run(python, "-I", ROOT / "tests" / "wheel.py", cwd=tmp_path)
