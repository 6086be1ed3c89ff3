"""Mixed precision: what an operator does inside `torch.autocast`.

Addressing and usage are float32 there, products of matrices take the low type: an operator of the memory is computed in float32
(as PyTorch does with softmax and sums), an augmented layer in the low type (as with a linear layer), and of mann_sequence the
products before and after the loop over time are in the low type, the loop in float32. float64 stays what it is, as everywhere in
autocast.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

#: A decorated operator keeps its signature.
Operator = TypeVar("Operator", bound=Callable[..., Any])


def _device_type(values) -> str | None:
    return next((value.device.type for value in values if isinstance(value, torch.Tensor)), None)


#: Asked once: torch.compile before 2.13 does not follow the question into a graph.
_AVAILABLE = frozenset(name for name in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(name))


def _is_off_everywhere() -> bool:
    """Say quickly whether autocast is off for every device; False in a graph that is being compiled, where it is unknown."""
    return not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled()


def _is_on(device: str | None) -> bool:
    return device in _AVAILABLE and torch.is_autocast_enabled(device)


def _to(value, dtype: torch.dtype):
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value


def _rule(function: Operator, dtype_of, stays_on: bool = False) -> Operator:
    """`function` of tensors of the type that `dtype_of(device)` says where autocast is on, and with autocast off inside."""

    @functools.wraps(function)
    def cast(*args: Any, **kwargs: Any) -> Any:
        if _is_off_everywhere():
            return function(*args, **kwargs)
        device = _device_type((*args, *kwargs.values()))
        if device is None or not _is_on(device):
            return function(*args, **kwargs)
        dtype = dtype_of(device)
        args, kwargs = (tuple(_to(arg, dtype) for arg in args), {name: _to(arg, dtype) for name, arg in kwargs.items()})
        with torch.autocast(device, enabled=stays_on):
            return function(*args, **kwargs)

    # code of its own for each: torch.compile counts how often one piece of code was compiled, and stops after a few
    cast.__code__ = cast.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    return cast  # type: ignore[return-value]


def in_float32(function: Operator) -> Operator:
    """A public function that computes in float32 where autocast is on."""
    return _rule(function, lambda device: torch.float32)


def in_low_type(function: Operator) -> Operator:
    """A public function that computes in autocast's low type."""
    return _rule(function, torch.get_autocast_dtype)


def around_float32(function: Operator) -> Operator:
    """A public function of float32 tensors that leaves its own matrix products to autocast, which stays on inside."""
    return _rule(function, lambda device: torch.float32, stays_on=True)


def setting(tensor: torch.Tensor) -> dict:
    """The arguments with which `torch.autocast` is as it is now; for a backward pass that takes products in the same type."""
    device = tensor.device.type
    if not _is_on(device):
        return {"device_type": device if device in _AVAILABLE else "cpu", "enabled": False}
    return {"device_type": device, "dtype": torch.get_autocast_dtype(device)}


def off(backward):
    """A Function's backward with autocast off, whoever calls it: the types of the forward pass hold."""

    @functools.wraps(backward)
    def plain(ctx, *grads):
        if _is_off_everywhere():
            return backward(ctx, *grads)
        device = _device_type(grads)
        if not _is_on(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return plain
