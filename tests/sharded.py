"""`torchrun --nproc-per-node P tests/sharded.py CASE ...`: on every rank, a sharded memory against one that is whole.

Cases: `equal` (outputs, state, gradients to second order), `bytes` (what a step sends, for growing N), `large` (a million slots).
"""

import gc
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from mann_kernels import MANN
from mann_kernels import backend as use_backend
from mann_kernels.distributed import SLOTS, ShardedMANN, _Local, _Sum
from mann_kernels.testing import accuracy, assert_accurate

OPTIONS = (
    {},
    {"write": "add", "key_strength": True, "squash": "identity"},
    {"lru": "shared", "erase": "all", "decay": 0.95},
    {"controller": "feedforward"},
    {"controller": "feedforward", "write": "add", "key_strength": True, "lru": "shared"},
)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def total(function, field, dim):
    """The sum over all slots, the same on every rank. Not by full_tensor: in torch 2.10 it cannot be differentiated twice."""
    if isinstance(field, DTensor):
        return _Sum.apply(function(_Local.apply(field, dim)).sum(), field.device_mesh.get_group())
    return function(field).sum()


def pair(mesh, *sizes, **options):
    """Make the same layer, sharded and whole."""
    torch.manual_seed(dist.get_rank())  # the ranks agree all the same: the first one's weights are everybody's
    sharded = ShardedMANN(*sizes, mesh=mesh, **options)
    plain = MANN(*sizes, **options)
    plain.load_state_dict(sharded.state_dict())
    return sharded, plain


def quantities(layer, x, lengths, order):
    """Outputs, state after two calls, and gradients (of gradients, for order 2), by name."""
    x = x.clone().requires_grad_()
    output, state = layer(x, None, lengths)
    again, state = layer(x, state)
    loss = (output * again).sin().sum()
    loss += total(torch.square, state.read_weights, SLOTS["read_weights"]) + total(
        torch.sin, state.memory, SLOTS["memory"]
    )
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, [x, *parameters], create_graph=order == 2)
    if order == 2:
        grads = torch.autograd.grad(sum(grad.sin().sum() for grad in grads), [x, *parameters], allow_unused=True)
    named = {"output": again, **{name: whole(field) for name, field in state._asdict().items() if field is not None}}
    named |= dict(zip(["dx", *("d" + name for name in names)], grads, strict=True))
    return {name: value.detach() for name, value in named.items() if value is not None}


def equal(mesh):
    for options in OPTIONS:
        # also fewer slots on the last rank, and none
        for slots, order in ((12, 1), (5, 1), (4, 1), (7, 2)):
            sizes = (3, 6, slots, 4, 2)
            sharded, plain = pair(mesh, *sizes, dtype=torch.float64, **options)
            torch.manual_seed(1)
            x, lengths = torch.randn(4, 3, 3, dtype=torch.float64), torch.tensor([4, 0, 2])
            got, want = quantities(sharded, x, lengths, order), quantities(plain, x, lengths, order)
            assert got.keys() == want.keys()
            for name, value in want.items():
                error = (got[name] - value).abs().max()
                assert error <= 1e-11 * (1 + value.abs().max()), (
                    f"{name}: {error:.2e} at {options}, N={slots}, order {order}"
                )
    sharded, plain = pair(mesh, 3, 6, 128, 4, 2)
    x = torch.randn(40, 3, 3, generator=torch.Generator().manual_seed(1))
    with use_backend("reference"):
        same, exact = quantities(plain, x, None, 1), quantities(plain.double(), x.double(), None, 1)
    for name, value in quantities(sharded, x, None, 1).items():
        assert_accurate(value, same[name], exact[name], name=name)


class Sent:
    """Counts the bytes that this process hands to collectives."""

    def __enter__(self):
        self.bytes, self.kept = 0, {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

        def counted(name, which):
            def call(*args, **kwargs):
                self.bytes += args[which].nbytes
                return self.kept[name](*args, **kwargs)

            return call

        dist.all_reduce, dist.all_gather = counted("all_reduce", 0), counted("all_gather", 1)
        return self

    def __exit__(self, *_):
        for name, function in self.kept.items():
            setattr(dist, name, function)


def bytes_of_a_step(mesh, slots, batch=2, heads=3, width=5):
    sharded = ShardedMANN(4, 6, slots, width, heads, mesh=mesh)
    x, state = torch.randn(1, batch, 4), sharded.initial_state(batch)
    with Sent() as sent:
        output, after = sharded(x, state)
        forward = sent.bytes
        (output.sum() + after.read_weights.to_local().square().sum()).backward()
    return forward, sent.bytes - forward


def bytes_sent(mesh):
    found = {slots: bytes_of_a_step(mesh, slots) for slots in (16, 256, 65_536)}
    B, R, W = 2, 3, 5
    # forward: (usage, slot) in float64, then maximum, sum and read; backward: the sum's gradient, and those of key and gate
    assert set(found.values()) == {(16 * B * R + 4 * B * R * (W + 2), 4 * B * R + 4 * B * R * (W + 1))}, found


def large(mesh, slots=1_000_000, width=32, steps=3):
    """On the first rank the whole memory stands beside, in float32 and in float64 (about 10 GB)."""
    sharded, plain = pair(mesh, 4, 16, slots, width, 4)
    x = torch.randn(steps, 1, 4, generator=torch.Generator().manual_seed(1))
    with Sent() as sent:
        start = time.perf_counter()
        output, state = sharded(x)
        output.square().sum().backward()
        seconds = time.perf_counter() - start
    assert state.memory.to_local().shape == (1, slots // mesh.size(), width)
    got = {"output": output, "memory": state.memory.full_tensor(), "usage": state.usage.full_tensor()}
    small = sum(bytes_of_a_step(mesh, 1000, 1, 4, width))
    assert small == sum(bytes_of_a_step(mesh, slots, 1, 4, width))
    if dist.get_rank():
        return
    got |= {"d" + name: parameter.grad for name, parameter in sharded.named_parameters()}
    with use_backend("reference"):
        same, exact = one_episode(plain, x), one_episode(plain.double(), x.double())
    worst = 0.0
    for name, value in got.items():
        assert_accurate(value, same[name], exact[name], name=name)
        found = accuracy(value, same[name], exact[name])
        worst = max(worst, found.error / found.budget)
    print(
        f"N={slots:,} W={width}, {mesh.size()} processes: as exact as one process ({worst:.2f} of the rule's bound at the most); "
        f"{sent.bytes / steps:,.0f} bytes sent by each in a step, forward and backward (N=1,000: {small:,}); "
        f"{seconds / steps:.2f} s a step"
    )


def one_episode(layer, x):
    layer.zero_grad()
    output, state = layer(x)
    output.square().sum().backward()
    found = {"output": output.detach(), "memory": state.memory.detach(), "usage": state.usage}
    return found | {"d" + name: parameter.grad for name, parameter in layer.named_parameters()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for case in sys.argv[1:]:
        {"equal": equal, "bytes": bytes_sent, "large": large}[case](mesh)
    gc.collect()  # models must be gone before their process group, or its threads and this one may wait for each other at exit
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # all is asserted; threads of gloo that outlive the interpreter would abort the process now and then
