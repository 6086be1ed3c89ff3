"""The bench: verify every kernel against its reference, then time it against what one would use otherwise."""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench import store
from bench.devices import devices, keep_freed_memory, why_no_gpu
from bench.groups import is_ours
from bench.operators import operators
from bench.run import Run, Selection, with_kernels
from bench.tables import calls_table, fits_table, sweep_table, timings_table


class Device(Enum):
    """The kind of device to run on."""

    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    """The lower precisions that float32 work on a GPU may be timed in."""

    tf32 = "tf32"
    autocast = "autocast"


#: Columns that the widest table takes, for where no terminal says how many there are.
WIDE = 220
console = Console(width=None if sys.stdout.isatty() else WIDE)


def known(option, values, allowed) -> None:
    """Refuse values of an option that nothing knows.

    Raises:
        typer.BadParameter: naming the option, what it got and what it knows.
    """
    for unknown in sorted(set(values or []) - set(allowed)):
        raise typer.BadParameter(f"{option}: got {unknown!r}, want one of {', '.join(allowed)}")


def chosen(suite, op, shape):
    """The operators asked for, in the order of the package.

    Raises:
        typer.BadParameter: as `known`.
    """
    everything = operators().values()
    known("--suite", [] if suite is None else [suite], sorted({bench.suite for bench in everything}))
    found = [bench for bench in everything if suite in (None, bench.suite)]
    known("--op", op, [bench.op for bench in found])
    found = [bench for bench in found if not op or bench.op in op]
    known("--shape", shape, list(dict.fromkeys(case.size for bench in found for case in bench.cases(False))))
    return found


def usable(wanted):
    """The devices to run on, each tried.

    Raises:
        typer.BadParameter: the device asked for is not here.
        typer.Exit: a device is here and does not work.
    """
    try:
        where = devices(wanted)
    except ValueError as error:
        raise typer.BadParameter(f"--device: {error}") from None
    if wanted is None and why_no_gpu() is not None:
        console.print(f"On the CPU alone: {why_no_gpu()}")
    for device in where:
        problem = device.problem()
        if problem is not None:
            console.print(f"--device {device.type}: {problem}")
            raise typer.Exit(1)
    return where


app = typer.Typer(add_completion=False)

DeviceOption = Annotated[Device | None, typer.Option(help="Default: the CPU, and a CUDA device if there is one.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Threads for every contestant on the CPU.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", callback=store.writable, help="Write the results here, as they come.")
]
QUICK = (
    "Training steps alone, fewer sizes and rounds; MetaNet's update not compiled, the compiled loop and MANN's other structures at"
    " the paper's size alone."
)
MINUTES = (
    "End after so many minutes, with what there is by then: what matters most is verified and timed first, on a GPU all CUDA graphs"
    " before the rest, and torch.compile last."
)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    suite: Annotated[str | None, typer.Option(help="A family of operators, mann or metanet. Default: both.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="One operator; may be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="One size; may be repeated.")] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = 1,
    verify_only: Annotated[bool, typer.Option("--verify-only", help="Verify, time nothing.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help=QUICK)] = False,
    minutes: Annotated[float | None, typer.Option(min=0.01, help=MINUTES)] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Time with TF32 allowed, or under autocast in bfloat16: on a GPU.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Omniglot, for the paper's input.")] = None,
    json_file: JsonOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what --json holds.")] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the results in bench/results, by machine and day.")
    ] = False,
):
    """Verify every kernel against its reference; only then time it, and what one would use otherwise, in one run."""
    if context.invoked_subcommand is not None:
        return
    if resume and json_file is None:
        raise typer.BadParameter("--resume: got no --json, want the file to go on from")
    benches, where = chosen(suite, op, shape), usable(None if device is None else device.value)
    if precision is not None and any(place.type == "cpu" for place in where):
        raise typer.BadParameter(f"--precision: got {precision.value} with the CPU, want --device cuda")
    torch.set_num_threads(threads)
    run = Run(console, where, threads, timing=not verify_only, path=json_file)
    run.facts["precision"] = "float32" if precision is None else precision.value
    if resume:
        run.go_on()
    with run.until(minutes):
        selection = Selection(benches, shape, quick, data, None if precision is None else precision.value)
        if minutes is None:
            run.verify(benches)
        if not verify_only:
            for bench in benches:
                for notice in bench.notices():
                    console.print(notice, markup=False)
            run.time(selection, in_parts=minutes is not None)
    if not verify_only:
        console.print(timings_table(run.timings))
    run.keep(store.history_file(run.facts, suite or "all") if save else None)
    failed = [row for row in run.timings if is_ours(row) and row["note"]]
    if failed:
        console.print(f"{len(failed)} of our own could not be timed: see the notes")
    if not verify_only and not run.timings:
        console.print("Nothing was timed")
    if run.code or failed or not (verify_only or run.timings):
        raise typer.Exit(run.code or 1)


