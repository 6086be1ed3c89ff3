"""The layers that the networks of Munkhdalai & Yu 2017 are made of, and base learner and embedding from them."""

from torch import nn

from mann_kernels.modules._init import HeStart
from mann_kernels.modules.augmented import AugmentedConv2d, AugmentedLinear, AugmentedSequential


class Linear(HeStart, nn.Linear):
    """Is an nn.Linear that may start as He et al. 2015 have it."""


class Conv2d(HeStart, nn.Conv2d):
    """Is an nn.Conv2d that may start as He et al. 2015 have it."""


def hidden_conv(channels: int, filters: int, **kind) -> AugmentedConv2d:
    """Make an augmented 3 x 3 convolution with a ReLU on each branch and 2 x 2 pooling."""
    return AugmentedConv2d(channels, filters, 3, padding=1, bias=False, form="hidden", pool=True, **kind)


def networks(
    base_body, embedding_body, features: int, ways: int, **kind
) -> tuple[AugmentedSequential, AugmentedSequential, nn.Sequential]:
    """Base learner, embedding and its head, as in the original code: the key is what the linear layer gives before the ReLU."""
    hidden = AugmentedLinear(features, features, bias=False, form="hidden", **kind)
    base = AugmentedSequential(*base_body(), hidden, AugmentedLinear(features, ways, bias=False, **kind))
    embedding = AugmentedSequential(*embedding_body(), AugmentedLinear(features, features, bias=False, **kind))
    head = nn.Sequential(nn.ReLU(), Linear(features, ways, bias=False, **kind))
    for layer in (*base, *embedding, *head):
        if isinstance(layer, HeStart):
            layer.he = True
            layer.reset_parameters()
    return base, embedding, head
