"""The operators: schema, shape function, autograd and validation. One file for each."""

from mann_kernels.ops.augmented_conv2d import augmented_conv2d
from mann_kernels.ops.augmented_linear import augmented_linear
from mann_kernels.ops.content_address import content_address
from mann_kernels.ops.generate_fast_weights import generate_fast_weights
from mann_kernels.ops.lrua_sequence import lrua_sequence
from mann_kernels.ops.lrua_step import lrua_step
from mann_kernels.ops.lrua_write_weights import lrua_write_weights
from mann_kernels.ops.mann_sequence import mann_sequence
from mann_kernels.ops.memory_update import memory_update
from mann_kernels.ops.summarize_gradients import summarize_gradients

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
