"""The loop: draw tasks, adapt to the support half of each, update from the loss on the query half."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from mann_kernels.tasks import FewShotTasks
from mann_kernels.train.checkpoint import load_checkpoint, read_facts, save_checkpoint
from mann_kernels.train.log import plot_log, read_log, write_log


@dataclass(frozen=True)
class Settings:
    """What a run's numbers depend on; a run goes on only with the settings it began with."""

    task: str
    learner: str
    ways: int = 5
    shots: int = 1
    queries: int = 10
    tasks_per_update: int = 1
    learning_rate: float = 1e-3
    clip: float = 10.0
    seed: int = 0
    threads: int = 1
    log_every: int = 50
    test_every: int = 500
    interim_tasks: int = 50
    test_tasks: int = 400


def mean_and_half_width(accuracies: list[float]) -> tuple[float, float]:
    """The mean over tasks and the half-width of its 95 % confidence interval."""
    values = torch.tensor(accuracies, dtype=torch.float64)
    spread = values.std().item() if len(accuracies) > 1 else math.nan
    return values.mean().item(), 1.96 * spread / math.sqrt(len(accuracies))


class Run:
    """One run in its folder: `log.csv`, `checkpoint.safetensors`, `accuracy.png`.

    Args:
        learner: an nn.Module with `adapt(support_x, support_y) -> state` and `predict(query_x, state) -> logits`, for
            tasks [G, S, ...], and [G, L, ...].
        train_tasks, test_tasks: of different classes.
        settings: see Settings.
        folder: made if need be.
        resume: go on from the folder's checkpoint, if there is one; without it there must be none.

    Raises:
        ValueError: a checkpoint that is in the way, or of other settings.
    """

    def __init__(
        self,
        learner: torch.nn.Module,
        train_tasks: FewShotTasks,
        test_tasks: FewShotTasks,
        settings: Settings,
        folder: Path,
        *,
        resume: bool = False,
    ):
        self.learner, self.train_tasks, self.test_tasks, self.settings = learner, train_tasks, test_tasks, settings
        self.optimizer = torch.optim.Adam(learner.parameters(), settings.learning_rate)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.folder, self.checkpoint = folder, folder / "checkpoint.safetensors"
        self.update, self.seconds, self.cpu_seconds, self.rows = 0, 0.0, 0.0, []
        self._since: list[tuple[float, float]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            if not resume:
                raise ValueError(
                    f"{self.checkpoint}: a run is there already; go on with it (--resume) or take another folder"
                )
            self._restore()
        self._clock()

    def _restore(self) -> None:
        found = read_facts(self.checkpoint)["settings"]
        other = {name: value for name, value in asdict(self.settings).items() if found.get(name) != value}
        if other:
            changes = ", ".join(
                f"{name}={value!r} (it began with {found.get(name)!r})" for name, value in other.items()
            )
            raise ValueError(f"{self.checkpoint}: got {changes}, want the settings the run began with")
        facts = load_checkpoint(self.checkpoint, self.learner, self.optimizer, self.generator)
        self.update, self.seconds, self.cpu_seconds = facts["update"], facts["seconds"], facts["cpu_seconds"]
        self.rows = read_log(self.folder / "log.csv", self.update)

    def _clock(self) -> None:
        """Adds the time since the last call."""
        now = time.perf_counter(), time.process_time()
        before, self._last = getattr(self, "_last", now), now
        self.seconds += now[0] - before[0]
        self.cpu_seconds += now[1] - before[1]

    def train(self, updates: int, minutes: float = math.inf) -> Iterator[dict]:
        """Up to this update, or past this many minutes of the whole run; yields loss and accuracy of each, and logs.

        The last state is always logged and is a checkpoint; it is tested on `test_tasks` tasks, those before it on the
        first `interim_tasks` of them.
        """
        while self.update < updates and self.seconds < 60 * minutes:
            yield self._one_update()
            self._clock()
            last = self.update == updates or self.seconds >= 60 * minutes
            if last or self.update % self.settings.log_every == 0:
                interim = self.update % self.settings.test_every == 0
                self._log(self.settings.test_tasks if last else interim * self.settings.interim_tasks)

    def _one_update(self) -> dict:
        tasks = self.train_tasks.sample(self.settings.tasks_per_update, self.generator)
        self.learner.train()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.learner.predict(tasks.query_x, self.learner.adapt(tasks.support_x, tasks.support_y))
        loss = F.cross_entropy(logits.flatten(0, 1), tasks.query_y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.settings.clip)
        self.optimizer.step()
        self.update += 1
        self._since.append((loss.item(), (logits.argmax(-1) == tasks.query_y).double().mean().item()))
        return {"update": self.update, "loss": self._since[-1][0], "accuracy": self._since[-1][1]}

    @torch.no_grad()
    def test(self, tasks: int, at_once: int = 5) -> tuple[float, float]:
        """Mean accuracy on this many tasks of the test classes, always the same ones, and its half-width."""
        self.learner.eval()
        accuracies: list[float] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            generator = torch.Generator().manual_seed(self.settings.seed)
            while len(accuracies) < tasks:
                drawn = self.test_tasks.sample(min(at_once, tasks - len(accuracies)), generator)
                logits = self.learner.predict(drawn.query_x, self.learner.adapt(drawn.support_x, drawn.support_y))
                accuracies += (logits.argmax(-1) == drawn.query_y).double().mean(-1).tolist()
        return mean_and_half_width(accuracies)

    def _log(self, test_tasks: int) -> None:
        losses, accuracies = zip(*self._since, strict=True)
        row = {"update": self.update, "tasks": self.update * self.settings.tasks_per_update}
        row |= {"loss": f"{sum(losses) / len(losses):.6f}", "accuracy": f"{sum(accuracies) / len(accuracies):.4f}"}
        if test_tasks:
            mean, half = self.test(test_tasks)
            row |= {"test_accuracy": f"{mean:.4f}", "test_half_width": f"{half:.4f}"}
        self._clock()
        self.rows.append(row | {"seconds": f"{self.seconds:.1f}", "cpu_seconds": f"{self.cpu_seconds:.1f}"})
        self._since = []
        # The log first: stopped in between, the rows past the checkpoint are dropped and written again.
        write_log(self.folder / "log.csv", self.rows)
        facts = {"settings": asdict(self.settings), "update": self.update}
        facts |= {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        save_checkpoint(self.checkpoint, self.learner, self.optimizer, self.generator, facts)
        if test_tasks:
            title = f"{self.settings.learner}, {self.settings.task} {self.settings.ways}-way {self.settings.shots}-shot"
            plot_log(self.rows, self.folder / "accuracy.png", title)
