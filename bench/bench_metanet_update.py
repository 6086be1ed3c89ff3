"""The bench of a whole update of MetaNet, 1-shot with 50 queries on the paper's networks: ours, and Algorithm 1 written out."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.bench_generate_fast_weights import generate
from bench.bench_summarize_gradients import summarize
from bench.operators import Bench, Case
from mann_kernels import MetaNet

PARTS = ("content_address", "generate_fast_weights", "summarize_gradients", "augmented_linear", "augmented_conv2d")
#: The logarithm of tiny gradients makes of float32's rounding what no rule bounds. Each operator is verified in every dtype.
DTYPES = ("float64",)
QUERIES = 50
CONVOLUTIONS = 5
STEPS = 5  # losses whose gradients d sees


@dataclass(frozen=True)
class Shape:
    """Classes of a task, filters of a convolution, channels and side of an image, and how many of the five convolutions have no
    fast weights."""

    ways: int
    filters: int
    channels: int = 1
    side: int = 28
    plain: int = 0


SHAPES = {"omniglot 5-way 1-shot": Shape(5, 64), "miniimagenet 10-way 1-shot": Shape(10, 32, 3, 84, 3)}
#: What verification runs on.
VERIFIED = (Shape(5, 3), Shape(5, 8), Shape(10, 2, 3, 84, 3))


@functools.cache
def network(s: Shape, dtype: torch.dtype) -> MetaNet:
    torch.manual_seed(0)
    make = MetaNet.mini_imagenet if s.plain else MetaNet.omniglot
    return make(s.ways, filters=s.filters, dtype=dtype)


def inputs(s: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    """float64: images of as many patterns as classes under noise, and the parameters by name."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(s.ways, s.channels, s.side // 4, s.side // 4, generator=generator, dtype=torch.float64).round()
    images = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    labels = torch.arange(s.ways).repeat(1 + QUERIES // s.ways)
    noise = torch.rand(len(labels), *images.shape[1:], generator=generator, dtype=torch.float64)
    images = (images[labels] + noise) / 2
    parameters = {name: value.detach().clone() for name, value in network(s, torch.float64).named_parameters()}
    return {"support_x": images[: s.ways], "query_x": images[s.ways :], **parameters}


def shape_of(support_x, parameters) -> Shape:
    """The shape that these inputs were drawn for."""
    ways, channels, side, _ = support_x.shape
    return Shape(ways, parameters[0].shape[0], channels, side, 3 if channels == 3 else 0)


def ours(support_x, query_x, *parameters):
    net = network(shape_of(support_x, parameters), support_x.dtype)
    named = dict(zip((name for name, _ in net.named_parameters()), parameters, strict=True))
    labels = torch.arange(len(support_x), device=support_x.device)
    return torch.func.functional_call(net, named, (support_x, labels, query_x))


# The algorithm as one would write it for one task with what torch has: the gradients of the support examples by vmap(grad), the
# fast weights of every query read from the memory, a group of the convolution for each query. Fast weights are those of the last
# layers: the first convolutions may have none.


def convolved(x, weights):
    for weight in weights:
        x = F.max_pool2d(F.relu(F.conv2d(x, weight, padding=1)), 2, ceil_mode=True)
    return x


def layers(x, weights):
    return convolved(x, weights[:CONVOLUTIONS]).flatten(1)


def both(x, slow, fast):
    """The convolutions with slow weights and with fast weights [O, C, k, k] that all images share."""
    for weight, other in zip(slow, fast, strict=True):
        y = F.relu(F.conv2d(x, weight, padding=1)) + F.relu(F.conv2d(x, other, padding=1))
        x = F.max_pool2d(y, 2, ceil_mode=True)
    return x.flatten(1)


def each(x, slow, fast):
    """Run the convolutions with slow weights and with fast weights [L, O, C, k, k], one set for each image."""
    for weight, other in zip(slow, fast, strict=True):
        grouped = F.conv2d(x.flatten(0, 1)[None], other.flatten(0, 1), padding=1, groups=len(x))
        y = F.relu(F.conv2d(x, weight, padding=1)) + F.relu(grouped.unflatten(1, (len(x), -1))[0])
        x = F.max_pool2d(y, 2, ceil_mode=True)
    return x.flatten(1)


def base_loss(weights, x, y):
    hidden = F.relu(F.linear(layers(x[None], weights), weights[5]))
    return F.cross_entropy(F.linear(hidden, weights[6]), y[None])


def embedding_loss(weights, x, y):
    key = F.linear(layers(x[None], weights), weights[5])
    return F.cross_entropy(F.linear(F.relu(key), weights[6]), y[None])


def gradients(loss, weights, x):
    constants = [weight.detach() for weight in weights]
    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(constants, x, torch.arange(len(x), device=x.device))


def flat(grads):
    return torch.cat([grad.flatten(1) for grad in grads], 1)


def shaped(fast, weights):
    parts = fast.split([weight.numel() for weight in weights], -1)
    return [part.unflatten(-1, weight.shape) for part, weight in zip(parts, weights, strict=True)]


def eager(support_x, query_x, *parameters):
    ways, plain = len(support_x), shape_of(support_x, parameters).plain
    base, embedding, head = list(parameters[:7]), list(parameters[7:13]), parameters[13]
    m, d = (parameters[14:20], parameters[20:26]), (parameters[26:31], parameters[31:36])
    conv, linear = slice(plain, CONVOLUTIONS), slice(CONVOLUTIONS, None)
    n = CONVOLUTIONS - plain
    grads = gradients(embedding_loss, [*embedding, head], support_x)[:6]
    chunks = [flat(grads[kind]).unflatten(0, (STEPS, -1)).mean(1) for kind in (conv, linear)]
    task = shaped(summarize(chunks[0], *d[0]), embedding[conv]) + shaped(summarize(chunks[1], *d[1]), embedding[linear])
    grads = gradients(base_loss, base, support_x)
    memory = [generate(flat(grads[kind]), *weights) for kind, weights in zip((conv, linear), m, strict=True)]
    h = both(convolved(torch.cat([support_x, query_x]), embedding[:plain]), embedding[conv], task[:n])
    index, key = (F.linear(h, embedding[5]) + F.linear(h, task[n])).split([ways, QUERIES])
    squares = (key * key).sum(1)[:, None] * (index * index).sum(1)
    mix = torch.softmax(key @ index.mT * torch.rsqrt(squares + 1e-6), 1)
    fast = shaped(mix @ memory[0], base[conv]) + shaped(mix @ memory[1], base[linear])
    h = each(convolved(query_x, base[:plain]), base[conv], fast[:n])
    h = F.relu(F.linear(h, base[5])) + F.relu(torch.bmm(fast[n], h[..., None])[..., 0])
    return F.linear(h, base[6]) + torch.bmm(fast[n + 1], h[..., None])[..., 0]


def cases(quick: bool) -> list[Case]:
    # --quick leaves out the compiling that takes as long as all the others together
    why = "not compiled by --quick" if quick else None
    return [
        Case(name, shape, rank, uncompiled=why, quick=rank == 0) for rank, (name, shape) in enumerate(SHAPES.items())
    ]


BENCH = Bench(
    op="metanet_update",
    suite="metanet",
    inputs=inputs,
    constant=("support_x", "query_x"),
    verified=VERIFIED,
    cases=cases,
    eager=eager,
    ours=ours,
    plain=eager,
    parts=PARTS,
    dtypes=DTYPES,
)
