"""The loop: draw tasks, let the learner adapt to what it is shown of each, and update it from the loss on the rest."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mann_kernels._paths import about, own
from mann_kernels.tasks import Episodes
from mann_kernels.train.checkpoint import load_checkpoint, read_facts, save_checkpoint, write_atomically
from mann_kernels.train.log import plot_log, read_log, write_log
from mann_kernels.train.parallel import Processes
from mann_kernels.train.settings import Settings

#: Added to a seed for tests, so that no test task was drawn for training by the same seed.
FOR_TESTS = 1 << 40
#: For each score of a task: the sum over some tasks, and over how many answers.
Totals = dict[str, tuple[float, float]]


def mean_and_half_width(totals: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """The mean over all answers and the half-width of its 95 % confidence interval.

    totals, counts [tasks]: the tasks are independent, the answers within one are not, so the variance is that of a ratio of two
    sums over tasks.
    """
    totals, counts = totals.double(), counts.double()
    mean, number = totals.sum() / counts.sum(), len(totals)
    residual = totals - mean * counts
    spread = (residual.square().sum() / (number - 1)).sqrt() if number > 1 else math.nan
    return mean.item(), float(1.96 * spread * math.sqrt(number) / counts.sum())


def answer(learner: Any, batch) -> torch.Tensor:
    """Ask the learner: at each step of an episode, or for the queries, given the support set or the task's descriptor."""
    if isinstance(batch, Episodes):
        return learner(batch.x)
    if not hasattr(learner, "adapt"):
        return learner(batch.query_x, batch.descriptor)
    return learner.predict(batch.query_x, learner.adapt(batch.support_x, batch.support_y))


class Diverged(ArithmeticError):
    """The training has left the finite numbers; the message says at which update."""


class Answers(torch.nn.Module):
    """`answer` as a module: one forward pass whatever the learner's protocol, as DistributedDataParallel wants."""

    def __init__(self, learner: torch.nn.Module):
        super().__init__()
        self.learner = learner

    def forward(self, batch) -> torch.Tensor:
        return answer(self.learner, batch)


@torch.no_grad()
def measure(
    learner: torch.nn.Module, tasks, number: int, seed: int, device: str = "cpu", at_once: int = 10
) -> dict[str, tuple[float, float]]:
    """The mean of each score on `number` tasks drawn with this seed, and its half-width; torch's generator is left as it was."""
    learner.eval()
    found: list[dict] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed + FOR_TESTS)
        for first in range(0, number, at_once):
            batch = tasks.sample(min(at_once, number - first), generator).to(device)
            found.append(tasks.scores(answer(learner, batch), batch))
    return {
        name: mean_and_half_width(*(torch.cat([scores[name][part].cpu() for scores in found]) for part in (0, 1)))
        for name in found[0]
    }


