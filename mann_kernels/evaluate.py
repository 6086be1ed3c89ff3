"""`python -m mann_kernels.evaluate CHECKPOINT`: a trained learner on test tasks, beside the paper's figures where there are any."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from mann_kernels._paths import about
from mann_kernels.modules import MANN, MetaNet
from mann_kernels.tasks import PRESENTATIONS, GPRegression, OmniglotEpisodes
from mann_kernels.train import build
from mann_kernels.train.checkpoint import UNREADABLE, load_weights, read_facts, write_atomically
from mann_kernels.train.learners import NearestNeighbour
from mann_kernels.train.log import as_png, plot_log, read_log
from mann_kernels.train.loop import measure
from mann_kernels.train.settings import MOST, Settings
from mann_kernels.train.told import SEED, told

#: Santoro et al. 2016, tables 1 and 2, by labels, classes and learner: % right at the 1st, 2nd, 3rd, 4th, 5th and 10th
#: presentation. Its test goes on with the augmentation of the training; its episodes of 15 classes have 100 steps.
PAPER = {
    ("onehot", 5, "feedforward"): (24.4, 19.6, 21.1, 19.9, 22.8, 19.5),
    ("onehot", 5, "lstm"): (24.4, 49.5, 55.3, 61.0, 63.6, 62.5),
    ("onehot", 5, "mann"): (36.4, 82.8, 91.0, 92.6, 94.9, 98.1),
    ("string", 5, "nearest"): (4.0, 36.7, 41.9, 45.7, 48.1, 57.0),
    ("string", 5, "feedforward"): (0.0, 0.2, 0.0, 0.2, 0.0, 0.0),
    ("string", 5, "lstm"): (0.0, 9.0, 14.2, 16.9, 21.8, 25.5),
    ("string", 5, "mann-feedforward"): (0.0, 8.0, 16.2, 25.2, 30.9, 46.8),
    ("string", 5, "mann"): (0.0, 69.5, 80.4, 87.9, 88.4, 93.1),
    ("string", 15, "nearest"): (0.5, 18.7, 23.3, 26.5, 29.1, 37.0),
    ("string", 15, "feedforward"): (0.0, 0.1, 0.0, 0.0, 0.0, 0.0),
    ("string", 15, "lstm"): (0.0, 2.2, 2.9, 4.3, 5.6, 12.7),
    ("string", 15, "mann-feedforward"): (0.1, 12.8, 22.3, 28.8, 32.2, 43.4),
    ("string", 15, "mann"): (0.1, 62.6, 79.3, 86.6, 88.7, 95.3),
}
#: Munkhdalai and Yu 2017, tables 1 and 4, Omniglot, one example of a class: % right by learner and classes trained on, for 5, 10,
#: 15 and 20 classes of the test. Table 1 has the same number of both.
FEW_SHOT_PAPER = {
    ("metanet", 5): (98.95, 96.4, 93.6, 93.07),
    ("metanet", 10): (99.25, 98.67, 96.95, 96.21),
    ("metanet", 15): (99.35, 98.17, 97.11, 96.36),
    ("metanet", 20): (99.55, 98.87, 97.41, 97.0),
    ("metanet-", 5): (98.4,), ("metanet-", 10): (None, 98.32), ("metanet-", 15): (None, None, 96.68),
    ("metanet-", 20): (None, None, None, 96.13), ("metanet+", 5): (98.45,), ("metanet+", 10): (None, 97.05),
    ("metanet+", 15): (None, None, 96.48), ("metanet+", 20): (None, None, None, 95.08),
}  # fmt: skip
console = Console()


def main(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint.safetensors of a run, or the run's folder.")],
    data: Annotated[Path | None, typer.Option(help="Omniglot, for the tasks that are made of it.")] = None,
    tasks: Annotated[int, typer.Option(min=2, max=MOST, help="Test tasks.")] = 2000,
    seed: Annotated[int, typer.Option(**SEED, help="Of the test tasks.")] = 1,
    turns: Annotated[bool, typer.Option("--turns", help="omniglot: quarter turns of the test classes.")] = False,
    augment: Annotated[
        bool, typer.Option("--augment", help="omniglot: turn and shift the images as in training, as the paper does.")
    ] = False,
    ways: Annotated[
        int | None,
        typer.Option(min=2, max=MOST, help="Classes of a test task; at most as many as in training, but with strings."),
    ] = None,
    nearest: Annotated[
        bool,
        typer.Option("--nearest", help="few-shot, omniglot: beside it the label of the nearest pixels, by cosine."),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures: the training, and one task.")] = None,
):
    """Test a trained learner on tasks it has never seen: the mean of each score and its 95 % confidence interval."""
    with told():
        with about(checkpoint, "cannot be read"):
            checkpoint = checkpoint / "checkpoint.safetensors" if checkpoint.is_dir() else checkpoint
            there = checkpoint.is_file()
        if not there:
            raise ValueError(f"CHECKPOINT: {checkpoint}: no such file, want the checkpoint of a run")
        facts = read_facts(checkpoint)
        with about(checkpoint, UNREADABLE):
            settings = Settings(**facts["settings"])
            settings.check()
            build.check_choices(settings)
        settings = replace(settings, device=device)
        _, test_tasks = build.tasks(settings, data)
        if ways is not None:
            if settings.task not in build.OF_OMNIGLOT:
                raise ValueError(f"--ways: got {ways} for {settings.task}, want it for few-shot or omniglot")
            if ways > settings.ways and (settings.task, settings.labels) != ("omniglot", "string"):
                raise ValueError(f"--ways: got {ways}, want at most {settings.ways}, the classes it was trained on")
            if isinstance(test_tasks, OmniglotEpisodes):
                test_tasks.resize(ways)
            else:
                test_tasks.ways = ways
        if nearest and settings.task not in build.OF_OMNIGLOT:
            raise ValueError(f"--nearest: got {settings.task}, want few-shot or omniglot")
        learner = build.learner(settings, test_tasks)
        load_weights(checkpoint, learner)
        build.on_device(learner, device)
        rows = read_log(checkpoint.parent / "log.csv") if plots is not None else []
        if plots is not None:  # before the long part
            with about(plots, "cannot be used as a folder"):
                plots.mkdir(parents=True, exist_ok=True)
    if isinstance(test_tasks, OmniglotEpisodes):
        test_tasks.augment, test_tasks.turns = augment, augment or turns
    if ways is not None and isinstance(learner, MetaNet):
        learner.fewer_classes = True
    torch.set_num_threads(settings.threads)
    with told(status=1):
        found = {"ours": measure(learner, test_tasks, tasks, seed, device)}
        if nearest:
            found["nearest"] = measure(NearestNeighbour(test_tasks.output_size), test_tasks, tasks, seed, device)
        images = ", augmented" if augment else ", turned" if turns else ""
        images += f" of {ways} classes" if ways is not None else ""
        show(found, settings, facts["update"], f"{tasks} test tasks{images}", ways or settings.ways)
        if rows and plots is not None:
            with about(checkpoint.parent / "log.csv", "cannot be drawn"):
                picture = plot_log(rows, list(found["ours"]), settings.title())
            write_atomically(plots / "training.png", picture)
        if plots is not None:
            draw(learner, test_tasks, plots, seed, device)


def papers_figures(settings: Settings, learner: str, ways: int) -> dict[str, float | None]:
    """Look up what the task's paper has for the learner, in % by score."""
    if settings.task == "omniglot":
        return dict(
            zip((f"accuracy_{k}" for k in PRESENTATIONS), PAPER.get((settings.labels, ways, learner), ()), strict=False)
        )
    if settings.task == "few-shot" and settings.shots == 1:
        row = FEW_SHOT_PAPER.get((learner, settings.ways), ())
        return {"accuracy": dict(zip((5, 10, 15, 20), row, strict=False)).get(ways)}
    return {}


