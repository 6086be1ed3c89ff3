"""setup.py: what it compiles with what, and a library that was linked without an instruction set."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mann_kernels import _library

ROOT = Path(__file__).parent.parent


class TestSetup:
    """setup.py on a tree with one source for the CPU and one for GPUs."""

    @pytest.fixture
    def tree(self, tmp_path):
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tmp_path)
        for folder in ("mann_kernels", "csrc/cpu", "csrc/cuda"):
            (tmp_path / folder).mkdir(parents=True)
        shutil.copy(ROOT / "mann_kernels" / "_version.py", tmp_path / "mann_kernels")
        (tmp_path / "mann_kernels" / "__init__.py").touch()
        (tmp_path / "csrc/cpu/one.cpp").touch()
        (tmp_path / "csrc/cells.h").touch()
        (tmp_path / "csrc/cuda/one.cpp").touch()
        (tmp_path / "csrc/cuda/one.cu").write_text("a kernel")
        return tmp_path

    def build(self, tree, **environment):
        """What setup.py says, and whether it leaves the CUDA library in the tree."""
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tree / "mann_kernels/_C.abi3.so").exists()
        return done.stderr, (tree / "mann_kernels/_CUDA.abi3.so").exists()

    @pytest.mark.compiles
    def test_cuda(self, tree):
        """The kernels go into the library as text; what changed is there at the next build."""
        said, there = self.build(tree)
        assert there, said
        assert b"a kernel" in (tree / "mann_kernels/_CUDA.abi3.so").read_bytes()
        (tree / "csrc/cuda/one.cu").write_text("another one")
        self.build(tree)
        assert b"another one" in (tree / "mann_kernels/_CUDA.abi3.so").read_bytes()
        # switched off, what was built before is gone too
        said, there = self.build(tree, MANN_CUDA="0")
        assert "building without CUDA kernels: MANN_CUDA=0" in said
        assert not there

    @pytest.mark.compiles
    def test_a_path_with_spaces_and_other_signs(self, tree):
        odd = tree / "a b" / "c$d e'f"
        odd.mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "mann_kernels", "csrc"):
            shutil.move(tree / name, odd / name)
        (odd / "csrc/cpu/one.h").write_text("#define NUMBER 1\n")
        (odd / "csrc/cpu/one.cpp").write_text(
            '#include "one.h"\n[[maybe_unused]] static int number() { return NUMBER; }\n'
        )
        assert self.build(odd, MANN_CUDA="0", MANN_NATIVE="1")[1] is False
        built = next((odd / "build/ninja").glob("*one.o"))
        first = built.stat().st_mtime_ns
        (odd / "csrc/cpu/one.h").write_text("#define NUMBER 2\n")
        self.build(odd, MANN_CUDA="0", MANN_NATIVE="1")  # its dependencies are followed too
        assert built.stat().st_mtime_ns > first

    @pytest.mark.compiles
    def test_what_this_machine_runs(self, tree):
        if shutil.which("nvidia-smi"):
            pytest.skip("a driver is here")
        said, there = self.build(tree, MANN_NATIVE="1")
        assert (said, there) == ("", False)
        made = {path.stem.split("-")[0] for path in (tree / "build/ninja").glob("*.o")}
        best = {"AVX2": "avx2", "AVX512": "avx512"}.get(torch.backends.cpu.get_cpu_capability())
        assert made == ({"baseline"} if best is None else {"entry", best})
        # of what was built before, all stays that is a library of its own
        assert self.build(tree) == ("", True)
        assert self.build(tree, MANN_NATIVE="1") == ("", True)


@pytest.mark.compiles
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set")
def test_a_library_linked_without_an_instruction_set_never_picks_it(tmp_path):
    best = _library.ISAS.index(_library.cpu_isa())
    objects = []
    for isa in _library.ISAS[:3]:  # the last one's kernels are those of the one before
        objects.append(tmp_path / f"{isa}.o")
        flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", f"-DMANN_ISA={isa}"]
        flags += ["-DMANN_ENTRY=1"] if isa == "baseline" else []
        subprocess.run(["c++", *flags, "-c", ROOT / "csrc/cpu/isa.cpp", "-o", objects[-1]], check=True)
    for absent in (1, 2):
        linked = [built for number, built in enumerate(objects) if number != absent]
        library = tmp_path / f"without-{absent}.so"
        subprocess.run(["c++", "-shared", *linked, "-o", library], check=True)
        pick = ctypes.CDLL(str(library)).mann_cpu_isa
        usable = [number for number in range(best + 1) if min(number, 2) != absent]
        assert [pick(limit) for limit in (-1, 0, 1, 2, 3)] == [
            usable[-1], *[max(n for n in usable if n <= limit) for limit in range(4)]
        ]  # fmt: skip
    # entry points alone: what is there for any limit, and where this machine runs nothing of it, that
    objects[0] = tmp_path / "entry.o"
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DMANN_ISA=baseline", "-DMANN_ENTRY=1"]
    command = ["c++", *flags, "-DMANN_ENTRY_ALONE=1", "-c", ROOT / "csrc/cpu/isa.cpp", "-o", objects[0]]
    subprocess.run(command, check=True)
    for number in (1, 2, None):
        library = tmp_path / f"only-{number}.so"
        linked = objects[:1] if number is None else [objects[0], objects[number]]
        subprocess.run(["c++", "-shared", *linked, "-o", library], check=True)
        pick = ctypes.CDLL(str(library)).mann_cpu_isa
        runs = number is not None and number <= best
        lone = max(number, best) if number == 2 else number
        assert [pick(limit) for limit in (-1, 0, 1)] == [lone if runs else -1] * 3


def test_a_library_for_another_cpu_is_not_used(monkeypatch):
    for name in ("cpp_missing", "cpp_kernels", "_cpu_isa"):
        monkeypatch.setattr(_library, name, getattr(_library, name))
    monkeypatch.setattr(_library, "_cpu_isa", None)
    monkeypatch.setattr(_library, "_load", lambda *names: (None, "_C.so", frozenset(["lrua_step"])))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(mann_cpu_isa=lambda limit: -1))
    _library.load_cpp()
    assert _library.cpp_missing == "_C.so was built with MANN_NATIVE=1 for another CPU: build it again"
    assert (_library.cpp_kernels, _library.cpu_isa()) == (frozenset(), None)