class Run:
    """One run in its folder: `log.csv`, `checkpoint.safetensors`, and a picture named after the task's first score.

    Args:
        learner: an nn.Module: for Episodes called with x; for Tasks with `adapt(support_x, support_y) -> state` and
            `predict(query_x, state) -> output`.
        train_tasks, test_tasks: with `sample(number, generator)`, `loss(output, batch)` and `scores(output, batch)`; of
            different classes.
        settings: see Settings.
        folder: made if need be.
        resume: go on from the folder's checkpoint, if there is one; without it there must be none.

    `on_row` is called with each new row of the log.

    Where torch.distributed is initialized, its processes share the tasks of each update evenly and train as one process does, up
    to rounding: the loss is then to be the mean over the answers that the first score counts. The first process tests and writes;
    all of them read the folder, and may be of another number than those it was written by.

    Raises:
        ValueError: a checkpoint that is in the way, or of other settings; a folder that another process trains in, or that
            cannot be used; a setting out of its range; tasks that the processes cannot share evenly.
    """

    def __init__(
        self,
        learner: torch.nn.Module,
        train_tasks,
        test_tasks,
        settings: Settings,
        folder: Path,
        *,
        resume: bool = False,
    ):
        self.learner, self.train_tasks, self.test_tasks, self.settings = learner, train_tasks, test_tasks, settings
        self.processes = Processes(settings.device, settings.tasks_per_update)
        self.optimizer = settings.make_optimizer(learner.parameters())
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.folder, self.checkpoint = folder, folder / "checkpoint.safetensors"
        self.update, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.rows: list[dict] = []
        self._since: list[tuple[float, Totals]] = []
        self.on_row = lambda row: None
        settings.check()
        with about(folder, "cannot be used as a folder"):
            folder.mkdir(parents=True, exist_ok=True)
        self._owner = own(folder) if self.processes.first else None
        if self.checkpoint.exists():
            if not resume:
                raise ValueError(
                    f"{self.checkpoint}: a run is there already; go on with it (--resume) or take another folder"
                )
            self._restore()
        if self.processes.of_first(self.update) != self.update:
            raise ValueError(
                f"{self.checkpoint}: got update {self.update}, want that of the first process: one folder for all"
            )
        self._answers = self.processes.averaging(Answers(learner))
        self._clock()

    def _restore(self) -> None:
        # An older checkpoint lacks newer settings, and did what is their default.
        found = asdict(self.settings) | asdict(Settings()) | read_facts(self.checkpoint)["settings"]
        if unknown := sorted(set(found) - set(asdict(self.settings))):
            raise ValueError(f"{self.checkpoint}: got settings that this version does not know: {', '.join(unknown)}")
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
        """Up to this update, or past this many minutes of the whole run; yields loss and scores of each, and logs.

        The last state is always logged and is a checkpoint; it is tested on `test_tasks` tasks, those before it on the
        first `interim_tasks` of them.

        Raises:
            Diverged: a loss, gradient or weight is not finite. Nothing of it is saved.
            PathError: the folder cannot be written to.
        """
        over = self._over(updates, minutes)
        while not over:
            yield self._one_update()
            self._clock()
            over = self._over(updates, minutes)
            if self.processes.first and (over or self.update % self.settings.log_every == 0):
                interim = self.update % self.settings.test_every == 0
                self._log(self.settings.test_tasks if over else interim * self.settings.interim_tasks)

    def _over(self, updates: int, minutes: float) -> bool:
        """All processes stop at the same update: by the clock of the first."""
        self.seconds = self.processes.of_first(self.seconds)
        return self.update >= updates or self.seconds >= 60 * minutes

    def _one_update(self) -> dict:
        if self.settings.most_ways:
            self.train_tasks.resize(self.settings.ways_at(self.update))
        drawn = self.train_tasks.sample(self.settings.tasks_per_update, self.generator)
        batch = self.processes.part(drawn).to(self.settings.device)
        self.learner.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.update)
        self.optimizer.zero_grad(set_to_none=True)
        output = self._answers(batch)
        own = self.train_tasks.loss(output, batch)
        loss, share, totals = self._of_all(own.item(), self.train_tasks.scores(output.detach(), batch))
        self._require_finite("loss", loss)
        # The mean of the gradients, weighted so, is the gradient of the mean over all answers.
        (own * (share * self.processes.number)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.settings.clip)
        self._require_finite("norm of the gradient", norm.item())
        self.optimizer.step()
        self.update += 1
        if self.processes.first:
            self._since.append((loss, totals))
        return {"update": self.update, "loss": loss, "scores": totals}

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            last = f"{self.checkpoint} is as it was" if self.checkpoint.exists() else "nothing was saved"
            raise Diverged(f"update {self.update + 1}: the {name} is {value}; {last}")

    def _require_finite_weights(self) -> None:
        """Before they are saved: an update out of finite numbers can still overflow."""
        for name, tensor in self.learner.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                last = f"{self.checkpoint} is as it was" if self.checkpoint.exists() else "nothing was saved"
                raise Diverged(f"update {self.update}: weights are not finite ({name}); {last}")

    def _of_all(self, loss: float, scores: dict) -> tuple[float, float, Totals]:
        """Loss and totals over the tasks of all processes, and the share of the answers that are this process's."""
        own = [part.sum().item() for score in scores.values() for part in score]
        answers = own[1]
        loss, *sums = self.processes.sums([loss * answers, *own])
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return loss / sums[1], answers / sums[1], dict(zip(scores, pairs, strict=True))

    def test(self, tasks: int) -> dict[str, tuple[float, float]]:
        """The mean of each score on this many tasks of the test classes, always the same ones, and its half-width."""
        return measure(self.learner, self.test_tasks, tasks, self.settings.seed, self.settings.device)

    def _log(self, test_tasks: int) -> None:
        self._require_finite_weights()
        row: dict[str, Any] = {"update": self.update, "tasks": self.update * self.settings.tasks_per_update}
        row["loss"] = f"{sum(loss for loss, _ in self._since) / len(self._since):.6f}"
        for name in self._since[0][1]:
            total, count = (sum(totals[name][part] for _, totals in self._since) for part in (0, 1))
            row[name] = f"{total / count:.4f}" if count else ""
        if test_tasks:
            for name, (mean, half) in self.test(test_tasks).items():
                row |= {f"test_{name}": f"{mean:.4f}", f"test_{name}_half_width": f"{half:.4f}"}
        self._clock()
        self.rows.append(row | {"seconds": f"{self.seconds:.1f}", "cpu_seconds": f"{self.cpu_seconds:.1f}"})
        self.on_row(self.rows[-1])
        names, self._since = list(self._since[0][1]), []
        # The log first: stopped in between, the rows past the checkpoint are dropped and written again.
        write_log(self.folder / "log.csv", self.rows, names)
        facts = {"settings": asdict(self.settings), "update": self.update}
        facts |= {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        save_checkpoint(self.checkpoint, self.learner, self.optimizer, self.generator, facts)
        if test_tasks:
            write_atomically(self.folder / f"{names[0]}.png", plot_log(self.rows, names, self.settings.title()))
