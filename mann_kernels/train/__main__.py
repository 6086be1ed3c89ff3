"""`python -m mann_kernels.train TASK`: meta-train a learner; a run cut short goes on with --resume."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mann_kernels._paths import about
from mann_kernels.train import build
from mann_kernels.train.loop import Run
from mann_kernels.train.parallel import joined
from mann_kernels.train.settings import MOST, OPTIMIZERS, Settings, check_number
from mann_kernels.train.told import SEED, interrupted_between, told

DEFAULT: dict[str, Any] = {field.name: field.default for field in fields(Settings)}
#: What differs from task to task where it is not given.
OF_TASK: dict[str, dict[str, Any]] = {
    "copy": {"length": 20},
    "associative-recall": {"length": 10},
    "sinusoid": {"learner": "context-mean", "shots": 10},
    "few-shot": {"learner": "metanet", "tasks_per_update": 1},
}
PROTOCOLS = ("fixed", "original")
console = Console()


def of_protocol(name: str, answers: int) -> dict[str, Any]:
    """Give the settings of a protocol for few-shot tasks, that of Vinyals et al.'s split or the one of MetaNet's original code.

    Args:
        name: "original": 1,200 characters drawn at random for training and 423 for the test, different ones in a task, each
            turned by a random quarter turn in training; a summed loss that is clipped at 10. Otherwise the defaults.
        answers: of a task; the loss here is their mean.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"--protocol: got {name!r}, want one of {', '.join(PROTOCOLS)}")
    if name == "fixed":
        return {"split_seed": None, "train_split": "train", "rotations": "classes", "clip": 10.0}
    return {"split_seed": 0, "train_split": "background", "rotations": "tasks", "clip": 10 / answers}


