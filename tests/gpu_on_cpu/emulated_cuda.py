"""The CUDA kernels as nvcc compiled them, run instruction by instruction by the PTX machine, on CPU tensors.

    with emulated_cuda("sm_90a") as launches:
        ...  # operators, on CPU tensors
    launches[0].global_bytes["weight_hh"]

The host code is that of csrc/cuda too, compiled for the CPU: it computes the grid, the clusters and the arguments. What it would
launch comes here, with the memory that the call knows.
"""

import contextlib
import ctypes
import functools
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import filelock
import ptx
import torch
import torch.utils.cpp_extension as cpp
from cuda_on_cpu import BUILD, CSRC, build, cuda_on_cpu, load
from ptx_machine import Machine

TARGETS = ("sm_80", "sm_90a")


class Memory(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("item", ctypes.c_int64),
    ]


class Launch(ctypes.Structure):
    """As in cuda_on_cpu.h."""

    _fields_ = [
        ("kernel", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_int64), ("shared", ctypes.c_int64), ("arguments", ctypes.c_int64), ("memories", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)), ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("memory", ctypes.POINTER(Memory)),
    ]  # fmt: skip


def compiled(
    target: str, *, sources: list[Path] | None = None, csrc: Path = CSRC, folder: Path = BUILD, options: str = ""
) -> list[Path]:
    """The PTX of `sources` (all of csrc/cuda), compiled where anything changed."""
    folder = folder / f"ptx-{target}"
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((csrc / "cuda").glob("*.cu")) if sources is None else sources
    flags = f"-std=c++20 -ptx -lineinfo -arch={target} {options} -DTORCH_TARGET_VERSION=0x020a000000000000ULL -I{csrc / 'cuda'}"
    includes = " ".join(f"-isystem {path}" for path in cpp.include_paths())
    texts = [folder / f"{source.stem}.ptx" for source in sources]
    lines = [
        "rule compile",
        f"  command = {shutil.which('nvcc')} {flags} {includes} -MD -MF $out.d $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        *(f"build {text}: compile {source}" for text, source in zip(texts, sources, strict=True)),
    ]
    with filelock.FileLock(folder / "lock"):
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "ninja", "--quiet", "-C", str(folder)]
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if made.returncode != 0:
        raise RuntimeError(f"nvcc does not compile the CUDA kernels:\n{made.stdout}")
    return texts


def missing() -> str | None:
    return None if shutil.which("nvcc") else "no nvcc"


@functools.cache
def entries(target: str, texts: tuple[Path, ...]) -> dict[str, str]:
    """The text that has each kernel, by its name in the object file."""
    found = {}
    for path in texts:
        text = path.read_text()
        found |= dict.fromkeys((entry[1] for entry in ptx.entries(text)), text)
    return found


@functools.cache
def symbols(library: Path) -> dict[int, str]:
    """The names of all functions, by their place in the library."""
    lines = subprocess.check_output(["nm", "--defined-only", str(library)], text=True).splitlines()
    return {int(place, 16): name for place, _, name in (line.split() for line in lines)}


class Machinery:
    """What stands in for a GPU: does something with each launch, and keeps what came of it, or what was wrong."""

    def __init__(self, library, does):
        self.does, self.launches, self.error = does, [], None
        self.names, loaded = symbols(library), load(library)
        here = ctypes.cast(loaded.mann_cuda_on_cpu_seed, ctypes.c_void_p).value
        self.base = here - next(place for place, name in self.names.items() if name == "mann_cuda_on_cpu_seed")

    def __call__(self, given):
        try:
            launch = given.contents
            assert launch.block[1] == launch.block[2] == 1
            self.launches.append(self.does(self.names[launch.kernel - self.base], launch))
            return 0
        except BaseException as error:  # C++ is in between: what it throws then is replaced by this
            self.error = error
            return 1


@contextlib.contextmanager
def diverted(does):
    """Within the block the launches of backend("cuda") on CPU tensors go to does(name, launch); yields the list of what it gave."""
    library = build()
    with cuda_on_cpu(library=library) as loaded:
        gpu = Machinery(library, does)
        diversion = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch))(gpu)
        loaded.mann_cuda_on_cpu_divert(diversion)
        try:
            yield gpu.launches
        except RuntimeError:
            if gpu.error is not None:
                raise gpu.error from None
            raise
        finally:
            loaded.mann_cuda_on_cpu_divert(None)


class Planned(NamedTuple):
    name: str
    blocks: int
    threads: int
    cluster: int
    shared: int  # bytes that the launch gives each block, beside arrays of a fixed size


def planned():
    """Within the block launches run nothing and are noted; yields the list of them."""
    return diverted(
        lambda name, launch: Planned(name, math.prod(launch.grid), launch.block[0], launch.cluster, launch.shared)
    )


def buffers_of(launch) -> dict[str, torch.Tensor]:
    """What the kernels may reach, as tensors of integers, by name; those without a name of their own are numbered."""
    found = {}
    for i in range(launch.memories):
        memory = launch.memory[i]
        name = memory.name.decode()
        name = name if name not in ("out", "scratch") else f"{name} {i}"
        raw = (ctypes.c_uint8 * memory.bytes).from_address(memory.data)
        found[name] = torch.frombuffer(raw, dtype={2: torch.int16, 4: torch.int32, 8: torch.int64}[memory.item])
    return found


def emulated_cuda(target: str = "sm_90a", texts: list[Path] | None = None, **options):
    """Within the block backend("cuda") runs CPU tensors, in code compiled for `target`; yields the list of what launches did.

    `options` are those of Machine.
    """
    known = entries(target, tuple(compiled(target) if texts is None else texts))

    def run(name, launch):
        kernel = ptx.parse(known[name], name)
        values = {str(i): ctypes.string_at(launch.values[i], launch.sizes[i]) for i in range(launch.arguments)}
        shared = -(-kernel.shared_bytes // 16) * 16 + launch.shared
        given = options | {"cluster": launch.cluster, "buffers": buffers_of(launch)}
        return Machine(kernel, launch.grid[:], launch.block[0], shared, values, **given).run()

    return diverted(run)
