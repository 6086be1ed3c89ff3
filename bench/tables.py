"""The tables of a run, on a terminal."""

from rich.table import Table

from bench.groups import grouped, is_ours, of_limit, times_of


def failures_table(rows):
    table = Table(title="Verification failed: nothing is timed")
    for column in ("op", "device", "backend", "dtype", "shape", "quantity", "error", "budget"):
        table.add_column(column)
    for row in rows:
        cells = (row[str(column.header)] for column in table.columns)
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    return table


def number(value, form=".2f") -> str:
    return "" if value is None else f"{value:{form}}"


def timings_table(rows):
    """Lay out timings by device, dtype, operator, size and pass: the fastest first, and last, with a note, what could
    not be timed."""
    table = Table(title="Time and memory")
    shown = ("device", "dtype", "op", "shape", "pass")
    for column in shown:
        table.add_column(column, no_wrap=True)
    table.add_column("contestant", min_width=25)  # as long as the longest name; a note after it may take several lines
    for column in ("median ms", "q1 - q3", "x ours", "x fastest", "% limit", "saved MiB", "peak MiB", "compile s"):
        table.add_column(column, justify="right", no_wrap=True)
    for group in grouped(rows):
        head = [group.head[name] for name in shown]
        for row in group.rows:
            style = "bold" if is_ours(row) else None
            if row["note"] is not None:
                table.add_row(*head, f"{row['contestant']}: {row['note']}", style=style)
                continue
            limit = of_limit(row)
            table.add_row(
                *(*head, row["contestant"] if row["same_work"] else f"({row['contestant']})", number(row["median_ms"])),
                f"{row['q1_ms']:.2f} - {row['q3_ms']:.2f}",
                number(times_of(row, group.ours)),
                number(group.of_fastest(row)),
                number(limit and 100 * limit, ".0f"),
                *(number(row[key], ".1f") for key in ("saved_mb", "peak_mb", "compile_s")),
                style=style,
            )
        table.add_section()
    table.caption = "(in brackets: does other work) x fastest: times the fastest that does the same work"
    return table


def calls_table(rows, parts):
    """Lay out microseconds of the parts of a call, by device and operator."""
    table = Table(title="A training step at the smallest size: microseconds")
    for column in ("device", "op"):
        table.add_column(column, no_wrap=True)
    for column in (*parts, "in all"):
        table.add_column(column, justify="right", no_wrap=True)
    for device, op, found in rows:
        table.add_row(device, op, *(number(value, ".1f") for value in (*found.values(), sum(found.values()))))
    table.caption = "; ".join(f"{part}: {what}" for part, what in parts.items())
    return table


def sweep_table(rows):
    """Lay out a sweep by size and value: time and memory, or why there is none."""
    table = Table(title="Growth: a training step")
    for column in ("device", "size", "value", "contestant", "median ms", "q1 - q3", "saved MiB"):
        table.add_column(
            column, justify="left" if column in ("device", "size", "contestant") else "right", no_wrap=True
        )
    for row in rows:
        spread = row["note"] or f"{row['q1_ms']:.2f} - {row['q3_ms']:.2f}"
        numbers = (number(row["median_ms"]), spread, number(row["saved_mb"]))
        style = "bold" if is_ours(row) else None
        table.add_row(row["device"], row["variable"], str(row["value"]), row["contestant"], *numbers, style=style)
    return table


def fits_table(fits):
    table = Table(title="Exponents where the size dominates (1: proportional)")
    for column in ("device", "size", "contestant", "from", "to", "time", "saved"):
        table.add_column(column, justify="left" if column in ("device", "size", "contestant") else "right")
    for fit in fits:
        ends = (str(fit[end] or "") for end in ("from", "to"))
        cells = (fit["device"], fit["variable"], fit["contestant"], *ends, number(fit["time"]), number(fit["saved"]))
        table.add_row(*cells, style="bold" if is_ours(fit) else None)
    return table
