"""Builds the kernels against PyTorch's stable ABI: mann_kernels/_C.abi3.so for the CPU, mann_kernels/_CUDA.abi3.so for GPUs.

They are not Python modules: torch.ops.load_library loads them, and they need neither libpython nor one particular torch, so one
binary serves every Python >= 3.10 and torch >= 2.10. Both are plain C++: the CUDA kernels go as text into the second, and are
compiled where and when they run, by the NVRTC that torch brings along. Everything else about the package is in pyproject.toml.

Environment: CXX, MAX_JOBS, MANN_CUDA=0 (no CUDA kernels) and MANN_NATIVE=1: nothing is compiled that this machine does not run, so
of the instruction sets the best of its CPU alone, and the CUDA kernels only where a driver is; those that are there stay.
"""

import os
import platform
import re
import shlex
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
# Each C++ source is compiled once per instruction set. The baseline comes first, here and in the link line: it has the entry
# points, and where several objects emit the same inline function of a header, the linker keeps the first, which every machine can
# run.
ISAS = {"baseline": "-DMANN_ISA=baseline -DMANN_ENTRY=1"}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = "-DMANN_ISA=avx2 -mavx2 -mfma"
    ISAS["avx512"] = "-DMANN_ISA=avx512 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512"


def native() -> bool:
    return os.environ.get("MANN_NATIVE") == "1"


def isas() -> dict[str, str]:
    """The flags of every instruction set to compile for, and of "entry", the entry points without the baseline's kernels."""
    import torch

    if not native():
        return ISAS
    best = {"AVX2": "avx2", "AVX512": "avx512"}.get(torch.backends.cpu.get_cpu_capability())
    alone = {"entry": f"{ISAS['baseline']} -DMANN_ENTRY_ALONE=1"}
    return alone | {best: ISAS[best]} if best in ISAS else {"baseline": ISAS["baseline"]}


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def why_no_cuda() -> str | None:
    if os.environ.get("MANN_CUDA") == "0":
        return "MANN_CUDA=0"
    return None if platform.system() == "Linux" else f"there is no CUDA on {platform.system()}"


def torch_flags() -> tuple[str, str]:
    """What compiling and linking against torch need."""
    import torch.utils.cpp_extension as cpp

    includes = " ".join(f"-isystem {quoted(path)}" for path in cpp.include_paths("cpu")) + f" -I{quoted(ROOT / 'csrc')}"
    return f"{STABLE_ABI} {includes}", " ".join(
        f"-L{quoted(path)}" for path in cpp.library_paths("cpu")
    ) + " -ltorch_cpu"


def quoted(path: Path | str) -> str:
    """A path in a command of a ninja file: for the shell, and then for ninja."""
    return shlex.quote(str(path)).replace("$", "$$")


def escaped(path: Path) -> str:
    """A path in a build line of a ninja file."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(compile_command: str, link_command: str, sources: list[tuple[Path, Path, str]], output: Path) -> str:
    """The whole build of a library, for ninja: it rebuilds what a changed source, header or flag touches.

    sources: (source, object, its own flags).
    """
    lines = [
        "rule compile",
        f"  command = {compile_command} $own -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {link_command}",
    ]
    for source, built, own in sources:
        lines += [f"build {escaped(built)}: compile {escaped(source)}", f"  own = {own}"]
    lines.append(f"build {escaped(output)}: link {' '.join(escaped(built) for _, built, _ in sources)}")
    return "\n".join(lines) + "\n"


def cpp_ninja(output: Path, objects: Path) -> str:
    compiling, linking = torch_flags()
    sanitizers = os.environ.get("MANN_SANITIZE")  # e.g. "address,undefined"
    extra = f" -fsanitize={sanitizers} -fno-omit-frame-pointer -O2 -g1" if sanitizers else ""
    sources = [
        (source, objects / f"{isa}-{source.stem}.o", flags)
        for isa, flags in isas().items()
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    ]
    command = f"{compiler()} {FLAGS}{extra} {compiling}"
    return ninja_file(command, f"{compiler()} -shared{extra} $in {linking} -o $out", sources, output)


def cuda_texts() -> str:
    """The files of csrc that CUDA kernels are made of, as C++."""
    csrc = ROOT / "csrc"
    files = [csrc / "cells.h", *sorted([*(csrc / "cuda").glob("*.cu"), *(csrc / "cuda").glob("*.h")])]
    entries = [
        f'    {{"{"../" if file.parent == csrc else ""}{file.name}", R"MANN({file.read_text()})MANN"}},\n'
        for file in files
        if file.name not in ("jit.h", "launch.h", "driver.h")
    ]
    return (
        "namespace mann::cuda {\nstruct File {\n    const char *name, *text;\n};\n"
        f"extern const File kFiles[] = {{\n{''.join(entries)}    {{nullptr, nullptr}},\n}};\n}} // namespace mann::cuda\n"
    )


def cuda_ninja(output: Path, objects: Path) -> str:
    compiling, linking = torch_flags()
    texts = objects / "texts.cpp"
    if not texts.exists() or texts.read_text() != cuda_texts():
        texts.write_text(cuda_texts())
    sources = [
        (source, objects / f"{source.stem}.o", "") for source in [texts, *sorted((ROOT / "csrc/cuda").glob("*.cpp"))]
    ]
    command = f"{compiler()} {FLAGS.replace('-O3', '-O2')} {compiling}"
    return ninja_file(command, f"{compiler()} -shared $in {linking} -ldl -o $out", sources, output)


class BuildNinja(build_ext):
    """Compiles with ninja. Without a compiler a library is left out, and the package runs what there is."""

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        name = "ninja" if "MANN_SANITIZE" not in os.environ else "ninja-sanitize"
        if shutil.which(compiler()) is None:
            return self.leave_out(output, "no C++ compiler found: building without kernels, plain PyTorch will run")
        if ext.name != "mann_kernels._CUDA":
            return self.build(output, name, cpp_ninja)
        if self.left_alone(ext):
            return None
        if why := why_no_cuda():
            return self.leave_out(output, f"building without CUDA kernels: {why}")
        return self.build(output, f"{name}-cuda", cuda_ninja)

    def left_alone(self, ext) -> bool:
        """Whether a library is neither built nor taken away."""
        return ext.name == "mann_kernels._CUDA" and native() and shutil.which("nvidia-smi") is None

    def leave_out(self, output: Path, why: str) -> None:
        output.unlink(missing_ok=True)
        print(f"mann_kernels: {why}", file=sys.stderr)

    def build(self, output: Path, name: str, ninja) -> None:
        # One place whoever builds (pip, make), so that nothing is compiled twice.
        objects = ROOT / "build" / name
        objects.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja(output, objects))
        jobs = [] if "MAX_JOBS" not in os.environ else ["-j", os.environ["MAX_JOBS"]]
        subprocess.check_call([sys.executable, "-m", "ninja", "--quiet", "-C", str(objects), *jobs])

    def copy_extensions_to_source(self):
        """Also takes away what an earlier build left there and this one leaves out."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            if not self.left_alone(ext) and not Path(self.build_lib, self.get_ext_filename(ext.name)).exists():
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)


class Abi3Wheel(bdist_wheel):
    """One wheel for every Python from 3.10 on."""

    def finalize_options(self):
        self.py_limited_api = "cp310"
        super().finalize_options()


setup(
    ext_modules=[
        Extension(f"mann_kernels.{name}", sources=[], py_limited_api=True, optional=True) for name in ("_C", "_CUDA")
    ],
    cmdclass={"build_ext": BuildNinja, "bdist_wheel": Abi3Wheel},
)
