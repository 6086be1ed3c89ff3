"""The settings that the numbers of a run depend on."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

OPTIMIZERS = {
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, rate),
    # Of Santoro et al. 2016: decay 0.95, momentum 0.9.
    "rmsprop": lambda parameters, rate: torch.optim.RMSprop(parameters, rate, alpha=0.95, momentum=0.9),
}
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Settings:
    """A run goes on only with the settings it began with. What a task or learner has no use for is left as it is here."""

    task: str = "copy"
    learner: str = "mann"
    # the tasks
    ways: int = 5
    shots: int = 1
    queries: int = 10
    length: int = 50
    labels: str = "onehot"
    counts: str = "random"
    split_seed: int | None = None
    bits: int = 8
    dimensions: int = 1
    # the learner: the paper's sizes
    hidden_size: int = 200
    num_slots: int = 128
    slot_size: int = 40
    num_heads: int = 4
    write: str = "key"
    key_strength: bool = False
    forget_bias: float = 0.0
    # the updates
    tasks_per_update: int = 16
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    schedule_updates: int = 0
    clip: float = 10.0
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    # the log
    log_every: int = 50
    test_every: int = 500
    interim_tasks: int = 50
    test_tasks: int = 400

    def make_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](parameters, self.learning_rate)

    def learning_rate_at(self, update: int) -> float:
        """Give the learning rate of the update after this many: constant, or falling to 0 by half a cosine every
        `schedule_updates`; each of these begins at half the rate of the one before."""
        if self.schedule == "constant":
            return self.learning_rate
        cycle, within = divmod(update, self.schedule_updates)
        return self.learning_rate * 0.5**cycle * 0.5 * (1 + math.cos(math.pi * within / self.schedule_updates))

    def title(self) -> str:
        """Write the title of a run's picture."""
        return f"{self.learner}, {self.task}"
