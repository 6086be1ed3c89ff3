"""The operator library: schemas exist with or without the compiled part, kernels attach themselves when it loads.

`mann::<name>` is compiled code, `mann_triton::<name>` the same operator in Triton, on any device.
"""

import ctypes
import functools
import importlib
import importlib.util

import torch


def _new_library(name: str) -> torch.library.Library:
    """The library of this namespace. Imported again, after the package left sys.modules, it takes the place of the old one,
    which is kept where it outlives the package; the compiled kernels stay registered."""
    namespace = getattr(torch.ops, name)
    if "_library" in vars(namespace):
        namespace._library._destroy()
    namespace._library = torch.library.Library(name, "DEF")
    return namespace._library


_LIBRARIES = {name: _new_library(name) for name in ("mann", "mann_triton")}

#: Why the compiled CPU kernels are missing, or None when they are loaded.
cpp_missing: str | None = None

#: The operators that have a C++ kernel; filled when the extension loads.
cpp_kernels: frozenset[str] = frozenset()

#: Why the compiled CUDA kernels are missing, or None when they are loaded. They load without a device or a driver.
cuda_missing: str | None = None

_cuda_origin: str | None = None

#: The operators that have a CUDA kernel; filled when the extension loads.
cuda_kernels: frozenset[str] = frozenset()

#: Instruction sets of the C++ kernels, from the least; one binary has them all (with MANN_NATIVE=1 one) and takes the best
#: the machine runs.
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
_cpu_isa = None


def define(schema: str, fake, default=None) -> None:
    """Declare the operator `<schema>`, the function that computes its output shapes and what runs where there is no kernel."""
    name = schema.split("(")[0]
    for namespace, library in _LIBRARIES.items():
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    if default is not None:
        _LIBRARIES["mann"].impl(name, default, "CompositeExplicitAutograd")
    _LIBRARIES["mann_triton"].impl(name, functools.partial(_run_triton, name), "CompositeExplicitAutograd")


#: The operators that a public one has beside its forward pass, `<op>_<part>`.
PARTS = ("backward", "sides")


def _run_triton(name: str, *args):
    """The Triton kernels are imported here, at the first call. Triton launches on the current device: make it the tensors'."""
    part = next((part for part in PARTS if name.endswith(f"_{part}")), "forward")
    op = name.removesuffix(f"_{part}")
    module = importlib.import_module(f"mann_kernels.triton.{op}")
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
        return getattr(module, part)(*args)


def operators(backend: str):
    """The operators of an implementation that is not the reference."""
    return torch.ops.mann_triton if backend == "triton" else torch.ops.mann


def _load(extension: str, key: str, built_by: str) -> tuple[str | None, str | None, frozenset[str]]:
    """Load an extension whose kernels register themselves: why that failed, or its file and its operators."""
    found = importlib.util.find_spec(f"mann_kernels.{extension}")
    if found is None or found.origin is None:
        return f"the compiled extension mann_kernels.{extension} was not built ({built_by})", None, frozenset()
    try:
        torch.ops.load_library(found.origin)
    except OSError as error:
        return f"the compiled extension {found.origin} does not load: {error}", None, frozenset()
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return None, found.origin, frozenset(name[len("mann::") :] for name in registered if name.startswith("mann::"))


def load_cpp() -> None:
    """Load the extension that registers the C++ kernels; remember why if that fails."""
    global cpp_missing, cpp_kernels, _cpu_isa
    cpp_missing, origin, cpp_kernels = _load("_C", "CPU", "pip install builds it where a C++ compiler is")
    if origin is None:
        return
    picked = ctypes.CDLL(origin).mann_cpu_isa
    if picked(-1) >= 0:
        _cpu_isa = picked
    else:
        cpp_missing, cpp_kernels = f"{origin} was built with MANN_NATIVE=1 for another CPU: build it again", frozenset()


def load_cuda() -> None:
    """Load the extension that registers the CUDA kernels, which are compiled when they first run."""
    global cuda_missing, cuda_kernels, _cuda_origin
    cuda_missing, _cuda_origin, cuda_kernels = _load("_CUDA", "CUDA", "pip install builds it where a C++ compiler is")


@functools.cache
def why_no_compiler() -> str | None:
    """Why CUDA kernels cannot be compiled and launched in this process, on which a device is; None if they can."""
    said = ctypes.create_string_buffer(1000)
    missing = ctypes.CDLL(_cuda_origin).mann_cuda_missing(said, ctypes.c_int64(len(said)))
    return said.value.decode().removeprefix("mann_kernels: ") if missing else None


def cpu_isa(limit: str | None = None) -> str | None:
    """The instruction set in use by the C++ kernels, one of ISAS; None without them. `limit` first caps it (for tests)."""
    if _cpu_isa is None:
        return None
    return ISAS[_cpu_isa(-1 if limit is None else ISAS.index(limit))]
