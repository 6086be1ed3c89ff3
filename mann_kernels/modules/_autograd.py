"""Gradients that are a part of the forward pass, and so are wanted under torch.no_grad and torch.inference_mode as well."""

import contextlib
import itertools
import sys

import torch
from torch import nn
from torch.func import functional_call

from mann_kernels._backend import transformed


@contextlib.contextmanager
def with_autograd():
    """Operations in it are recorded, whatever is switched off around it."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def autograd_takes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of one that was made in inference mode: autograd keeps none of those. Call it in `with_autograd`."""
    return tensor.clone() if made_in_inference_mode(tensor) else tensor


def made_in_inference_mode(tensor: torch.Tensor) -> bool:
    """Whether autograd takes no such tensor. torch.compile, which does not trace the question, takes all."""
    return not torch.compiler.is_compiling() and tensor.is_inference()


class _TakesPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, *parameters):
        ctx.number = len(parameters)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad, *[None] * ctx.number


def with_parameters(tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """The tensor, in whose gradient the module's parameters take part without getting one: DistributedDataParallel waits until
    every parameter has been reached."""
    if not torch.is_grad_enabled() or transformed():
        return tensor
    return _TakesPart.apply(tensor, *(parameter for parameter in module.parameters() if parameter.requires_grad))


def refuse_freed_weights(module: nn.Module) -> None:
    """fully_shard frees weights after each backward pass, the inner one too, and so has no second derivatives.

    Raises:
        RuntimeError: for a module that is, or holds, one of those.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in module.modules()):
        raise RuntimeError(
            "second_order: got parts under fully_shard, want none: torch frees their weights after the inner backward pass"
        )


def called_with_autograd(module: nn.Module, *args, **kwargs):
    """`module(*args, **kwargs)`, also for parameters and buffers that were made in inference mode."""
    if torch.compiler.is_compiling():
        return module(*args, **kwargs)
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    copies = {name: tensor.clone() for name, tensor in named if tensor.is_inference()}
    if not copies:
        return module(*args, **kwargs)
    output = functional_call(module, copies, args, kwargs)
    with torch.inference_mode():
        for name, buffer in module.named_buffers():  # the statistics of a batch normalisation
            if name in copies:
                buffer.copy_(copies[name])
    return output
