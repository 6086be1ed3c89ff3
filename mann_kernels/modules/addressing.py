"""Content-based addressing as a layer of its own."""

import torch
from torch import nn

from mann_kernels.modules._init import flag
from mann_kernels.ops._check import at_least_one, eps_of_cosine
from mann_kernels.ops.content_address import content_address


class ContentAddressing(nn.Module):
    """Reads a memory by cosine similarity (Santoro et al. 2016, eq. 2 to 4).

    Args:
        num_heads: R; needed with key_strength only.
        key_strength: learn one factor per head on the similarities, `softplus(beta)`, 1 at first. Without it the factor
            is 1, as in the paper.
        eps: inside the root of the cosine's denominator.
        device: of the parameter.
        dtype: of the parameter.

    Shapes: memory [B, N, W], key [B, R, W] -> reads [B, R, W], read_weights [B, R, N].

    Raises:
        TypeError, ValueError: as mann_kernels.content_address; with key_strength, a key of another number of heads.
    """

    beta: nn.Parameter | None

    def __init__(
        self, num_heads: int = 1, *, key_strength: bool = False, eps: float = 1e-6,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        at_least_one(num_heads=num_heads)
        flag("key_strength", key_strength)
        eps_of_cosine(eps)
        self.num_heads, self.eps = num_heads, eps
        beta = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) if key_strength else None
        self.register_parameter("beta", beta)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every key strength to 1."""
        if self.beta is not None:
            nn.init.constant_(self.beta, SOFTPLUS_INVERSE_OF_1)

    def forward(self, memory: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        beta = None
        if self.beta is not None:
            if key.dim() != 3 or key.shape[1] != self.num_heads:
                raise ValueError(
                    f"key: got shape {list(key.shape)}, want [B, R, W] with R={self.num_heads} (num_heads)"
                )
            beta = nn.functional.softplus(self.beta).expand(key.shape[0], -1)
        read_weights = content_address(memory, key, beta, eps=self.eps)
        return read_weights @ memory, read_weights

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, key_strength={self.beta is not None}, eps={self.eps}"


#: log(e - 1): softplus of this is 1.
SOFTPLUS_INVERSE_OF_1 = 0.5413248546129181
