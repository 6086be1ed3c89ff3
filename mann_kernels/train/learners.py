"""Learners: modules that answer whole episodes, or adapt to a support set and predict."""

import torch
import torch.nn.functional as F
from torch import nn

from mann_kernels.modules import MANN


class Recurrent(nn.Module):
    """A recurrent core and a linear readout; the state of the core is what it has learned of a task.

    Args:
        core: called like nn.LSTM: x [T, B, I] and a state -> output [T, B, width] and a state.
        width: of the core's output.
        output_size: of the answer.

    Two protocols. Episodes: x [T, B, I] -> output [T, B, output_size]. Support and queries: the examples of a support set are fed
    one after the other beside their answers, and each query with zeros for its answer to the state that follows.
    """

    def __init__(self, core: nn.Module, width: int, output_size: int):
        super().__init__()
        self.core, self.readout = core, nn.Linear(width, output_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.core(x)[0])


def lstm(input_size: int, output_size: int, hidden_size: int) -> Recurrent:
    """An LSTM without memory, the paper's baseline."""
    return Recurrent(nn.LSTM(input_size, hidden_size), hidden_size, output_size)


def mann(input_size: int, output_size: int, **options) -> Recurrent:
    """A MANN with these options."""
    core = MANN(input_size, **options)
    return Recurrent(core, core.hidden_size + core.num_heads * core.slot_size, output_size)


def set_forget_bias(core: nn.Module, value: float) -> None:
    """Start the forget gates of an LSTM, or of a MANN's, around sigmoid(value)."""
    bias = core.bias_ih_l0 if isinstance(core, nn.LSTM) else core.bias
    with torch.no_grad():
        bias[core.hidden_size : 2 * core.hidden_size] += value
