"""Content-based addressing for use alone."""

import torch
import torch.nn.functional as F
from torch import nn

from mann_kernels.modules._init import ONE_BEFORE_SOFTPLUS, check_sizes
from mann_kernels.ops import content_address


class ContentAddressing(nn.Module):
    """Look keys up in a memory by cosine similarity (Santoro et al. 2016, eq. 2 to 4).

    Args:
        num_heads: R, how many keys look at one memory.
        key_strength: learn a factor on each head's similarities, softplus of the parameter `strength` [R], 1 at the start.
            Without it a perfect match among N orthogonal slots weighs only e / (e + N - 1), as in the paper.
        eps: see mann_kernels.content_address.
        device, dtype: of the parameter.

    `reads, read_weights = addressing(memory, key, beta=None)` with

        memory: [B, N, W], key: [B, R, W].
        beta: [B, R], a key strength from elsewhere (not with key_strength=True); None is 1.
        reads: [B, R, W] = read_weights @ memory, read_weights: [B, R, N]; each head's sum to 1.

    Raises ValueError or TypeError for a shape, dtype or device that does not fit.
    """

    def __init__(self, num_heads: int = 1, *, key_strength: bool = False, eps: float = 1e-6, device=None, dtype=None):
        super().__init__()
        check_sizes(num_heads=num_heads)
        self.num_heads = num_heads
        self.key_strength = key_strength
        self.eps = eps
        strength = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) if key_strength else None
        self.register_parameter("strength", strength)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Key strength 1: the paper's."""
        if self.strength is not None:
            nn.init.constant_(self.strength, ONE_BEFORE_SOFTPLUS)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, key_strength={self.key_strength}, eps={self.eps}"

    def forward(
        self, memory: torch.Tensor, key: torch.Tensor, beta: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key.dim() != 3 or key.shape[1] != self.num_heads:
            raise ValueError(f"key: got shape {list(key.shape)}, want [B, R, W] with R={self.num_heads}")
        if self.strength is not None:
            if beta is not None:
                raise ValueError("beta: got a tensor, want None: with key_strength=True the module learns its own")
            beta = F.softplus(self.strength).expand(key.shape[0], -1)
        read_weights = content_address(memory, key, beta, eps=self.eps)
        return read_weights @ memory, read_weights
