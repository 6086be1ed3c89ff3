"""The tables of `python -m bench cost`, made of the rows that its JSON holds."""

from rich.table import Table

TITLE = "Prediction: "


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=TITLE + title)
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _number(value, form=",.0f") -> str:
    return "" if value is None else format(value, form)


def _sections(table, rows, cells):
    """A line under the rows of each stem."""
    before = None
    for row in rows:
        if before not in (None, row["stem"]):
            table.add_section()
        before = row["stem"]
        table.add_row(*cells(row))
    return table


def launches_table(rows) -> Table:
    table = _table(
        "a training step, forward and backward",
        ("stem", "shape", "dtype", "contestant"),
        ("launches", "kernels", "of them ours", "MiB", "MFLOP"),
    )

    def cells(row):
        head = (row["stem"], row["shape"], row["dtype"])
        if row["note"]:
            return *head, f"{row['contestant']}: {row['note']}"
        mega = None if row["flops"] is None else row["flops"] / 1e6
        counts = (_number(row["launches"]), _number(row["kernels"]), _number(row.get("ours")))
        return *head, row["contestant"], *counts, _number(row["bytes"] / 2**20, ",.1f"), _number(mega, ",.1f")

    return _sections(table, rows, cells)


def kernels_table(rows) -> Table:
    table = _table(
        "what the compilers made, and what a launch moves and computes",
        ("stem", "kernel", "target"),
        ("grid", "threads", "cluster", "registers", "spilled", "shared", "per SM", "occupancy", "KiB", "scratch KiB", "MFLOP"),
    )  # fmt: skip

    def cells(row):
        head = (row["stem"], f"{row['kernel']} ({row['backend']}, {row['pass']})")
        grid = (str(row["programs"]), str(row["threads"]), str(row["cluster"]))
        work = (_number(row["bytes"] / 1024), _number(row["scratch_bytes"] / 1024), _number(row["flops"] / 1e6, ",.2f"))
        if row["note"]:
            return *head, f"{row['target']}: {row['note']}", *grid, *[""] * 5, *work
        used = (str(row[key]) for key in ("registers", "spilled", "shared", "programs_per_sm"))
        return *head, row["target"], *grid, *used, f"{row['occupancy']:.0%}", *work

    return _sections(table, rows, cells)


def roofline_table(rows) -> Table:
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    table = _table(
        "us of one launch: by bytes and FLOPs (what bounds it); / with the latency of the steps, where it is an episode",
        ("stem", "kernel"),
        tuple(gpus),
    )
    kernels: dict = {}
    for row in rows:
        name = f"{row['kernel']} ({row['backend']}, {row['pass']})"
        kernels.setdefault((row["stem"], name), {})[row["gpu"]] = row

    def time(row):
        if row is None:
            return "no kernel"
        latency = f" / {row['latency_us']:,.1f}" if row["latency_us"] else ""
        return f"{row['roofline_us']:,.2f} ({row['limited_by']}){latency}"

    lines = [{"stem": stem, "kernel": name, "found": found} for (stem, name), found in kernels.items()]
    return _sections(
        table, lines, lambda line: (line["stem"], line["kernel"], *(time(line["found"].get(gpu)) for gpu in gpus))
    )


def ratios_table(rows) -> Table:
    table = _table(
        "us of a training step, and how many times as long as ours the others take (below one: ours is slower)",
        ("stem", "ours", "gpu"),
        ("ours us", "host", "GPU", "eager", "compiled", "eager in a CUDA graph"),
    )

    def cells(row):
        ours = (_number(row[f"ours_{each}us"], ",.1f") for each in ("", "host_", "device_"))
        others = (
            "not counted" if row[f"{name}_us"] is None else f"{row[f'{name}_us']:,.0f} ({row[f'{name}_ratio']:.2f}x)"
            for name in ("eager", "compiled", "graph")
        )
        return row["stem"], row["backend"], row["gpu"], *ours, *others

    return _sections(table, rows, cells)


def peaks_table(gpus, products) -> Table:
    table = _table("published peaks that go in", ("product", "source"), ("HBM TB/s", "float32", "bf16 tensor, dense"))
    for name, chip in gpus.items():
        product, source = products[name]
        peaks = (chip.bandwidth / 1e12, chip.flops["f32"] / 1e12, chip.flops["bf16"] / 1e12)
        table.add_row(product, source, *(f"{peak:,.5g}" for peak in peaks))
    return table


#: By the word that a row has for "table".
TABLES = {
    "launches": launches_table,
    "kernels": kernels_table,
    "roofline": roofline_table,
    "ratios": ratios_table,
}
