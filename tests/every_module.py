"""A small one of each module of the package, and a call of it: what is tried on all of them is tried on a new one too."""

import inspect

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import mann_kernels.modules
from mann_kernels import compat
from mann_kernels.modules import (
    MANN,
    AugmentedConv2d,
    AugmentedLinear,
    AugmentedSequential,
    ContentAddressing,
    FastWeightGenerator,
    FastWeightMemory,
    GradientSummarizer,
    MANNCell,
    MetaNet,
)
from mann_kernels.train import learners, loop

MEMORY = {"num_slots": 7, "slot_size": 4, "num_heads": 2}


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def metanet(variant="metanet", second_order=False, **options):
    def body():
        yield nn.Conv2d(1, 3, 3, padding=1)
        yield nn.ReLU(inplace=True)
        yield AugmentedConv2d(3, 4, 3, padding=1, form="hidden", pool=True)
        yield nn.Flatten()

    base = AugmentedSequential(*body(), AugmentedLinear(36, 5, form="hidden"), AugmentedLinear(5, 3))
    embedding = AugmentedSequential(*body(), AugmentedLinear(36, 4))
    head = nn.Sequential(nn.ReLU(), nn.Linear(4, 3))
    options = {"hidden_size": 4, "summary_steps": 3, "variant": variant, "second_order": second_order} | options
    return MetaNet(base, embedding, head, **options)


def classify(module, x):
    """One support example of each class, and two queries."""
    return module(x[:3], torch.arange(3), x[3:])


IMAGES = (5, 1, 6, 6)
#: name: (how it is made, the shape of what it gets, how it is called where that is not by this alone)
MODULES = {
    "MANN": (lambda: MANN(3, 5, **MEMORY), (4, 2, 3), None),
    "MANN feedforward": (lambda: MANN(3, 5, controller="feedforward", **MEMORY), (4, 2, 3), None),
    "MANN with all options": (
        lambda: MANN(3, 5, write="add", key_strength=True, lru="shared", **MEMORY),
        (4, 2, 3),
        None,
    ),
    "MANNCell": (lambda: MANNCell(3, 5, **MEMORY), (2, 3), None),
    "ContentAddressing": (
        lambda: ContentAddressing(2, key_strength=True),
        (2, 7, 4),
        lambda m, x: m(x, x[:, :2] * 0.9),
    ),
    "AugmentedLinear": (lambda: AugmentedLinear(3, 5), (4, 3), lambda m, x: (m(x), m(x, torch.ones(5, 3)))),
    "AugmentedConv2d": (
        lambda: AugmentedConv2d(1, 4, 3, padding=1, form="hidden", pool=True),
        IMAGES,
        lambda m, x: (m(x), m(x, torch.ones(4, 1, 3, 3) / 9)),
    ),
    "AugmentedSequential": (lambda: metanet().base_learner, (2, *IMAGES), None),
    "FastWeightGenerator": (lambda: FastWeightGenerator(4), (3, 5), None),
    "GradientSummarizer": (lambda: GradientSummarizer(4), (3, 5), None),
    "FastWeightMemory": (lambda: FastWeightMemory(), (2, 3, 4), lambda m, x: m(x, x[:, :2] * 0.9)),
    "MetaNet": (metanet, IMAGES, classify),
    "MetaNet of second order": (lambda: metanet(second_order=True), IMAGES, classify),
    "MetaNet of variant +": (lambda: metanet("metanet+"), IMAGES, classify),
    "MetaNet of mean gradients": (lambda: metanet(summarizer="mean"), IMAGES, classify),
    "MetaNet of fast weights alone": (lambda: metanet(fast_only=True), IMAGES, classify),
    "MetaNet of variant -": (lambda: metanet("metanet-"), IMAGES, classify),
    "LSTM": (lambda: compat.LSTM(3, 5, **MEMORY), (4, 2, 3), None),
    "DNC": (lambda: compat.DNC(3, 5, nr_cells=7, cell_size=4), (2, 4, 3), None),
    "Recurrent": (lambda: learners.mann(3, 2, hidden_size=5, **MEMORY), (4, 2, 3), None),
    "Kept": (lambda: learners.mann(3, 2, 2, hidden_size=5, **MEMORY), (4, 2, 3), lambda m, x: m.eval()(x)),
    "FeedForward": (lambda: learners.FeedForward(3, 2, 5), (4, 2, 3), None),
    "ContextVector": (
        lambda: learners.ContextVector(3, 2, "recurrent", 5),
        (2, 4, 3),
        lambda m, x: m.predict(x, m.adapt(x, x[..., :2])),
    ),
    "Decoder": (lambda: learners.Decoder(3, 4, 2, 5), (2, 4, 3), lambda m, x: m(x, torch.ones(2, 4))),
}
#: Tried elsewhere: one needs what else it wraps, one has nothing to train.
NOT_HERE = {loop.Answers, learners.NearestNeighbour}


def classes():
    """Every nn.Module of the package but ShardedMANN, which needs several processes, and those whose names begin with _."""
    found = set()
    for module in (mann_kernels.modules, compat, learners, loop):
        for name, value in vars(module).items():
            ours = (
                inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__.startswith("mann_kernels")
            )
            if ours and not name.startswith("_"):
                found.add(value)
    return found - NOT_HERE


def make(name, seed=0):
    """The module and what it is called with."""
    torch.manual_seed(seed)
    build, shape, _ = MODULES[name]
    return build(), randn(*shape)


def call(name, module, x):
    """Every tensor that a call gives."""
    how = MODULES[name][2]
    found = module(x) if how is None else how(module, x)
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def loss_of(outputs):
    return sum(output.square().sum() for output in outputs if output.requires_grad)


def owners(module):
    """(submodule, name, parameter) of every parameter."""
    return [(part, name, p) for part in module.modules() for name, p in part.named_parameters(recurse=False)]