def prepare(settings: Settings, data: Path | None, out: Path, resume: bool) -> Run:
    """Everything in place for the first update, or for the next one of a run cut short."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    train_tasks, test_tasks = build.tasks(settings, data)
    learner = build.on_device(build.learner(settings, train_tasks), settings.device)
    return Run(learner, train_tasks, test_tasks, settings, out, resume=resume)


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(build.TASKS)}.")] = "copy",
    data: Annotated[Path | None, typer.Option(help="Omniglot, for the tasks that are made of it.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the log, the checkpoint and the curve.")] = Path("run"),
    learner: Annotated[str | None, typer.Option(help=f"One of {', '.join(build.LEARNERS)}.")] = None,
    updates: Annotated[int, typer.Option(min=1, help="Train up to this update.")] = 10_000,
    minutes: Annotated[
        float, typer.Option(help="Stop after the update that passes this many minutes in all; more than 0.")
    ] = math.inf,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    ways: Annotated[int, typer.Option(min=2, help="Classes of a task.")] = DEFAULT["ways"],
    most_ways: Annotated[
        int, typer.Option(min=0, help="omniglot with strings: a curriculum from --ways classes to so many; 0 for none.")
    ] = DEFAULT["most_ways"],
    updates_per_way: Annotated[int, typer.Option(min=1, help="Of the curriculum, until the next class.")] = DEFAULT[
        "updates_per_way"
    ],
    shots: Annotated[int, typer.Option(min=1, help="Support examples of a class.")] = DEFAULT["shots"],
    queries: Annotated[int, typer.Option(min=1, help="Query examples of a class.")] = DEFAULT["queries"],
    length: Annotated[
        int | None, typer.Option(min=1, help="Steps of an episode, vectors to copy, pairs to recall, points.")
    ] = None,
    labels: Annotated[str, typer.Option(help="onehot, or string: five characters.")] = DEFAULT["labels"],
    counts: Annotated[str, typer.Option(help="Of the classes of an episode: random, or equal.")] = DEFAULT["counts"],
    protocol: Annotated[
        str | None,
        typer.Option(help="few-shot: fixed, the usual split, or original, that of MetaNet's code; other options win."),
    ] = None,
    class_split: Annotated[
        str, typer.Option(help="Of Omniglot: vinyals, the usual one, or lake, 964 classes for training and 659.")
    ] = DEFAULT["class_split"],
    split_seed: Annotated[
        int | None, typer.Option(**SEED, help="Draw Omniglot's classes for training and testing anew, with this seed.")
    ] = None,
    train_split: Annotated[
        str | None, typer.Option(help="few-shot: train, or background: with the validation classes.")
    ] = None,
    rotations: Annotated[
        str | None, typer.Option(help="few-shot: quarter turns are classes, or of the tasks for training, one a class.")
    ] = None,
    warps: Annotated[
        bool, typer.Option(help="omniglot: join, mirror, stretch and shear the classes of training, not in the paper.")
    ] = DEFAULT["warps"],
    bits: Annotated[int, typer.Option(min=1, help="Of a vector to copy or recall.")] = DEFAULT["bits"],
    dimensions: Annotated[int, typer.Option(min=1, max=3, help="Of gp-regression's x.")] = DEFAULT["dimensions"],
    hidden_size: Annotated[int, typer.Option(min=1, help="Units of the controller.")] = DEFAULT["hidden_size"],
    num_slots: Annotated[int, typer.Option(min=1, help="Slots of the memory.")] = DEFAULT["num_slots"],
    slot_size: Annotated[int, typer.Option(min=1, help="Width of a slot.")] = DEFAULT["slot_size"],
    num_heads: Annotated[int, typer.Option(min=1, help="Heads of the memory.")] = DEFAULT["num_heads"],
    write: Annotated[str, typer.Option(help="What MANN writes: key or add.")] = DEFAULT["write"],
    key_strength: Annotated[bool, typer.Option(help="MANN learns a key strength.")] = DEFAULT["key_strength"],
    forget_bias: Annotated[float, typer.Option(help="Added to the forget gate's.")] = DEFAULT["forget_bias"],
    keep_memory: Annotated[bool, typer.Option(help="MANN's memory is not wiped between episodes.")] = DEFAULT[
        "keep_memory"
    ],
    tasks_per_update: Annotated[int | None, typer.Option(min=1, help="Tasks in one update.")] = None,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = DEFAULT["optimizer"],
    learning_rate: Annotated[float, typer.Option(help="At the start; more than 0.")] = DEFAULT["learning_rate"],
    schedule: Annotated[str, typer.Option(help="constant, or cosine: falling to 0.")] = DEFAULT["schedule"],
    schedule_updates: Annotated[
        int | None, typer.Option(min=1, help="Of a cosine, --updates if not given; then the next, from half the rate.")
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help="Largest norm of the whole gradient; more than 0; 10 without a protocol.")
    ] = None,
    seed: Annotated[int, typer.Option(**SEED, help="Of weights, tasks and test tasks.")] = DEFAULT["seed"],
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; the same number repeats bit for bit.")] = 1,
    device: Annotated[str, typer.Option(help="Of the learner: cpu, cuda, ...")] = DEFAULT["device"],
    log_every: Annotated[int, typer.Option(min=1, help="Updates between rows of the log, and checkpoints.")] = 50,
    test_every: Annotated[int, typer.Option(min=1, help="Updates between tests, a multiple of --log-every.")] = 500,
    interim_tasks: Annotated[int, typer.Option(min=2, help="Tasks of these tests.")] = DEFAULT["interim_tasks"],
    test_tasks: Annotated[int, typer.Option(min=2, help="Tasks of the last test.")] = DEFAULT["test_tasks"],
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the log's numbers for it too.")] = False,
):
    """Meta-train a learner on tasks, and test it on tasks of classes it has never seen."""
    if task not in build.TASKS:
        raise typer.BadParameter(f"TASK: got {task!r}, want one of {', '.join(build.TASKS)}")
    given = {name: value for name, value in locals().items() if value is not None}
    if protocol is not None and task != "few-shot":
        raise typer.BadParameter(f"--protocol: got {protocol!r} for {task}, want it for few-shot")
    with told():
        preset = of_protocol(protocol or "fixed", ways * queries)
    given = DEFAULT | {"length": 10 * ways} | OF_TASK.get(task, {}) | preset | given
    given["schedule_updates"] = (schedule_updates or updates) if schedule == "cosine" else 0
    settings = Settings(**{name: given[name] for name in DEFAULT})
    interrupted = f"stopped; --resume goes on from the last checkpoint in {out}"
    with contextlib.ExitStack() as stack:
        with told(interrupted=interrupted):
            check_number("updates", updates, 1, MOST)
            check_number("minutes", minutes, 0, math.inf)
            if schedule_updates is not None:
                check_number("schedule_updates", schedule_updates, 1, MOST)
            build.check_choices(settings)
            settings.check_run()
            stack.enter_context(joined(settings.device))
            run = prepare(settings, data, out, resume)
            if tensorboard and run.processes.first:
                log_to_tensorboard(run)
        with told(1, interrupted), interrupted_between() as check:
            if run.processes.first:
                show(run, updates, minutes, check)
            else:
                for _ in run.train(updates, minutes):
                    check()
        del run  # before its process group, see joined


def log_to_tensorboard(run: Run) -> None:
    """From here on every row of the log goes to the folder `tensorboard` as well."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise typer.BadParameter("--tensorboard: it is not installed (pip install tensorboard)") from None
    folder = run.folder / "tensorboard"
    with about(folder, "cannot be written"):
        writer = SummaryWriter(folder, purge_step=run.update + 1)

    def write(row: dict) -> None:
        with about(folder, "cannot be written"):
            for name, value in row.items():
                if value not in ("", None) and name != "update":
                    writer.add_scalar(name, float(value), row["update"])
            writer.flush()

    run.on_row = write


def show(run: Run, updates: int, minutes: float, check: Callable[[], None]) -> None:
    """Train under a progress bar, with a call of `check` after each update, and say how it ended."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=updates, completed=run.update, state="")
        began, first = time.perf_counter(), run.update
        smooth: dict[str, float] = {}
        for done in run.train(updates, minutes):
            check()
            new: dict[str, float] = {"loss": done["loss"]} | {
                name: total / n for name, (total, n) in done["scores"].items() if n
            }
            smooth |= {name: 0.98 * smooth.get(name, value) + 0.02 * value for name, value in new.items()}
            speed = (run.update - first) / (time.perf_counter() - began)
            state = "  ".join(f"{name} {value:.3f}" for name, value in smooth.items())
            progress.update(bar, completed=run.update, state=f"{state}  {speed:.2f} updates/s")
    last = run.rows[-1] if run.rows else {}
    score = next((name for name in last if name.startswith("test_") and last[name]), None)
    if score is None:
        console.print(f"nothing to do: {run.update} updates are made already, want more --updates or --minutes")
        return
    console.print(
        f"{last['update']} updates, {last['tasks']} tasks, {run.seconds / 60:.1f} minutes ({run.cpu_seconds / 60:.1f} of CPU): "
        f"{score.removeprefix('test_')} {last[score]} +- {last[f'{score}_half_width']} on {run.settings.test_tasks} test tasks"
    )


if __name__ == "__main__":
    typer.run(main)
