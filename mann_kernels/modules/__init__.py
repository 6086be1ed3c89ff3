"""Layers: thin modules over the operators."""

from mann_kernels.modules.addressing import ContentAddressing
from mann_kernels.modules.augmented import AugmentedConv2d, AugmentedLinear, AugmentedSequential
from mann_kernels.modules.generators import FastWeightGenerator, FastWeightMemory, GradientSummarizer
from mann_kernels.modules.mann import MANN, MANNCell
from mann_kernels.modules.metanet import MetaNet
from mann_kernels.modules.state import MANNState, MetaNetState

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
]
