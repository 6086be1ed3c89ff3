"""A small MetaNet and tasks for it."""

import math

import torch
from torch import nn

from mann_kernels import AugmentedConv2d, AugmentedLinear, AugmentedSequential, MetaNet

WAYS, KEY = 3, 4
KIND = {"dtype": torch.float64}
VARIANTS = ("metanet-", "metanet", "metanet+")


def small(variant="metanet", **options):
    """Images [1, 6, 6]; two convolutions and two linear layers; parameters large enough that every branch is felt."""
    torch.manual_seed(0)

    def body():
        yield AugmentedConv2d(1, 3, 3, padding=1, bias=False, form="hidden", pool=True, **KIND)
        yield AugmentedConv2d(3, 4, 3, padding=1, bias=False, form="hidden", pool=True, **KIND)
        yield nn.Flatten()

    base = AugmentedSequential(
        *body(), AugmentedLinear(16, 4, False, form="hidden", **KIND), AugmentedLinear(4, WAYS, False, **KIND)
    )
    embedding = AugmentedSequential(*body(), AugmentedLinear(16, KEY, False, **KIND))
    head = nn.Sequential(nn.ReLU(), nn.Linear(KEY, WAYS, bias=False, **KIND))
    options = {"summary_steps": 3, "hidden_size": 5} | options
    metanet = MetaNet(base, embedding, head, variant=variant, **options, **KIND)
    for name, parameter in metanet.named_parameters():
        scale = 0.5 if name.startswith(("generators", "summarizers")) else 1 / math.sqrt(parameter[0].numel())
        nn.init.normal_(parameter, 0, scale)
    return metanet


def draw(tasks=2, shots=1, queries=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.stack([torch.randperm(WAYS, generator=generator).repeat(shots) for _ in range(tasks)])
    x = torch.rand(tasks, WAYS * shots, 1, 6, 6, generator=generator, **KIND)
    return x, y, torch.rand(tasks, queries, 1, 6, 6, generator=generator, **KIND)
