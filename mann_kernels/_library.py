"""The operator library: schemas exist with or without the compiled part, kernels attach themselves when it loads.

`mann::<name>` is compiled code, `mann_triton::<name>` the same operator in Triton, on any device.
"""

import ctypes
import functools
import importlib
import importlib.util

import torch

_LIBRARIES = {name: torch.library.Library(name, "DEF") for name in ("mann", "mann_triton")}

#: Why the compiled CPU kernels are missing, or None when they are loaded.
cpp_missing: str | None = None

#: The operators that have a C++ kernel; filled when the extension loads.
cpp_kernels: frozenset[str] = frozenset()

#: Instruction sets of the C++ kernels, from the least; one binary has them all and takes the best the machine runs.
ISAS = ("baseline", "avx2", "avx512")
_cpu_isa = None


def define(schema: str, fake) -> None:
    """Declare the operator `<schema>` and the function that computes its output shapes."""
    name = schema.split("(")[0]
    for namespace, library in _LIBRARIES.items():
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    _LIBRARIES["mann_triton"].impl(name, functools.partial(_run_triton, name), "CompositeExplicitAutograd")


def _run_triton(name: str, *args):
    """The Triton kernels are imported here, at the first call. Triton launches on the current device: make it the tensors'."""
    module = importlib.import_module(f"mann_kernels.triton.{name.removesuffix('_backward')}")
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
        return (module.backward if name.endswith("_backward") else module.forward)(*args)


def operators(backend: str):
    """The operators of an implementation that is not the reference."""
    return torch.ops.mann_triton if backend == "triton" else torch.ops.mann


def load_cpp() -> None:
    """Load the extension that registers the C++ kernels; remember why if that fails."""
    global cpp_missing, cpp_kernels, _cpu_isa
    found = importlib.util.find_spec("mann_kernels._C")
    if found is None or found.origin is None:
        cpp_missing = (
            "the compiled extension mann_kernels._C was not built (pip install builds it where a C++ compiler is)"
        )
        return
    try:
        torch.ops.load_library(found.origin)
        registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
        cpp_kernels = frozenset(name.removeprefix("mann::") for name in registered if name.startswith("mann::"))
        _cpu_isa = ctypes.CDLL(found.origin).mann_cpu_isa
    except OSError as error:
        cpp_missing = f"the compiled extension {found.origin} does not load: {error}"


def cpu_isa(limit: str | None = None) -> str | None:
    """The instruction set in use by the C++ kernels, one of ISAS; None without them. `limit` first caps it (for tests)."""
    if _cpu_isa is None:
        return None
    return ISAS[_cpu_isa(-1 if limit is None else ISAS.index(limit))]
