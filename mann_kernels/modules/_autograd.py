"""Gradients that are a part of the forward pass, and so are wanted under torch.no_grad and torch.inference_mode as well."""

import contextlib
import itertools

import torch
from torch import nn
from torch.func import functional_call


@contextlib.contextmanager
def with_autograd():
    """Operations in it are recorded, whatever is switched off around it."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def autograd_takes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of one that was made in inference mode: autograd keeps none of those. Call it in `with_autograd`."""
    return tensor.clone() if tensor.is_inference() else tensor


def called_with_autograd(module: nn.Module, *args, **kwargs):
    """`module(*args, **kwargs)`, also for parameters and buffers that were made in inference mode."""
    named = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
    copies = {name: tensor.clone() for name, tensor in named.items() if tensor.is_inference()}
    if not copies:
        return module(*args, **kwargs)
    output = functional_call(module, copies, args, kwargs)
    with torch.inference_mode():
        for name, buffer in module.named_buffers():  # the statistics of a batch normalisation
            if name in copies:
                buffer.copy_(copies[name])
    return output
