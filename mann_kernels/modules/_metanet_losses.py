"""The losses of MetaNet's support examples (eq. 2, 3, 6, 7 of Munkhdalai & Yu 2017), one for every gradient that is taken."""

import torch
import torch.nn.functional as F


def cross_entropy(labels: torch.Tensor, m: int):
    """From logits [n*m, ways] to the sum of n losses, each the mean over m examples, for labels [n*m]."""

    def losses(logits):
        total = F.cross_entropy(logits, labels, reduction="sum")
        return total if m == 1 else total / m

    return losses


def contrastive(same: torch.Tensor, margin: float):
    """From keys [2*n, K] of n pairs to the sum of their losses; same: bool [n], whether a pair is of one class."""

    def losses(key):
        first, second = key.unflatten(0, (-1, 2)).unbind(1)
        square = (first - second).square().sum(-1)
        # the tiny term keeps the root's derivatives finite where two keys are equal
        apart = F.relu(margin - (square + 1e-12).sqrt()).square()
        return torch.where(same, square, apart).sum() / 2

    return losses


def random_pairs(G: int, S: int, T: int, generator: torch.Generator | None) -> torch.Tensor:
    """[G, T, 2] numbers of two different examples out of S, uniform."""
    first = torch.randint(S, (G, T), generator=generator, device="cpu")
    offset = torch.randint(1, S, (G, T), generator=generator, device="cpu")
    return torch.stack([first, (first + offset) % S], -1)
