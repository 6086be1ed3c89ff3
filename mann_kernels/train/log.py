"""The log of a run, a CSV file, and its picture."""

import csv
import io
from pathlib import Path

import torch

from mann_kernels.train.checkpoint import write_atomically


def columns(names: list[str]) -> list[str]:
    """Of a task with these scores: means since the row before; means on the test tasks and the half-widths of their 95 %
    confidence intervals; wall-clock seconds and CPU seconds so far."""
    tested = [column for name in names for column in (f"test_{name}", f"test_{name}_half_width")]
    return ["update", "tasks", "loss", *names, *tested, "seconds", "cpu_seconds"]


def write_log(path: Path, rows: list[dict], names: list[str]) -> None:
    """All rows, or the old file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_log(path: Path, last: int) -> list[dict]:
    """The rows up to the update `last`: a run stopped between the log and the checkpoint has one more."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["update"]) <= last]


def plot_log(rows: list[dict], names: list[str], path: Path, title: str) -> None:
    """The scores over the tasks seen: of training, and on the test tasks, there with the confidence interval of the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    colors = pyplot.cm.viridis(torch.linspace(0, 0.9, len(names)).tolist())
    for name, color in zip(names, colors, strict=True):
        seen = [(float(row["tasks"]), float(row[name])) for row in rows if row.get(name)]
        axes.plot(*zip(*seen, strict=True), color=color, linewidth=0.8, alpha=0.5)
        tested = [row for row in rows if row.get(f"test_{name}")]
        if tested:
            tasks, mean, half = (
                [float(row[column]) for row in tested]
                for column in ("tasks", f"test_{name}", f"test_{name}_half_width")
            )
            bars = {"yerr": half, "capsize": 2} if name == names[0] else {}
            axes.errorbar(tasks, mean, color=color, marker=".", label=name.replace("_", " "), **bars)
    axes.set(xlabel="tasks seen", title=f"{title}: dots on test tasks, thin lines in training")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    pyplot.close(figure)
    write_atomically(path, image.getvalue())
