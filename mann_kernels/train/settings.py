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
#: What few-shot tasks for training are made of, of load_omniglot's splits.
TRAIN_SPLITS = ("train", "background")
#: Whose split of Omniglot's classes in those for training and those for the test.
CLASS_SPLITS = ("vinyals", "lake")
#: What the quarter turns of a character are in few-shot tasks, see Settings.
ROTATIONS = ("classes", "tasks")


#: The largest size, and the largest seed: tests have one that is larger by loop.FOR_TESTS, and torch takes 64 bits.
MOST, MOST_SEED = 2**31 - 1, 2**62
_SIZE = (1, MOST)
#: The least and the largest value of every number; where the least is not one itself it is in ABOVE.
RANGES: dict[str, tuple[float, float]] = {
    "ways": (2, MOST), "most_ways": (0, MOST), "updates_per_way": _SIZE,
    "shots": _SIZE, "queries": _SIZE, "length": _SIZE, "split_seed": (0, MOST_SEED), "bits": _SIZE,
    "dimensions": (1, 3), "hidden_size": _SIZE, "num_slots": _SIZE, "slot_size": _SIZE, "num_heads": _SIZE,
    "forget_bias": (-1e6, 1e6), "tasks_per_update": _SIZE, "learning_rate": (0, 1e6), "schedule_updates": (0, MOST),
    "clip": (0, math.inf), "seed": (0, MOST_SEED), "threads": (1, 4096), "log_every": _SIZE, "test_every": _SIZE,
    "interim_tasks": (2, MOST), "test_tasks": (2, MOST),
}  # fmt: skip
ABOVE = ("learning_rate", "clip", "minutes")


def check_number(name: str, value: float, least: float, most: float) -> None:
    """A number of a run is in its range, and is one.

    Raises:
        ValueError: naming the option, what it got and what it wants.
    """
    whole = isinstance(least, int) and isinstance(most, int) and name not in ABOVE
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if right and (least < value <= most if name in ABOVE else least <= value <= most):
        return
    want = f"more than {least:g}" if name in ABOVE else f"at least {least:g}"
    want += "" if most == math.inf else f" and at most {most:g}"
    raise ValueError(f"--{name.replace('_', '-')}: got {value}, want {want}")


@dataclass(frozen=True)
class Settings:
    """A run goes on only with the settings it began with. What a task or learner has no use for is left as it is here."""

    task: str = "copy"
    learner: str = "mann"
    # the tasks
    ways: int = 5
    most_ways: int = 0  # of omniglot's training with strings, one more every so many updates; 0: always `ways`
    updates_per_way: int = 1000
    shots: int = 1
    queries: int = 10
    length: int = 50
    labels: str = "onehot"
    counts: str = "random"
    class_split: str = "vinyals"  # of Omniglot; or "lake"
    split_seed: int | None = None
    train_split: str = "train"  # of few-shot; "background" has the validation classes too
    rotations: str = (
        "classes"  # of few-shot: classes of their own; or of "tasks": of each character of one, in training alone
    )
    warps: bool = False  # of omniglot's training
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
    keep_memory: bool = False  # of MANN between episodes
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

    def check(self) -> None:
        """Every number is in its range.

        Raises:
            ValueError: naming the option, what it got and what it wants.
        """
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not (name == "split_seed" and value is None):
                check_number(name, value, least, most)

    def check_run(self) -> None:
        """The same, of a command: tests are at updates that have a row in the log.

        Raises:
            ValueError: naming the option, what it got and what it wants.
        """
        self.check()
        if self.test_every % self.log_every:
            raise ValueError(
                f"--test-every: got {self.test_every}, want a multiple of --log-every, {self.log_every}: tests are rows of the log"
            )

    def make_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](parameters, self.learning_rate)

    def learning_rate_at(self, update: int) -> float:
        """Give the learning rate of the update after this many: constant, or falling to 0 by half a cosine every
        `schedule_updates`; each of these begins at half the rate of the one before."""
        if self.schedule == "constant":
            return self.learning_rate
        cycle, within = divmod(update, self.schedule_updates)
        return self.learning_rate * 0.5**cycle * 0.5 * (1 + math.cos(math.pi * within / self.schedule_updates))

    def ways_at(self, update: int) -> int:
        """Give the classes of an episode of the update after this many: constant, or growing up to `most_ways`."""
        return max(self.ways, min(self.ways + update // self.updates_per_way, self.most_ways))

    def title(self) -> str:
        """Write the title of a run's picture."""
        return f"{self.learner}, {self.task}"
