"""What a user would run otherwise. Every contestant does the same work on the same numbers.

The plain ones take the tensors of `bench.stems.inputs` in order and return what the reference returns.
"""

import itertools
import warnings

import torch
import torch.nn.functional as F

from bench import peers
from bench.stems import Shape

EPS, DECAY = 1e-6, 0.99
# What an earlier run compiled would hide how long compiling takes. torch warns of that.
torch.compiler.config.force_disable_caches = True
warnings.filterwarnings("ignore", "dynamo_pgo force disabled")


def address(memory, key):
    dot = torch.bmm(key, memory.transpose(1, 2))
    squares = (key * key).sum(-1)[:, :, None] * (memory * memory).sum(-1)[:, None, :]
    return torch.softmax(dot * torch.rsqrt(squares + EPS), dim=-1)


def write_weights(usage, read_weights, gate):
    # the lowest usages in order; a stable sort makes ties go to the lowest slot, which topk does not promise
    slots = torch.argsort(usage, dim=1, stable=True)[:, : gate.shape[1]]
    sigma = torch.sigmoid(gate)[..., None]
    return (sigma * read_weights).scatter_add(2, slots[..., None], 1 - sigma), slots


def update(memory, weights, add, slots):
    kept = memory.scatter(1, slots[:, :1, None].expand(-1, -1, memory.shape[2]).long(), 0.0)
    return torch.baddbmm(kept, weights.transpose(1, 2), add)


def step(memory, usage, read_weights, key, gate):
    weights, slots = write_weights(usage, read_weights, gate)
    memory = update(memory, weights, key, slots)
    read_weights = address(memory, key)
    with torch.no_grad():
        usage = DECAY * usage + read_weights.sum(1) + weights.sum(1)
    return torch.bmm(read_weights, memory), memory, usage, read_weights


def mann_step(x, h, c, reads, memory, usage, read_weights, weight_ih, weight_hh, bias, weight_head, bias_head):
    gates = F.linear(x, weight_ih, bias) + F.linear(torch.cat([h, reads.flatten(1)], 1), weight_hh)
    gate_in, gate_forget, cell, gate_out = gates.chunk(4, 1)
    c = torch.sigmoid(gate_forget) * c + torch.sigmoid(gate_in) * torch.tanh(cell)
    h = torch.sigmoid(gate_out) * torch.tanh(c)
    heads, width = reads.shape[1:]
    head = F.linear(h, weight_head, bias_head)
    key = torch.tanh(head[:, : heads * width]).unflatten(1, (heads, width))
    reads, memory, usage, read_weights = step(memory, usage, read_weights, key, head[:, heads * width :])
    return torch.cat([h, reads.flatten(1)], 1), h, c, reads, memory, usage, read_weights


def over_time(stem, one_step):
    """The loop over time that everybody writes."""

    def lrua(memory, usage, read_weights, key, gate):
        outputs = []
        for t in range(key.shape[0]):
            reads, memory, usage, read_weights = one_step(memory, usage, read_weights, key[t], gate[t])
            outputs.append(reads)
        return torch.stack(outputs), memory, usage, read_weights

    def mann(x, h, c, reads, memory, usage, read_weights, *weights):
        state, outputs = (h, c, reads, memory, usage, read_weights), []
        for t in range(x.shape[0]):
            output, *state = one_step(x[t], *state, *weights)
            outputs.append(output)
        return torch.stack(outputs), *state

    return lrua if stem == "lrua_sequence" else mann


EAGER = {
    "content_address": address,
    "lrua_write_weights": write_weights,
    "memory_update": update,
    "lrua_step": step,
    "lrua_sequence": over_time("lrua_sequence", step),
    "mann_sequence": over_time("mann_sequence", mann_step),
}


_numbers = itertools.count()


def compiled_anew(function):
    """Under torch.compile, whatever was compiled before, and leaving that: code of its own, which is what torch goes by."""

    def fresh(*arguments):
        return function(*arguments)

    fresh.__code__ = fresh.__code__.replace(co_name=f"compiled_{next(_numbers)}")
    return torch.compile(fresh, dynamic=False)


def compiled(stem, loop):
    """The eager contestant under torch.compile: its step, called in a loop, or the loop itself, unrolled."""
    if loop or not stem.endswith("_sequence"):
        return compiled_anew(EAGER[stem])
    return over_time(stem, compiled_anew(mann_step if stem == "mann_sequence" else step))


def others(stem, s: Shape, tensors):
    """What an episode is measured by that computes something else: functions that make a forward pass and a training step."""
    if stem != "mann_sequence":
        return {}
    x = tensors["x"].detach()
    return {"lstm": lambda: lstm(s, x), "gemm_floor": lambda: gemm_floor(s, x)} | peers.others(s, x)


def lstm(s: Shape, x: torch.Tensor):
    """nn.LSTM (on CUDA: cuDNN's) of the same input and width: the price of having no memory."""
    module = torch.nn.LSTM(s.I, s.H, device=x.device, dtype=x.dtype)
    weight = torch.randn(s.T, s.B, s.H, device=x.device, dtype=x.dtype)

    def forward():
        with torch.no_grad():
            module(x)

    def train():
        module.zero_grad(set_to_none=True)
        (module(x)[0] * weight).sum().backward()

    return forward, train


def gemm_floor(s: Shape, like: torch.Tensor):
    """Only the controller's and heads' matrix products, each as large as the order of time allows, into buffers made beforehand."""
    K, P = s.H + s.R * s.W, s.R * s.W + s.R

    def normal(*shape):
        return torch.randn(shape, device=like.device, dtype=like.dtype)

    x, rows, h = normal(s.T * s.B, s.I), normal(s.T * s.B, K), normal(s.B, s.H)
    gates, head = normal(s.T * s.B, 4 * s.H), normal(s.T * s.B, P)
    weight_ih, weight_hh, weight_head = normal(4 * s.H, s.I), normal(4 * s.H, K), normal(P, s.H)
    shapes = ((s.T * s.B, 4 * s.H), (s.B, 4 * s.H), (s.B, P), (s.B, K), (s.B, s.H))
    out = {shape: like.new_empty(shape) for shape in shapes}
    grads = [torch.empty_like(weight) for weight in (weight_ih, weight_hh, weight_head)]

    def forward():
        torch.mm(x, weight_ih.t(), out=out[s.T * s.B, 4 * s.H])
        for _ in range(s.T):
            torch.mm(rows[: s.B], weight_hh.t(), out=out[s.B, 4 * s.H])
            torch.mm(h, weight_head.t(), out=out[s.B, P])

    def train():
        forward()
        for _ in range(s.T):
            torch.mm(head[: s.B], weight_head, out=out[s.B, s.H])
            torch.mm(gates[: s.B], weight_hh, out=out[s.B, K])
        torch.mm(gates.t(), x, out=grads[0])
        torch.mm(gates.t(), rows, out=grads[1])
        torch.mm(head.t(), rows[:, : s.H], out=grads[2])

    return forward, train
