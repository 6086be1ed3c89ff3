"""One whole update of MetaNet, 5-way 1-shot with 50 queries on the paper's Omniglot network: ours, and Algorithm 1 written out."""

import functools

import torch
import torch.nn.functional as F

from bench.bench_generate_fast_weights import generate
from bench.bench_summarize_gradients import summarize
from bench.operators import Bench, Case
from mann_kernels import MetaNet

PARTS = ("content_address", "generate_fast_weights", "summarize_gradients", "augmented_linear", "augmented_conv2d")
#: Filters of a convolution, where it is verified.
VERIFIED = (3, 8)
#: The logarithm of tiny gradients makes of float32's rounding what no rule bounds. Each operator is verified in every dtype.
DTYPES = ("float64",)
WAYS, QUERIES = 5, 50
CONVOLUTIONS = 5


@functools.cache
def network(filters: int, dtype: torch.dtype) -> MetaNet:
    torch.manual_seed(0)
    return MetaNet.omniglot(WAYS, filters=filters, dtype=dtype)


def inputs(filters: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """float64: images of five patterns under noise, and the parameters by name."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(WAYS, 1, 7, 7, generator=generator, dtype=torch.float64).round().repeat_interleave(4, 2)
    images = coarse.repeat_interleave(4, 3)
    labels = torch.arange(WAYS).repeat(QUERIES // WAYS)
    noise = torch.rand(WAYS + QUERIES, 1, 28, 28, generator=generator, dtype=torch.float64)
    images = (images[torch.cat([torch.arange(WAYS), labels])] + noise) / 2
    parameters = {name: value.detach().clone() for name, value in network(filters, torch.float64).named_parameters()}
    return {"support_x": images[:WAYS], "query_x": images[WAYS:], **parameters}


def ours(support_x, query_x, *parameters):
    net = network(parameters[0].shape[0], support_x.dtype)
    named = dict(zip((name for name, _ in net.named_parameters()), parameters, strict=True))
    return torch.func.functional_call(net, named, (support_x, torch.arange(WAYS, device=support_x.device), query_x))


# The algorithm as one would write it for one task with what torch has: the gradients of the support examples by vmap(grad), the
# fast weights of every query read from the memory, a group of the convolution for each query.


def layers(x, weights, act=F.relu):
    for weight in weights[:CONVOLUTIONS]:
        x = F.max_pool2d(act(F.conv2d(x, weight, padding=1)), 2, ceil_mode=True)
    return x.flatten(1)


def both(x, slow, fast):
    """The convolutions with slow weights and with fast weights [O, C, k, k] that all images share."""
    for weight, other in zip(slow[:CONVOLUTIONS], fast[:CONVOLUTIONS], strict=True):
        y = F.relu(F.conv2d(x, weight, padding=1)) + F.relu(F.conv2d(x, other, padding=1))
        x = F.max_pool2d(y, 2, ceil_mode=True)
    return x.flatten(1)


def each(x, slow, fast):
    """Run the convolutions with slow weights and with fast weights [L, O, C, k, k], one set for each image."""
    for weight, other in zip(slow[:CONVOLUTIONS], fast[:CONVOLUTIONS], strict=True):
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
    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(constants, x, torch.arange(WAYS, device=x.device))


def flat(grads):
    return torch.cat([grad.flatten(1) for grad in grads], 1)


def shaped(fast, weights):
    parts = fast.split([weight.numel() for weight in weights], -1)
    return [part.unflatten(-1, weight.shape) for part, weight in zip(parts, weights, strict=True)]


def eager(support_x, query_x, *parameters):
    base, embedding, head = list(parameters[:7]), list(parameters[7:13]), parameters[13]
    m, d = (parameters[14:20], parameters[20:26]), (parameters[26:31], parameters[31:36])
    conv, linear = slice(CONVOLUTIONS), slice(CONVOLUTIONS, None)
    grads = gradients(embedding_loss, [*embedding, head], support_x)[:6]
    task = shaped(summarize(flat(grads[conv]), *d[0]), embedding[conv])
    task += shaped(summarize(flat(grads[linear]), *d[1]), embedding[linear])
    grads = gradients(base_loss, base, support_x)
    memory = [generate(flat(grads[kind]), *weights) for kind, weights in zip((conv, linear), m, strict=True)]
    h = both(torch.cat([support_x, query_x]), embedding, task)
    index, key = (F.linear(h, embedding[5]) + F.linear(h, task[5])).split([WAYS, QUERIES])
    squares = (key * key).sum(1)[:, None] * (index * index).sum(1)
    mix = torch.softmax(key @ index.mT * torch.rsqrt(squares + 1e-6), 1)
    fast = shaped(mix @ memory[0], base[conv]) + shaped(mix @ memory[1], base[linear])
    h = each(query_x, base, fast)
    h = F.relu(F.linear(h, base[5])) + F.relu(torch.bmm(fast[5], h[..., None])[..., 0])
    return F.linear(h, base[6]) + torch.bmm(fast[6], h[..., None])[..., 0]


def cases(quick: bool) -> list[Case]:
    # --quick leaves out the compiling that takes as long as all the others together
    why = "not compiled by --quick" if quick else None
    return [Case("omniglot 5-way 1-shot", 64, rank=0, uncompiled=why)]


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
