"""Fast, exact, drop-in memory-augmented network layers for PyTorch.

Operators: content_address, lrua_write_weights, memory_update, lrua_step, lrua_sequence, mann_sequence,
augmented_linear, augmented_conv2d, generate_fast_weights, summarize_gradients.
Layers: MANN, MANNCell (and their MANNState), ContentAddressing; MetaNet (and its MetaNetState), AugmentedLinear, AugmentedConv2d,
AugmentedSequential, FastWeightMemory, FastWeightGenerator, GradientSummarizer. `with backend(name):` asks for one implementation.
"""

from mann_kernels import _library
from mann_kernels._backend import backend
from mann_kernels._version import __version__
from mann_kernels.modules import (
    MANN,
    AugmentedConv2d,
    AugmentedLinear,
    AugmentedSequential,
    ContentAddressing,
    FastWeightGenerator,
    FastWeightMemory,
    GradientSummarizer,
    MANNCell,
    MANNState,
    MetaNet,
    MetaNetState,
)
from mann_kernels.ops import (
    augmented_conv2d,
    augmented_linear,
    content_address,
    generate_fast_weights,
    lrua_sequence,
    lrua_step,
    lrua_write_weights,
    mann_sequence,
    memory_update,
    summarize_gradients,
)

_library.load_cpp()
_library.load_cuda()

__all__ = [
    "MANN",
    "AugmentedConv2d",
    "AugmentedLinear",
    "AugmentedSequential",
    "ContentAddressing",
    "FastWeightGenerator",
    "FastWeightMemory",
    "GradientSummarizer",
    "MANNCell",
    "MANNState",
    "MetaNet",
    "MetaNetState",
    "__version__",
    "augmented_conv2d",
    "augmented_linear",
    "backend",
    "content_address",
    "generate_fast_weights",
    "lrua_sequence",
    "lrua_step",
    "lrua_write_weights",
    "mann_sequence",
    "memory_update",
    "summarize_gradients",
]
