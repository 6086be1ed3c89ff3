"""The CUDA kernels of csrc/cuda compiled for the CPU, from their own source: what backend("cuda") is on CPU tensors.

    with cuda_on_cpu(seed=3):
        ...  # operators, on CPU tensors

Entry points go through g++ once; a file of kernels does, with cuda_on_cpu.h in place of CUDA, when it is first launched with some
sizes. Sanitizers must be there before Python is: see
sanitized() and run_cuda_on_cpu.py.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import filelock
import torch
import torch.utils.cpp_extension as cpp

import mann_kernels
from mann_kernels import _backend, _library

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_on_cpu"
LIBRARY = "mann_cuda_on_cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

#: By the sanitizers: flags of the kernels, flags of the runtime, the shared libraries that must come first.
KINDS = {
    "plain": ("-O1", "-O2", ()),
    "address": (
        "-O1 -g1 -fsanitize=address,undefined -fno-omit-frame-pointer",
        "-O2 -DMANN_ASAN",
        ("asan", "ubsan"),
    ),
    "thread": ("-O1 -g1 -fsanitize=thread", "-O2 -DMANN_TSAN", ("tsan",)),
}
FLAGS = "-std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi"
#: CUDA compilers do not assume that pointers to different types point to different memory.
OF_KERNELS = "-fno-strict-aliasing -fno-math-errno -fno-ipa-icf -DMANN_CUDA_ON_CPU -x c++"
OF_ENTRIES = f"-DMANN_CUDA_ON_CPU -DTORCH_TARGET_VERSION=0x020a000000000000ULL -DMANN_LIBRARY={LIBRARY} -DMANN_KEY=CPU"


#: What launches are planned for, by compute capability (A100, RTX 3090, RTX 4090, H100): bytes of shared memory that a block may
#: have, and multiprocessors.
DEVICES = {80: (166_912, 108), 86: (101_376, 82), 89: (101_376, 128), 90: (232_448, 132)}

#: What every kernel includes first; compiled beforehand, since that is half of the work.
HEADER = "cuda_on_cpu.h"


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def kernel_command(kind: str, csrc: Path = CSRC, folder: Path = BUILD) -> str:
    """Return the command that compiles a file of kernels, up to the folder of the file; `folder` as build was given it."""
    flags = f"{FLAGS} {KINDS[kind][0]} {OF_KERNELS} -include {folder / kind / HEADER}"
    return f"{compiler()} -shared {flags} -I{HERE} {csrc / 'cuda'}"


def kernel_folder(folder: Path, csrc: Path) -> Path:
    """Where compiled kernels lie, a place for each state of the sources."""
    files = [*sorted((csrc / "cuda").glob("*.[ch]*")), csrc / "cells.h", *sorted(HERE.glob("cuda_on_cpu*.h"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return folder / "kernels" / digest


def ninja_file(kind: str, sources: list[Path], csrc: Path, library: Path) -> str:
    kernel_flags, runtime_flags, _ = KINDS[kind]
    includes = " ".join(f"-isystem {path}" for path in cpp.include_paths()) + f" -I{csrc / 'cuda'} -I{HERE}"
    paths = " ".join(f"-L{path} -Wl,-rpath,{path}" for path in cpp.library_paths())
    sanitize = " ".join(flag for flag in kernel_flags.split() if flag.startswith("-fsanitize"))
    lines = [
        "rule compile",
        f"  command = {compiler()} {FLAGS} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # symbolic: with several of these libraries in a process, each calls its own runtime
        f"  command = {compiler()} -shared -Wl,-Bsymbolic {sanitize} $in {paths} -ltorch_cpu -ldl -o $out",
        f"build {library.parent / HEADER}.gch: compile {HERE / HEADER}",
        f"  flags = {kernel_flags} {OF_KERNELS}-header",
    ]
    objects = []
    for source in [*sorted(HERE.glob("cuda_on_cpu_*.cpp")), *sources]:
        if source.suffix == ".cu":  # kernels and their launches in one file
            mine = f"{kernel_flags} {OF_KERNELS} {includes}"
        else:
            mine = f"{runtime_flags} -fvisibility=default" if source.parent == HERE else f"-O1 {OF_ENTRIES} {includes}"
        objects.append(library.parent / f"{source.stem}.o")
        lines += [f"build {objects[-1]}: compile {source}", f"  flags = {mine}"]
    lines.append(f"build {library}: link {' '.join(map(str, objects))}")
    return "\n".join(lines) + "\n"


def build(kind: str = "plain", *, sources: list[Path] | None = None, csrc: Path = CSRC, folder: Path = BUILD) -> Path:
    """The library of `sources` (all of csrc/cuda), compiled where anything changed."""
    folder = folder / kind
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{LIBRARY}.so"
    entries = sorted(file for file in (csrc / "cuda").glob("*.cpp") if file.stem != "jit")
    sources = entries if sources is None else sources
    kernel_folder(folder, csrc).mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        (folder / "build.ninja").write_text(ninja_file(kind, sources, csrc, library))
        command = [sys.executable, "-m", "ninja", "--quiet", "-C", str(folder)]
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if made.returncode != 0:
        raise RuntimeError(f"the CUDA kernels do not compile for the CPU:\n{made.stdout}")
    return library


def missing() -> str | None:
    """Why the kernels cannot be compiled for the CPU here; None if they can."""
    if os.uname().machine != "x86_64":
        return "the switch between threads is written for x86-64"
    return None if shutil.which(compiler()) else "no C++ compiler"


def sanitized(kind: str) -> dict[str, str]:
    """Environment variables for a process that loads a library of this kind; its reports end it, with exit code 77."""
    libraries = [f"lib{name}.so" for name in KINDS[kind][2]]
    found = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in libraries]
    options = "exitcode=77:halt_on_error=1"
    return {
        "LD_PRELOAD": " ".join(
            [*found, subprocess.check_output(["gcc", "-print-file-name=libstdc++.so.6"], text=True).strip()]
        ),
        "ASAN_OPTIONS": f"{options}:detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": f"{options}:print_stacktrace=1",
        "TSAN_OPTIONS": f"{options}:ignore_noninstrumented_modules=1:report_signal_unsafe=0",
    }


@functools.cache
def load(library: Path, csrc: Path = CSRC) -> ctypes.CDLL:
    """Loads the operators as mann_cuda_on_cpu::<name>, with the schemas of mann::<name>; one library to a process."""
    _define()
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # kernels that are compiled later look for it
    torch.ops.load_library(str(library))
    kind, folder = library.parent.name, kernel_folder(library.parent, csrc)
    folder.mkdir(parents=True, exist_ok=True)
    loaded.mann_cuda_on_cpu_compiler(kernel_command(kind, csrc, library.parent.parent).encode(), str(folder).encode())
    loaded.mann_cuda_on_cpu_record.restype = ctypes.c_char_p
    return loaded


@contextlib.contextmanager
def kernels_from(csrc: Path, library: ctypes.CDLL, folder: Path):
    """Within the block kernels are compiled from other sources, into `folder`."""
    library.mann_cuda_on_cpu_compiler(kernel_command("plain", csrc).encode(), str(folder).encode())
    try:
        yield
    finally:
        own = kernel_folder(BUILD / "plain", CSRC)
        library.mann_cuda_on_cpu_compiler(kernel_command("plain").encode(), str(own).encode())


@contextlib.contextmanager
def early(library: ctypes.CDLL):
    """Within the block a launch that follows another starts before that has written anything: as far as each block can go without
    it, what the operator writes to is NaN."""
    library.mann_cuda_on_cpu_early(1)
    try:
        yield
    finally:
        library.mann_cuda_on_cpu_early(0)


def same_when_early(library: ctypes.CDLL, made) -> bool:
    """Call made() twice, the second time within early(), and tell whether all its tensors, by their names, have the same bits."""
    first = made()
    with early(library):
        again = made()
    return all(torch.equal(first[name], again[name]) for name in first)


@contextlib.contextmanager
def recorded(library: ctypes.CDLL):
    """Within the block launches are written down instead of run: a list that is filled at its end, a Launch each."""
    launches: list[Launch] = []
    library.mann_cuda_on_cpu_record(1)
    try:
        yield launches
    finally:
        lines = library.mann_cuda_on_cpu_record(0).decode().splitlines()
        launches += [Launch(*line.split("|")) for line in lines]


class Launch(NamedTuple):
    """A launch that was written down."""

    source: str
    options: str
    kernel: str
    blocks: str
    threads: str
    cluster: str
    shared_bytes: str


@functools.cache
def _define() -> torch.library.Library:
    operators = torch.library.Library(LIBRARY, "DEF")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("mann::"):
            schema = str(getattr(torch.ops.mann, name.removeprefix("mann::")).default._schema)
            operators.define(schema.removeprefix("mann::"))
    return operators


def kernels() -> frozenset[str]:
    """The operators that the loaded library has."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return frozenset(name.removeprefix(f"{LIBRARY}::") for name in registered if name.startswith(f"{LIBRARY}::"))


@contextlib.contextmanager
def cuda_on_cpu(seed: int = 0, library: Path | None = None, csrc: Path = CSRC, capability: int = 90):
    """Within the block backend("cuda") runs CPU tensors, with schedules drawn from `seed`, as on a device of this compute
    capability; yields the loaded library."""
    loaded = load(library or build(), csrc)
    loaded.mann_cuda_on_cpu_seed(seed)
    shared_bytes, multiprocessors = DEVICES[capability]
    loaded.mann_cuda_on_cpu_device(ctypes.c_int64(shared_bytes), multiprocessors, capability)
    missing, operators = _backend.missing, _library.operators

    def missing_on_cpu(name, op, device, dtype):
        if (name, device) != ("cuda", "cpu"):
            return missing(name, op, device, dtype)
        return None if op in kernels() and dtype in DTYPES else f"no CUDA kernel for {op} in {dtype}"

    _backend.missing = missing_on_cpu
    _library.operators = lambda backend: getattr(torch.ops, LIBRARY) if backend == "cuda" else operators(backend)
    try:
        with mann_kernels.backend("cuda"):
            yield loaded
    finally:
        _backend.missing, _library.operators = missing, operators


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
