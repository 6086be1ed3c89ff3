"""The parts of a MetaNet beside its networks: the generators m and d of fast weights, and the memory of these."""

import torch
from torch import nn

from mann_kernels.ops._check import at_least_one, eps_of_cosine, preprocessing
from mann_kernels.ops.content_address import content_address
from mann_kernels.ops.generate_fast_weights import generate_fast_weights
from mann_kernels.ops.summarize_gradients import summarize_gradients

#: How much smaller than usual the last layers of m and d start, so that the fast branch begins as a small addition.
FIRST_FAST = 0.1


class _Generator(nn.Module):
    """Methods that m and d share: one set of weights for all coordinates."""

    def _set_up(self, hidden_size: int, p: float, shapes: dict[str, tuple[int, ...]], device, dtype) -> None:
        preprocessing(p)
        self.hidden_size, self.p = hidden_size, p
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from the normal distribution with variance 1/inputs, the last layer's smaller by FIRST_FAST; no bias.

        The paper has every parameter uniform in +-0.1. Most gradients are tiny, so most fast weights begin equal, and a common
        value as large as such a bias makes each layer of 576 inputs tens of times its input, or its fast branch dead.
        """
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, parameter.shape[1] ** -0.5)
                last = parameter
            else:
                nn.init.zeros_(parameter)
        with torch.no_grad():
            last.mul_(FIRST_FAST)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, p={self.p}"


class FastWeightGenerator(_Generator):
    """MetaNet's m (eq. 1): from the gradient at each weight to the fast weight there, by an MLP that all coordinates share.

    Args:
        hidden_size: D, units of both hidden layers.
        p: of the gradients' preprocessing, see mann_kernels.generate_fast_weights.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: gradients of any shape -> fast weights of the same shape.

    Raises:
        TypeError, ValueError: a size below 1; otherwise as mann_kernels.generate_fast_weights.
    """

    weight1: nn.Parameter
    bias1: nn.Parameter
    weight2: nn.Parameter
    bias2: nn.Parameter
    weight3: nn.Parameter
    bias3: nn.Parameter

    def __init__(
        self, hidden_size: int = 20, *, p: float = 7.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        at_least_one(hidden_size=hidden_size)
        D = hidden_size
        shapes = {"weight1": (D, 2), "bias1": (D,), "weight2": (D, D), "bias2": (D,), "weight3": (1, D), "bias3": (1,)}
        self._set_up(hidden_size, p, shapes, device, dtype)

    def forward(self, grads: torch.Tensor) -> torch.Tensor:
        weights = (self.weight1, self.bias1, self.weight2, self.bias2, self.weight3, self.bias3)
        return generate_fast_weights(grads, *weights, p=self.p)


class GradientSummarizer(_Generator):
    """MetaNet's d (eq. 4): from T gradients at each weight to one fast weight there, by an LSTM that all coordinates share.

    Args:
        hidden_size: D, units of the LSTM.
        p: of the gradients' preprocessing, see mann_kernels.summarize_gradients.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: gradients [T, ...] -> fast weights [...]. The order of the T gradients matters.

    Raises:
        TypeError, ValueError: a size below 1; otherwise as mann_kernels.summarize_gradients.
    """

    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    bias: nn.Parameter
    weight_out: nn.Parameter
    bias_out: nn.Parameter

    def __init__(
        self, hidden_size: int = 20, *, p: float = 7.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        at_least_one(hidden_size=hidden_size)
        D = hidden_size
        shapes = {"weight_ih": (4 * D, 2), "weight_hh": (4 * D, D), "bias": (4 * D,)}
        shapes |= {"weight_out": (1, D), "bias_out": (1,)}
        self._set_up(hidden_size, p, shapes, device, dtype)

    def forward(self, grads: torch.Tensor) -> torch.Tensor:
        weights = (self.weight_ih, self.weight_hh, self.bias, self.weight_out, self.bias_out)
        return summarize_gradients(grads, *weights, p=self.p)


class FastWeightMemory(nn.Module):
    """MetaNet's memory: rows of fast weights, found by the cosine between keys (eq. 8 and 9).

    Args:
        eps: inside the root of the cosine's denominator.

    Shapes: index [G, S, K] and key [G, L, K] -> mix [G, L, S], the softmax of the cosines over the S rows, with which an
    augmented layer mixes the rows of a memory [G, S, P]; or all of them without G. The order of the rows does not matter.

    Raises:
        TypeError, ValueError: as mann_kernels.content_address.
    """

    def __init__(self, *, eps: float = 1e-6):
        super().__init__()
        eps_of_cosine(eps)
        self.eps = eps

    def forward(self, index: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if index.dim() == 2:
            return content_address(index.unsqueeze(0), key.unsqueeze(0), eps=self.eps).squeeze(0)
        return content_address(index, key, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
