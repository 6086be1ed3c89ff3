"""Which implementation runs: chosen by device and dtype, visible, and never changed silently."""

import contextlib
import functools
import importlib.util
import os
import warnings
from pathlib import Path

import torch
from torch.autograd import forward_ad

from mann_kernels import _library

#: Every public operator, in the order in which one builds on another.
OPS = (
    "content_address",
    "lrua_write_weights",
    "memory_update",
    "lrua_step",
    "lrua_sequence",
    "mann_sequence",
    "augmented_linear",
    "augmented_conv2d",
    "generate_fast_weights",
    "summarize_gradients",
)
NAMES = ("reference", "cpp", "triton", "cuda")
CPP_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CUDA_DTYPES = (torch.float32, torch.bfloat16)
#: The least compute capability that the CUDA kernels of an operator are written for: that of an A100, or, where the blocks of a
#: cluster work together, of an H100. Older devices run Triton's.
CUDA_CAPABILITY = {
    "content_address": (9, 0),
    "lrua_step": (9, 0),
    "lrua_sequence": (9, 0),
    "mann_sequence": (9, 0),
    "augmented_linear": (8, 0),
    "augmented_conv2d": (8, 0),
    "generate_fast_weights": (8, 0),
    "summarize_gradients": (8, 0),
}
TRITON_DTYPES = (*CPP_DTYPES, torch.float16)
#: What the compiler does not make, though the interpreter runs it.
TRITON_CANNOT = {
    ("augmented_conv2d", "cuda", torch.float64): "its compiler stops at float64 products of this shape",
    ("summarize_gradients", "cuda", torch.float64): "its operands take more shared memory than there is",
}
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
#: The operators that have Triton kernels, found without importing them.
TRITON_KERNELS = frozenset(path.stem for path in (Path(__file__).parent / "triton").glob("[!_]*.py"))

_requested: str | None = None


@contextlib.contextmanager
def backend(name: str):
    """Within the block, run every operator of this library on one implementation.

    Args:
        name: "reference" (plain PyTorch), "cpp", "triton" or "cuda".

    Raises:
        ValueError: for another name.
        RuntimeError: from an operator called in the block, if this implementation cannot run it; nothing falls back.

    The request holds for the whole process, and for the backward pass of what is run in the block. What torch.utils.checkpoint
    is to run again must have the block inside: run again on another implementation, it is an error of torch's.
    """
    global _requested
    if name not in NAMES:
        raise ValueError(f"backend: got {name!r}, want one of {', '.join(map(repr, NAMES))}")
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def missing(name: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why the implementation `name` cannot run `op` on this device and dtype; None if it can."""
    if name == "reference":
        return None
    if name == "cpp":
        if device != "cpu":
            return f"the C++ kernels run on CPU tensors, not on {device}"
        if _library.cpp_missing is not None:
            return _library.cpp_missing
        if op not in _library.cpp_kernels:
            return f"the compiled extension has no kernel for {op}: it is older than this package, build it again"
        if dtype not in CPP_DTYPES:
            return f"the C++ kernels take {', '.join(map(str, CPP_DTYPES))}, not {dtype}"
        return None
    if name == "triton":
        if not TRITON_INSTALLED:
            return "Triton is not installed (pip install triton)"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "the Triton kernels run on CPU tensors under its interpreter only: start Python with TRITON_INTERPRET=1"
            )
        if device not in ("cpu", "cuda"):
            return f"the Triton kernels run on GPUs, not on {device}"
        if (op, device, dtype) in TRITON_CANNOT:
            return f"Triton has no {dtype} for {op} on GPUs: {TRITON_CANNOT[op, device, dtype]}"
        if op not in TRITON_KERNELS:
            return f"this version has no Triton kernel for {op}"
        if dtype not in TRITON_DTYPES:
            return f"the Triton kernels take {', '.join(map(str, TRITON_DTYPES))}, not {dtype}"
        return None
    return _cuda_missing(op, device, dtype)


def _cuda_missing(op: str, device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda" or torch.version.hip is not None:
        return f"the CUDA kernels run on NVIDIA GPUs, not on {device if torch.version.hip is None else 'AMD GPUs'}"
    if _library.cuda_missing is not None:
        return _library.cuda_missing
    if op not in _library.cuda_kernels:
        return f"this version has no CUDA kernel for {op}"
    if dtype not in CUDA_DTYPES:
        return f"the CUDA kernels take {', '.join(map(str, CUDA_DTYPES))}, not {dtype}"
    capability, why = _devices()
    if capability < CUDA_CAPABILITY[op]:
        least, found = (".".join(map(str, version)) for version in (CUDA_CAPABILITY[op], capability))
        return f"the CUDA kernels of {op} need compute capability {least} or more, a device here has {found}"
    return why


def _devices() -> tuple[tuple[int, int], str | None]:
    return _asked_devices()


#: What torch.compiler.assume_constant_result does, which would import all of the compiler: it does not look inside.
_devices._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _asked_devices() -> tuple[tuple[int, int], str | None]:
    """The least compute capability of the CUDA devices of this process, and why kernels cannot be compiled for them; without a
    device, what an H100 would say."""
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return min(found, default=(9, 0)), _library.why_no_compiler() if found else None


#: The kernels for a device, the fastest first.
BY_SPEED = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}


def default(op: str, device: str, dtype: torch.dtype) -> tuple[str, str | None]:
    """The implementation that runs when none is asked for, and why it is not a kernel (None if it is one)."""
    for name in BY_SPEED.get(device, ("cpp",)):
        if missing(name, op, device, dtype) is None:
            return name, None
    return "reference", missing("triton" if device == "cuda" else "cpp", op, device, dtype)


#: Why no kernel runs in torch.func.vmap, grad, jacrev and the like, where plain PyTorch does the right thing.
TRANSFORMED = "the kernels have no rules for the transforms of torch.func and for forward-mode differentiation"


def transformed() -> bool:
    """Whether a transform of torch.func is active, one that torch.autograd builds on them, or a level of dual numbers."""
    # the first is what torch.autograd.Function itself asks
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@functools.cache
def _warn_once(op: str, device: str, why: str) -> None:
    warnings.warn(f"mann_kernels: {op} on {device} runs as plain PyTorch, slowly: {why}", stacklevel=5)


def select(op: str, tensor: torch.Tensor) -> str:
    """The name of the implementation for this call of `op`, decided by one of its tensors."""
    device, dtype = tensor.device.type, tensor.dtype
    if _requested is not None:
        refused = transformed() and _requested != "reference"
        why = TRANSFORMED if refused else missing(_requested, op, device, dtype)
        if why is not None:
            raise RuntimeError(f"backend {_requested!r} was asked for, but cannot run {op}: {why}")
        return _requested
    name, why = ("reference", TRANSFORMED) if transformed() else default(op, device, dtype)
    if why is not None and not torch.compiler.is_compiling():
        _warn_once(op, device, why)
    return name
