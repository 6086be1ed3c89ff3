"""`torchrun --nproc-per-node P tests/parallel.py CASE`: a MANN trained by several processes against one that is trained alone.

Cases: `ddp` (DistributedDataParallel, also under torch.compile and autocast), `fsdp` (fully_shard).
"""

import gc
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mann_kernels import MANN


class Model(torch.nn.Module):
    def __init__(self, controller):
        super().__init__()
        self.mann = MANN(5, hidden_size=8, num_slots=9, slot_size=4, num_heads=2, controller=controller)
        self.classify = torch.nn.Linear(8 + 8, 3)

    def forward(self, x):
        return self.classify(self.mann(x)[0])


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, x, y, low):
    """Three updates; the mean loss over what this process has."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [whole(parameter).detach() for parameter in model.parameters()]


def compare(wrap, compiled=False, low=False, tolerance=1e-5):
    rank, world = dist.get_rank(), dist.get_world_size()
    for controller in ("lstm", "feedforward"):
        torch.manual_seed(0)
        model, alone = Model(controller), Model(controller)
        alone.load_state_dict(model.state_dict())
        before = [parameter.detach().clone() for parameter in alone.parameters()]
        x, y = torch.randn(6, 4 * world, 5), torch.randint(3, (6, 4 * world))
        own = slice(4 * rank, 4 * rank + 4)
        model = wrap(model)
        got = train(torch.compile(model, backend="aot_eager") if compiled else model, x[:, own], y[:, own], low)
        for a, b, first in zip(got, train(alone, x, y, low), before, strict=True):
            moved = (b - first).abs().max()
            assert moved > 0
            assert (a - b).abs().max() < tolerance * moved, (controller, (a - b).abs().max(), moved)


def ddp():
    compare(DistributedDataParallel)
    # bfloat16 products of the halves of a batch do not round as those of the whole
    compare(DistributedDataParallel, compiled=True, low=True, tolerance=0.05)


def fsdp():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def shard(model):
        fully_shard(model.mann, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    compare(shard)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    {"ddp": ddp, "fsdp": fsdp}[sys.argv[1]]()
    gc.collect()  # models must be gone before their process group, or its threads and this one may wait for each other at exit
    dist.destroy_process_group()
