"""Builds mann_kernels/_C.abi3.so: the C++ kernels, against PyTorch's stable ABI.

It is not a Python module: torch.ops.load_library loads it, and it needs neither libpython nor one particular torch, so one
binary serves every Python >= 3.10 and torch >= 2.10. Everything else about the package is in pyproject.toml.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# Strict floating point but for contraction and traps: NaN and infinity must behave, so no -ffast-math.
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"
# Each source is compiled once per instruction set. The baseline comes first, here and in the link line: it has the entry points,
# and where several objects emit the same inline function of a header, the linker keeps the first, which every machine can run.
ISAS = {"baseline": "-DMANN_ENTRY=1"}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = "-mavx2 -mfma"
    ISAS["avx512"] = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512"


def ninja_file(output: Path, objects: Path) -> str:
    """The whole build, for ninja: it rebuilds what a changed source, header or flag touches."""
    import torch.utils.cpp_extension as cpp

    compiler = os.environ.get("CXX", "c++")
    sanitizers = os.environ.get("MANN_SANITIZE")  # e.g. "address,undefined"
    extra = f" -fsanitize={sanitizers} -fno-omit-frame-pointer -O2 -g1" if sanitizers else ""
    includes = " ".join(f"-isystem {path}" for path in cpp.include_paths()) + f" -I{ROOT / 'csrc'}"
    libraries = " ".join(f"-L{path}" for path in cpp.library_paths()) + " -ltorch_cpu"
    lines = [
        "rule compile",
        f"  command = {compiler} {FLAGS}{extra} {STABLE_ABI} {includes} $isa -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {compiler} -shared{extra} $in {libraries} -o $out",
    ]
    built = []
    for isa, flags in ISAS.items():
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            built.append(objects / f"{isa}-{source.stem}.o")
            lines += [f"build {built[-1]}: compile {source}", f"  isa = -DMANN_ISA={isa} {flags}"]
    lines.append(f"build {output}: link {' '.join(map(str, built))}")
    return "\n".join(lines) + "\n"


class BuildNinja(build_ext):
    """Compiles with ninja. Without a C++ compiler there is no extension, and the package runs its reference."""

    def build_extension(self, ext):
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            print(
                "mann_kernels: no C++ compiler found: building without kernels, plain PyTorch will run", file=sys.stderr
            )
            return
        # One place whoever builds (pip, make), so that nothing is compiled twice.
        objects = ROOT / "build" / ("ninja" if "MANN_SANITIZE" not in os.environ else "ninja-sanitize")
        objects.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(output, objects))
        jobs = [] if "MAX_JOBS" not in os.environ else ["-j", os.environ["MAX_JOBS"]]
        subprocess.check_call([sys.executable, "-m", "ninja", "--quiet", "-C", str(objects), *jobs])


class Abi3Wheel(bdist_wheel):
    """One wheel for every Python from 3.10 on."""

    def finalize_options(self):
        self.py_limited_api = "cp310"
        super().finalize_options()


setup(
    ext_modules=[Extension("mann_kernels._C", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildNinja, "bdist_wheel": Abi3Wheel},
)
