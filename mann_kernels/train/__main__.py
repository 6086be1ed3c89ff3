"""`python -m mann_kernels.train TASK --data FILE`: meta-train a learner; a run cut short goes on with --resume."""

import math
import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mann_kernels import MetaNet
from mann_kernels.tasks import FewShotTasks, load_omniglot, with_rotations
from mann_kernels.train.loop import Run, Settings

LEARNERS = {
    variant: lambda settings, variant=variant: MetaNet.omniglot(settings.ways, variant=variant)
    for variant in ("metanet", "metanet-", "metanet+")
}
TASKS = {"omniglot": load_omniglot}
DEFAULT = {field.name: field.default for field in fields(Settings)}
console = Console()


def tasks_of(settings: Settings, data: Path) -> list[FewShotTasks]:
    """Training and test tasks, of different classes; the quarter turns of a class are classes of their own in both."""
    load = TASKS[settings.task]
    sizes = settings.ways, settings.shots, settings.queries
    return [FewShotTasks(with_rotations(load(data, split)), *sizes) for split in ("train", "test")]


def prepare(settings: Settings, data: Path, out: Path, resume: bool) -> Run:
    """Everything in place for the first update, or for the next one of a run cut short."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    learner = LEARNERS[settings.learner](settings)
    return Run(learner, *tasks_of(settings, data), settings, out, resume=resume)


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(TASKS)}.")],
    data: Annotated[Path, typer.Option(help="The task's data: for omniglot the packed .npz of 28 x 28 images.")],
    out: Annotated[Path, typer.Option(help="Folder of the log, the checkpoint and the curve.")] = Path("run"),
    learner: Annotated[str, typer.Option(help=f"One of {', '.join(LEARNERS)}.")] = "metanet",
    updates: Annotated[int, typer.Option(min=1, help="Train up to this update.")] = 10_000,
    minutes: Annotated[
        float, typer.Option(help="Stop after the update that passes this many minutes in all.")
    ] = math.inf,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    ways: Annotated[int, typer.Option(min=2, help="Classes of a task.")] = DEFAULT["ways"],
    shots: Annotated[int, typer.Option(min=1, help="Support examples of a class.")] = DEFAULT["shots"],
    queries: Annotated[int, typer.Option(min=1, help="Query examples of a class.")] = DEFAULT["queries"],
    tasks_per_update: Annotated[int, typer.Option(min=1, help="Tasks in one update.")] = DEFAULT["tasks_per_update"],
    learning_rate: Annotated[float, typer.Option(help="Adam's.")] = DEFAULT["learning_rate"],
    clip: Annotated[float, typer.Option(help="Largest norm of the whole gradient.")] = DEFAULT["clip"],
    seed: Annotated[int, typer.Option(help="Of weights, tasks and test tasks.")] = DEFAULT["seed"],
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; the same number repeats bit for bit.")] = 1,
    log_every: Annotated[int, typer.Option(min=1, help="Updates between rows of the log, and checkpoints.")] = 50,
    test_every: Annotated[int, typer.Option(min=1, help="Updates between tests, a multiple of --log-every.")] = 500,
    interim_tasks: Annotated[int, typer.Option(min=2, help="Tasks of these tests.")] = DEFAULT["interim_tasks"],
    test_tasks: Annotated[int, typer.Option(min=2, help="Tasks of the last test.")] = DEFAULT["test_tasks"],
):
    """Meta-train a learner on few-shot tasks and test it on classes it has never seen."""
    for name, value, known in (("TASK", task, TASKS), ("--learner", learner, LEARNERS)):
        if value not in known:
            raise typer.BadParameter(f"{name}: got {value!r}, want one of {', '.join(known)}")
    given = locals()
    settings = Settings(**{field.name: given[field.name] for field in fields(Settings)})
    try:
        run = prepare(settings, data, out, resume)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=updates, completed=run.update, state="")
        began, first, loss, accuracy = time.perf_counter(), run.update, None, None
        for done in run.train(updates, minutes):
            loss, accuracy = (
                new if old is None else 0.98 * old + 0.02 * new
                for old, new in ((loss, done["loss"]), (accuracy, done["accuracy"]))
            )
            speed = (run.update - first) / (time.perf_counter() - began)
            state = f"loss {loss:.3f}  accuracy {accuracy:.3f}  {speed:.2f} updates/s"
            progress.update(bar, completed=run.update, state=state)
    last = run.rows[-1]
    console.print(
        f"{last['update']} updates, {last['tasks']} tasks, {run.seconds / 60:.1f} minutes ({run.cpu_seconds / 60:.1f} of CPU): "
        f"accuracy {last['test_accuracy']} +- {last['test_half_width']} on {test_tasks} test tasks"
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except KeyboardInterrupt:
        raise SystemExit("stopped; --resume goes on from the last checkpoint") from None
