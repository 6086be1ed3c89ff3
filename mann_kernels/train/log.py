"""The log of a run, a CSV file, and its picture."""

import csv
import io
from pathlib import Path

from mann_kernels.train.checkpoint import write_atomically

#: Mean loss and accuracy since the row before; on the test classes mean accuracy and the half-width of its 95 % confidence
#: interval over tasks; wall-clock seconds and CPU seconds so far.
COLUMNS = ("update", "tasks", "loss", "accuracy", "test_accuracy", "test_half_width", "seconds", "cpu_seconds")


def write_log(path: Path, rows: list[dict]) -> None:
    """All rows, or the old file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_log(path: Path, last: int) -> list[dict]:
    """The rows up to the update `last`: a run stopped between the log and the checkpoint has one more."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["update"]) <= last]


def plot_log(rows: list[dict], path: Path, title: str) -> None:
    """Accuracy over tasks seen: of training, and on the test classes with its confidence interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    seen, accuracy = ([float(row[name]) for row in rows] for name in ("tasks", "accuracy"))
    axes.plot(seen, accuracy, color="0.6", linewidth=1, label="training classes, mean since the last point")
    tested = [
        [float(row[c]) for c in ("tasks", "test_accuracy", "test_half_width")]
        for row in rows
        if row.get("test_accuracy")
    ]
    if tested:
        axes.errorbar(
            *zip(*tested, strict=True), color="C0", capsize=2, marker=".", label="test classes, 95 % interval"
        )
    axes.set(xlabel="tasks seen", ylabel="accuracy", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    pyplot.close(figure)
    write_atomically(path, image.getvalue())
