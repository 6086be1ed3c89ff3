"""The same training loop around a MANN: name the symbol that came first. Compiled, in mixed precision, on one or more processes."""

import argparse
import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from mann_kernels.compat import LSTM as Recurrent
from torch.nn.parallel import DistributedDataParallel


class Model(nn.Module):
    def __init__(self, symbols: int = 4, hidden: int = 32):
        super().__init__()
        self.recurrent = Recurrent(symbols, hidden, batch_first=True, num_slots=16, slot_size=8, num_heads=1)
        self.classify = nn.Linear(hidden, symbols)

    def forward(self, x):
        output, _ = self.recurrent(x)
        return self.classify(output[:, -1])


def main(updates: int, batch: int = 32, length: int = 8, symbols: int = 4) -> float:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    model = Model()
    model = torch.compile(DistributedDataParallel(model) if world > 1 else model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(rank)
    for update in range(updates):
        x = torch.randint(symbols, (batch // world, length), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(nn.functional.one_hot(x, symbols).float())
        loss = nn.functional.cross_entropy(logits.float(), x[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and update % 50 == 49:
            print(f"{update + 1} updates: loss {loss.item():.3f}", flush=True)
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=200)
    updates = parser.parse_args().updates
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    main(updates)
    if dist.is_initialized():
        gc.collect()  # the model must be gone before its process group, or gloo's threads and this one may wait for each other
        dist.destroy_process_group()
