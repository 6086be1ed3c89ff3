"""Layers: thin modules over the operators."""

from mann_kernels.modules.addressing import ContentAddressing
from mann_kernels.modules.mann import MANN, MANNCell
from mann_kernels.modules.state import MANNState

__all__ = ["MANN", "ContentAddressing", "MANNCell", "MANNState"]