def show(found: dict[str, dict], settings: Settings, update: int, tested: str, ways: int) -> None:
    """The table of each learner's scores, with what it was tested on as part of its title; accuracies are in %."""
    percent = "accuracy" in found["ours"]
    title = f"{settings.learner}, {settings.task}{', %' * percent}: {update} updates of"
    title += f" {settings.tasks_per_update} tasks; {tested}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    columns: list[dict] = []
    for name, scores in found.items():
        table.add_column(name, justify="right", no_wrap=True)
        columns.append(
            {
                score: f"{100 * mean:.1f} ± {100 * half:.1f}" if percent else f"{mean:.3f} ± {half:.3f}"
                for score, (mean, half) in scores.items()
            }
        )
        paper = papers_figures(settings, settings.learner if name == "ours" else name, ways)
        if any(paper.values()):
            table.add_column("the paper's", justify="right")
            columns.append(paper)
    for score in found["ours"]:
        table.add_row(score, *(str(column.get(score, "")) for column in columns))
    console.print(table)


@torch.no_grad()
def draw(learner, test_tasks, plots: Path, seed: int, device: str) -> None:
    """Draw test tasks as PNGs: a Gaussian process's likelihoods, a MANN's memory in one episode."""
    from mann_kernels.visualize import draw_episode

    batch = test_tasks.sample(100, torch.Generator().manual_seed(seed)).to(device)
    if isinstance(test_tasks, GPRegression):
        write_atomically(
            plots / "points.png", as_png(likelihoods(test_tasks.nll(learner(batch.x), batch), batch.exact))
        )
    core = getattr(learner, "core", None)
    if isinstance(core, MANN) and hasattr(batch, "x"):
        classes, delay = None, 0
        if isinstance(test_tasks, OmniglotEpisodes):
            classes, delay = class_of_steps(batch, 0), 1
        write_atomically(plots / "memory.png", as_png(draw_episode(core, batch.x, classes=classes, delay=delay)))


def class_of_steps(episodes, example: int) -> torch.Tensor:
    """A number for each class [T], whatever its label looks like."""
    y = episodes.y[:, example]
    return y if y.dim() == 1 else y.unique(dim=0, return_inverse=True)[1]


def likelihoods(nll: torch.Tensor, exact: torch.Tensor):
    """A figure of the negative log-likelihood of each point [T, B], and that of the true process."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    points = range(1, len(nll) + 1)
    for name, values in (("learner", nll), ("the true process", exact)):
        axes.plot(points, values.mean(1).cpu().numpy(), label=name)
    axes.set(xlabel="point", ylabel=f"negative log-likelihood, mean of {nll.shape[1]} functions")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    typer.run(main)
