"""The pictures of a report, as matplotlib figures."""

from matplotlib.figure import Figure

from bench.groups import Group, of_limit
from bench.sweep import OUT_OF_MEMORY, fits

OURS, LOSS, RIVAL, GREY = "#1f6f8b", "#c0392b", "#d98c3f", "#777777"
COLORS = {"mann_kernels": OURS, "eager": RIVAL, "compile_step": "#6a4c93"}
WORDS = {"T": "steps T", "N": "slots N", "B": "batch B", "H": "hidden units H", "R": "heads R"}


def label(group: Group) -> str:
    head = group.head
    place = "" if head["device"] == "cpu" else f" {head['device']} {head['dtype']}"
    return f"{head['op']}  {head['shape']}{place}"


def _bars(values, labels, colors, texts, title, reference, start=0.0):
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(values), 0, -1)
    axes.barh(places, [value - start for value in values], left=start, color=colors, height=0.7)
    axes.set_yticks(places, labels, fontsize=8)
    for place, value, text in zip(places, values, texts, strict=True):
        axes.text(max(value, start), place, f" {text}", va="center", fontsize=8)
    axes.axvline(reference, color=GREY, linewidth=1)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")  # over all of the figure: labels may take half of its width
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.01)
    return figure, axes


def gains(groups: list[Group]) -> Figure | None:
    """How many times as fast as the fastest other way each training step is."""
    shown = [group for group in groups if group.gain is not None and group.head["pass"] == "fwd+bwd"]
    if not shown:
        return None
    values = [group.gain for group in shown]
    texts = [f"{group.gain:.2f}  ({group.rival['contestant']})" for group in shown]
    colors = [OURS if value >= 1 else LOSS for value in values]
    title = "Training step: times as fast as the fastest other way to do the same work (right of 1 we win)"
    figure, axes = _bars(values, [label(group) for group in shown], colors, texts, title, 1, start=1.0)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *values) / 1.2, max(2.0, *values) * 2.5)
    ticks = [
        tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if min(0.5, *values) <= tick <= max(values) * 2
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    return figure


def limits(groups: list[Group]) -> Figure | None:
    """The part of what the machine can do at most that our training steps reach."""
    shown = [group for group in groups if group.ours and group.head["pass"] == "fwd+bwd" and of_limit(group.ours)]
    if not shown:
        return None
    values = [100 * of_limit(group.ours) for group in shown]
    texts = [f"{value:.0f} %" for value in values]
    title = "Training step: part of the machine's measured limit reached, %"
    figure, axes = _bars(values, [label(group) for group in shown], OURS, texts, title, 100)
    axes.set_xlim(0, max(108, *values))
    return figure


def _curves(axes, rows, quantity):
    """A line for every contestant, and a mark where it stopped."""
    for contestant in dict.fromkeys(row["contestant"] for row in rows):
        mine = [row for row in rows if row["contestant"] == contestant]
        points = [(row["value"], row[quantity]) for row in mine if row[quantity]]
        if not points:
            continue
        color, line = (
            COLORS.get(contestant.removesuffix(" graph"), GREY),
            "--" if contestant.endswith(" graph") else "-",
        )
        axes.plot(*zip(*points, strict=True), f"o{line}", color=color, markersize=3, linewidth=1.3, label=contestant)
        stopped = next((row for row in mine if row["note"] is not None), None)
        if stopped is not None:
            # where it would have gone on, at the height of the last point that was measured
            axes.plot([points[-1][0], stopped["value"]], [points[-1][1]] * 2, ":", color=color, linewidth=1)
            axes.plot(stopped["value"], points[-1][1], "X" if stopped["note"] == OUT_OF_MEMORY else "x", color=color)
            short = stopped["note"] if len(stopped["note"]) < 20 else "failed"
            style = {"textcoords": "offset points", "fontsize": 7, "color": color, "ha": "right"}
            axes.annotate(short, (stopped["value"], points[-1][1]), (0, 5), **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def sweep(rows: list[dict]) -> Figure:
    """Time above, memory kept for the backward pass below, against every size, on one device."""
    variables = list(dict.fromkeys(row["variable"] for row in rows))
    figure = Figure(figsize=(3.4 * len(variables) + 0.6, 6), layout="constrained")
    grid = figure.subplots(2, len(variables), squeeze=False, sharex="col")
    found = {(fit["variable"], fit["contestant"]): fit for fit in fits(rows)}
    for column, variable in enumerate(variables):
        mine = [row for row in rows if row["variable"] == variable]
        for axes, quantity, of, name in (
            (grid[0, column], "median_ms", "time", "ms, training step"),
            (grid[1, column], "saved_mb", "saved", "MiB kept for backward"),
        ):
            _curves(axes, mine, quantity)
            ours = found[variable, "mann_kernels"]
            if ours[of] is not None:
                text = f"ours ~ {variable}^{ours[of]:.2f} from {ours['from']}"
                axes.set_title(text, fontsize=9, loc="left", color=OURS)
            if column == 0:
                axes.set_ylabel(name, fontsize=9)
        grid[1, column].set_xlabel(WORDS[variable], fontsize=9)
    shown = {line.get_label(): line for axes in grid[0] for line in axes.lines if not line.get_label().startswith("_")}
    figure.legend(shown.values(), shown.keys(), loc="outside upper right", ncols=len(shown), fontsize=8, frameon=False)
    return figure
