"""The operators in plain PyTorch, written to be read: each one *defines* what its kernels must compute.

Everything here is differentiable (twice), runs in any floating dtype on any device, and loops over time in Python.
Shapes use B batch, T time, N slots, W slot width, R heads, H hidden, I input, D hidden units of a generator.
Equations, where no other paper is named, are those of Santoro et al. 2016,
"One-shot Learning with Memory-Augmented Neural Networks" (arXiv 1605.06065).
"""

from mann_kernels.reference.augmented_conv2d import augmented_conv2d
from mann_kernels.reference.augmented_linear import augmented_linear
from mann_kernels.reference.content_address import content_address
from mann_kernels.reference.generate_fast_weights import generate_fast_weights
from mann_kernels.reference.lrua_sequence import lrua_sequence
from mann_kernels.reference.lrua_step import lrua_step
from mann_kernels.reference.lrua_write_weights import lrua_write_weights
from mann_kernels.reference.mann_sequence import mann_sequence
from mann_kernels.reference.memory_update import memory_update
from mann_kernels.reference.summarize_gradients import summarize_gradients

__all__ = [
    "augmented_conv2d",
    "augmented_linear",
    "content_address",
    "generate_fast_weights",
    "lrua_sequence",
    "lrua_step",
    "lrua_write_weights",
    "mann_sequence",
    "memory_update",
    "summarize_gradients",
]
