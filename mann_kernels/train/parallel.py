"""Several processes that train as one: each answers its part of every batch, and the gradients are averaged."""

import contextlib
import gc
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mann_kernels.tasks import Episodes

#: The others wait while the first process tests the learner.
LONGEST_TEST = timedelta(hours=6)


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Within it, this process is one of those that torchrun started; without torchrun it is alone.

    What trains in it is to be gone when it ends: a DistributedDataParallel that outlives its process group may hang at exit.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    kind = device.split(":")[0]
    if kind != "cpu":
        if device != kind:
            raise ValueError(
                f"--device: got {device!r}, want {kind!r}: under torchrun each process takes a device of its own"
            )
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(dist.get_default_backend_for_device(kind), timeout=LONGEST_TEST)
    try:
        yield
        dist.barrier()
    finally:
        gc.collect()
        dist.destroy_process_group()


class Processes:
    """This process among those of torch.distributed; the only one where that is not initialized.

    Args:
        device: of the learner.
        tasks: of a batch, all processes together.

    Raises:
        ValueError: tasks that the processes cannot share evenly.
    """

    def __init__(self, device: str, tasks: int):
        self.device = device
        self.rank, self.number = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.first = self.rank == 0
        if tasks % self.number:
            raise ValueError(
                f"tasks_per_update: got {tasks}, want a multiple of {self.number}, the processes that share them"
            )

    def averaging(self, module: nn.Module) -> nn.Module:
        """The module, whose parameters begin as the first process's, and whose gradients will be the mean over the processes."""
        if self.number == 1:
            return module
        # The same parameters take part in every update; those of a learner that never do are no mistake.
        return DistributedDataParallel(module, static_graph=True)

    def part(self, batch):
        """This process's tasks of a batch of all."""
        dim = 1 if isinstance(batch, Episodes) else 0
        return type(batch)(*(None if field is None else field.chunk(self.number, dim)[self.rank] for field in batch))

    def sums(self, numbers: list[float]) -> list[float]:
        """Each number, added up over the processes."""
        if self.number == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def of_first(self, number: float) -> float:
        """The number that the first process has."""
        return self.sums([number * self.first])[0]
