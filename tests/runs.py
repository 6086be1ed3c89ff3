"""`torchrun --nproc-per-node P tests/runs.py FOLDER`: training runs by P processes, each in a folder of its own.

Of each learner protocol one, one whose tasks ask for different numbers of answers, and MetaNet.
"""

import sys
from pathlib import Path

import torch

from mann_kernels import MetaNet
from mann_kernels.tasks import Copy, FewShotTasks
from mann_kernels.train import build
from mann_kernels.train.loop import Run
from mann_kernels.train.parallel import joined
from mann_kernels.train.settings import Settings


class UnevenCopy(Copy):
    """The tasks of a batch ask for 1 to `length` vectors."""

    def sample(self, B, generator):
        episodes = super().sample(B, generator)
        number = torch.randint(1, self.length + 1, (B,), generator=generator)
        first = torch.arange(len(episodes.x))[:, None] - self.length - 1
        return episodes._replace(asked=(first >= 0) & (first < number))


SMALL = {"hidden_size": 8, "num_slots": 8, "slot_size": 4, "num_heads": 1, "tasks_per_update": 4, "test_tasks": 2}
SETTINGS = {
    "uneven": Settings("copy", "mann", length=6, **SMALL),
    "adapt": Settings("sinusoid", "mann", shots=5, **SMALL),
    "descriptor": Settings("sinusoid", "multi-task", **SMALL),
    "metanet": Settings("few-shot", "metanet", ways=3, queries=2, **SMALL),
}


def make(name: str):
    """The learner and the tasks for training and testing."""
    settings = SETTINGS[name]
    if name == "metanet":
        # In float32 Adam turns the rounding of its gradients into percents of what the weights move by, within few updates.
        tasks = FewShotTasks(torch.rand(8, 4, 1, 28, 28, dtype=torch.float64), settings.ways, queries=settings.queries)
        return MetaNet.omniglot(settings.ways, filters=4).double(), tasks, tasks
    tasks = (UnevenCopy(settings.length),) * 2 if name == "uneven" else build.tasks(settings, None)
    return build.learner(settings, tasks[0]), *tasks


def train_all(folder: Path) -> None:
    for name, settings in SETTINGS.items():
        torch.manual_seed(0)
        run = Run(*make(name), settings, folder / name)
        assert len(list(run.train(6))) == 6


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined("cpu"):
        train_all(Path(sys.argv[1]))
