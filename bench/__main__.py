"""The bench: verify every kernel against its reference, then time it against what one would use otherwise."""

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import harness
from bench.episodes import omniglot
from bench.suites import SUITES, family_of, in_metanet
from mann_kernels import _library

# wide enough for the table where no terminal says how wide it is
console = Console(width=None if sys.stdout.isatty() else 140)
#: Steps of the loop that torch.compile unrolls: at 50 steps it compiles for minutes.
LOOP_STEPS = 12


def plan(stems, shapes, quick):
    """(stem, shape name, shape, unrolled loop) of everything to time."""
    for stem in stems:
        known = family_of(stem).shapes
        for name in shapes:
            if in_metanet(stem):
                if name in known:
                    yield stem, name, known[name], False
                continue
            if name == "long" and (quick or stem != "mann_sequence"):
                continue
            if stem != "mann_sequence" and name not in ("paper", "wide"):
                continue
            yield stem, name, known[name], False
            if stem == "mann_sequence" and name != "long" and not quick:
                yield stem, f"{name}@T={LOOP_STEPS}", known[name].at(LOOP_STEPS), True


def failures_table(rows):
    table = Table(title="Verification failed: nothing is timed")
    for column in ("stem", "backend", "dtype", "shape", "quantity", "error", "budget"):
        table.add_column(column)
    for row in rows:
        cells = (row[str(column.header)] for column in table.columns)
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    return table


def timings_table(rows):
    table = Table(title="Time and memory")
    for column in ("stem", "shape", "pass", "contestant"):
        table.add_column(column, no_wrap=True)
    for column in ("median ms", "q1 - q3", "x ours", "saved MiB", "peak MiB", "compile s"):
        table.add_column(column, justify="right", no_wrap=True)
    groups = {}
    for row in rows:
        groups.setdefault((row["stem"], row["shape"], row["pass"]), []).append(row)
    for (stem, shape, name_of_pass), group in groups.items():
        mine = next(row["median_ms"] for row in group if row["contestant"] == "mann_kernels")
        for row in sorted(group, key=lambda row: row["median_ms"]):
            optional = ["" if row[key] is None else f"{row[key]:.1f}" for key in ("saved_mb", "peak_mb", "compile_s")]
            style = "bold" if row["contestant"] == "mann_kernels" else None
            spread = f"{row['q1_ms']:.2f} - {row['q3_ms']:.2f}"
            ratio = f"{row['median_ms'] / mine:.2f}"
            cells = (row["contestant"], f"{row['median_ms']:.2f}", spread, ratio, *optional)
            table.add_row(stem, shape, name_of_pass, *cells, style=style)
        table.add_section()
    return table


def write_json(path: Path, content: dict) -> None:
    """All or nothing: a run cut short leaves the old file."""
    with tempfile.NamedTemporaryFile("w", dir=path.resolve().parent, delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)


def main(
    suite: Annotated[str, typer.Option(help=f"Which operators: {' or '.join(SUITES)}.")] = "mann",
    stem: Annotated[list[str] | None, typer.Option(help="One operator of the suite; may be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="A shape of the suite; may be repeated.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for every contestant.")] = 1,
    verify_only: Annotated[bool, typer.Option("--verify-only", help="Verify, time nothing.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, and no compiled loop.")] = False,
    data: Annotated[Path | None, typer.Option(help="Packed Omniglot (20 x 20) for the paper's input.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
):
    """Verify every kernel against its reference; only then time it, and what one would use otherwise, in one run."""
    if suite not in SUITES:
        raise typer.BadParameter(f"--suite: got {suite!r}, want one of {', '.join(SUITES)}")
    all_stems = [name for family in SUITES[suite] for name in family.stems]
    all_shapes = {name: None for family in SUITES[suite] for name in family.shapes}
    for name, value, known in (("--stem", stem, all_stems), ("--shape", shape, all_shapes)):
        for unknown in set(value or []) - set(known):
            raise typer.BadParameter(f"{name}: got {unknown!r}, want one of {', '.join(known)}")
    stems = [name for name in all_stems if not stem or name in stem]
    torch.set_num_threads(threads)
    result = {"machine": harness.machine(threads), "verification": [], "timings": []}
    console.print(f"python -m bench {shlex.join(sys.argv[1:])}")
    console.print_json(data=result["machine"])

    for name in track(stems, "Verifying", console=console):
        result["verification"] += harness.verify([name])
    failed = [row for row in result["verification"] if not row["ok"]]
    console.print(
        f"Verified {len(result['verification'])} quantities against the float64 reference: {len(failed)} wrong"
    )
    if failed:
        console.print(failures_table(failed))
        raise typer.Exit(1)
    if not verify_only:
        if _library.cpp_missing is not None:
            console.print(f"Nothing to time: {_library.cpp_missing}")
            raise typer.Exit(1)
        for name, shape_name, size, loop in track(
            list(plan(stems, shape or all_shapes, quick)), "Timing", console=console
        ):
            real = data is not None and name == "mann_sequence" and size.I == 405
            x = omniglot(data, size.T, size.B) if real else None
            result["timings"] += harness.time_stem(name, shape_name, size, threads, quick, x, loop)
        result["machine"]["load_average_after"] = os.getloadavg()[0]
        console.print(timings_table(result["timings"]))
    if json_file is not None:
        write_json(json_file, result)


if __name__ == "__main__":
    try:
        typer.run(main)
    except KeyboardInterrupt:
        raise SystemExit("stopped; nothing was written") from None
