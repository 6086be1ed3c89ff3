"""The losses of MetaNet's support examples (eq. 2, 3, 6, 7 of Munkhdalai & Yu 2017), one for every gradient that is taken."""

import torch
import torch.nn.functional as F


def cross_entropy(labels: torch.Tensor):
    """From logits [G, n, m, ways] to the mean losses [G, n] over m, for labels [G, n, m]."""

    def losses(logits):
        each = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
        return each.unflatten(0, labels.shape).mean(-1)

    return losses


def contrastive(labels: torch.Tensor, margin: float):
    """From keys [G, T, 2, K] of pairs to their losses [G, T], for labels [G, T, 2]."""
    same = (labels[..., 0] == labels[..., 1]).double()

    def losses(key):
        square = (key[..., 0, :] - key[..., 1, :]).square().sum(-1)
        # the tiny term keeps the root's derivatives finite where two keys are equal
        apart = F.relu(margin - (square + 1e-12).sqrt()).square()
        return (same.to(key.dtype) * square + (1 - same).to(key.dtype) * apart) / 2

    return losses


def random_pairs(G: int, S: int, T: int, generator: torch.Generator | None) -> torch.Tensor:
    """[G, T, 2] numbers of two different examples out of S, uniform."""
    first = torch.randint(S, (G, T), generator=generator, device="cpu")
    offset = torch.randint(1, S, (G, T), generator=generator, device="cpu")
    return torch.stack([first, (first + offset) % S], -1)
