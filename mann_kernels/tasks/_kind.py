"""Of what kind the tensors of tasks are: on the CPU, as their generators, in torch's default dtype, whatever the defaults are."""

import functools
from collections.abc import Callable
from numbers import Integral
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def on_cpu(function: Function) -> Function:
    """A function whose new tensors are on the CPU, whatever torch.set_default_device says."""

    @functools.wraps(function)
    def with_cpu(*args, **kwargs):
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return with_cpu  # type: ignore[return-value]


def check_sizes(**sizes: int) -> None:
    """Each is an integer of at least 1.

    Raises:
        ValueError: naming it and what it got.
    """
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}: got {size}, want at least 1, an integer")


def uniform(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """In [0, 1), float32 whatever the default: the same tasks come of the same seed."""
    return torch.rand(shape, generator=generator, dtype=torch.float32)


def numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a learner takes it, in torch's default dtype."""
    return tensor.to(torch.get_default_dtype())