@app.command("sweep")
def sweep_command(
    op: Annotated[str | None, typer.Option(help="An operator that has sizes to sweep. Default: the first.")] = None,
    variable: Annotated[list[str] | None, typer.Option(help="T, N, B, H or R; may be repeated. Default: all.")] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = 1,
    seconds: Annotated[float, typer.Option(min=0.01, help="What a training step may take at most.")] = 2.0,
    memory: Annotated[float, typer.Option(min=1, help="MiB that it may hold at most.")] = 2048.0,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="torch.compile at every size, not along T alone.")
    ] = False,
    json_file: JsonOption = None,
):
    """Time and memory of an operator's training step against its sizes, verified first, with fitted exponents."""
    from bench import sweep

    able = {name: bench for name, bench in operators().items() if bench.axes}
    known("--op", [] if op is None else [op], able)
    bench = able[op or next(iter(able))]
    known("--variable", variable, bench.axes)
    where = usable(None if device is None else device.value)
    torch.set_num_threads(threads)
    bounds = sweep.Bounds(seconds, memory)
    run = Run(console, where, threads, timing=True, path=json_file)
    with run.until(None):
        run.verify([bench])
        plan = [
            (place, name) for place in where if with_kernels([bench], place, console) for name in variable or bench.axes
        ]
        for place, name in run.track(plan, "Sweeping"):
            run.sweep += sweep.run(bench, name, place, place.timed[0], threads, bounds, compiled=compiled)
            run.write()
    console.print(sweep_table(run.sweep))
    console.print(fits_table(sweep.fits(run.sweep)))
    run.keep()
    if any(is_ours(row) and row["note"] not in (None, sweep.OUT_OF_TIME, sweep.OUT_OF_MEMORY) for row in run.sweep):
        console.print("One of our own failed: see the notes")
        run.code = run.code or 1
    if run.code:
        raise typer.Exit(run.code)


@app.command("calls")
def calls_command(
    op: Annotated[list[str] | None, typer.Option(help="One operator; may be repeated.")] = None,
    device: DeviceOption = None,
):
    """Time what a call of an operator costs beside its kernels: checks, autograd, dispatch."""
    from bench import calls

    benches = [bench for bench in chosen(None, op, None) if bench.ours is None]
    torch.set_num_threads(1)
    rows = []
    for place in usable(None if device is None else device.value):
        for bench in with_kernels(benches, place, console):
            rows.append((place.type, bench.op, calls.row(bench, place)))
    console.print(calls_table(rows, calls.PARTS))


@app.command("report")
def report_command(
    result: Annotated[
        list[Path],
        typer.Argument(help="What --json wrote; several files of one machine are taken together."),
    ],
    compare: Annotated[
        Path | None, typer.Option(help="Earlier results: what got slower beyond the spread is marked.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for report.html and the pictures.")] = Path("build/bench"),
):
    """One HTML page that needs nothing beside it, and its pictures as PNG files, from the results of earlier runs."""
    from bench import report

    try:
        new = store.read_together(result)
        old = None if compare is None else store.read(compare)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    compared = None if compare is None else compare.name
    for path in report.write(new, out, old, compared):
        console.print(f"Wrote {path}")


if __name__ == "__main__":
    keep_freed_memory()
    app(prog_name="python -m bench")
