"""The tables of a run, on a terminal."""

import math

from rich.table import Table


def failures_table(rows):
    table = Table(title="Verification failed: nothing is timed")
    for column in ("stem", "device", "backend", "dtype", "shape", "quantity", "error", "budget"):
        table.add_column(column)
    for row in rows:
        cells = (row[str(column.header)] for column in table.columns)
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    return table


GROUP = ("device", "dtype", "stem", "shape", "pass")


def timings_table(rows):
    """By device, dtype, stem, size and pass: the fastest first, and last, with a note, what could not be timed."""
    table = Table(title="Time and memory")
    for column in (*GROUP, "contestant"):
        table.add_column(column, no_wrap=True)
    for column in ("median ms", "q1 - q3", "x ours", "saved MiB", "peak MiB", "compile s"):
        table.add_column(column, justify="right", no_wrap=True)
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in GROUP), []).append(row)
    for head, group in groups.items():
        mine = next(row["median_ms"] for row in group if row["contestant"] == "mann_kernels")
        for row in sorted(group, key=lambda row: row["median_ms"] or math.inf):
            style = "bold" if row["contestant"] == "mann_kernels" else None
            optional = ["" if row[key] is None else f"{row[key]:.1f}" for key in ("saved_mb", "peak_mb", "compile_s")]
            if row["note"] is not None:
                table.add_row(*head, f"{row['contestant']}: {row['note']}", style=style)
                continue
            spread = f"{row['q1_ms']:.2f} - {row['q3_ms']:.2f}"
            ratio = "" if mine is None else f"{row['median_ms'] / mine:.2f}"
            table.add_row(*head, row["contestant"], f"{row['median_ms']:.2f}", spread, ratio, *optional, style=style)
        table.add_section()
    return table
