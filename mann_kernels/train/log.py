"""The log of a run, a CSV file, and its picture."""

import csv
import io
import math
from pathlib import Path
from typing import Any

from mann_kernels._paths import about
from mann_kernels.train.checkpoint import write_atomically


def columns(names: list[str]) -> list[str]:
    """Of a task with these scores: means since the row before; means on the test tasks and the half-widths of their 95 %
    confidence intervals; wall-clock seconds and CPU seconds so far."""
    tested = [column for name in names for column in (f"test_{name}", f"test_{name}_half_width")]
    return ["update", "tasks", "loss", *names, *tested, "seconds", "cpu_seconds"]


def write_log(path: Path, rows: list[dict], names: list[str]) -> None:
    """All rows, or the old file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(names), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_log(path: Path, last: float = math.inf) -> list[dict]:
    """The rows up to the update `last`: a run stopped between the log and the checkpoint has one more.

    Raises:
        PathError: it is not a log.
    """
    with about(path, "cannot be read as the log of a run"):
        if not path.exists():
            return []
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if rows and not {"update", "tasks", "seconds"} <= rows[0].keys():
            raise ValueError(f"its columns are {', '.join(map(str, rows[0]))}")
        return [row for row in rows if int(row["update"]) <= last]


def plot_log(rows: list[dict], names: list[str], title: str) -> bytes:
    """A PNG of the scores over the updates: thin lines in training; dots on the test tasks, with the first one's interval."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for n, name in enumerate(names):
        color = colormaps["viridis"](0.9 * n / len(names))
        seen = [(float(row["update"]), float(row[name])) for row in rows if row.get(name)]
        axes.plot(*zip(*seen, strict=True), color=color, linewidth=0.7, alpha=0.5)
        tested = [row for row in rows if row.get(f"test_{name}")]
        if tested:
            of = ("update", f"test_{name}", f"test_{name}_half_width")
            updates, mean, half = ([float(row[column]) for row in tested] for column in of)
            bars: dict[str, Any] = {"yerr": half, "capsize": 2} if n == 0 else {}
            axes.errorbar(updates, mean, color=color, marker=".", label=name.replace("_", " "), **bars)
    axes.set(xlabel="updates", title=f"{title}: dots on test tasks, thin lines in training")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return as_png(figure)


def plot_tests(runs: dict[str, list[dict]]) -> bytes:
    """A PNG of the first score on the test tasks over the tasks of the training, a line with its interval for each run by name.

    Raises:
        ValueError: naming a run that has no such test.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    columns = (column for rows in runs.values() for row in rows[:1] for column in row)
    score = next((column for column in columns if column.startswith("test_")), "a test")
    half_width = f"{score}_half_width"
    for name, rows in runs.items():
        tested = [row for row in rows if row.get(score)]
        if not tested:
            raise ValueError(f"{name}: got {len(rows)} rows without {score}, want the log of a run that was tested")
        tasks, mean, half = ([float(row[column]) for row in tested] for column in ("tasks", score, half_width))
        (line,) = axes.plot(tasks, mean, label=name)
        low, high = ([value + sign * width for value, width in zip(mean, half, strict=True)] for sign in (-1, 1))
        axes.fill_between(tasks, low, high, color=line.get_color(), alpha=0.2)
    axes.set(xscale="log", xlabel="tasks of the training", ylabel=score.removeprefix("test_") + " on test tasks")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return as_png(figure)


def as_png(figure) -> bytes:
    """A matplotlib figure as the content of a file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    return image.getvalue()
