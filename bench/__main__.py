"""The bench: verify every kernel against its reference, then time it against what one would use otherwise."""

import os
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from bench import harness, limits, store
from bench.devices import DeviceLost, devices, why_no_gpu
from bench.episodes import omniglot
from bench.groups import is_ours
from bench.suites import NOT_QUICK, SUITES, backend_of
from bench.tables import failures_table, fits_table, sweep_table, timings_table


class Device(Enum):
    cpu = "cpu"
    cuda = "cuda"


#: Columns that the widest table takes, for where no terminal says how many there are.
WIDE = 220
console = Console(width=None if sys.stdout.isatty() else WIDE)


def chosen(where, suite, stem, shape, quick):
    """The suite, its stems and the names of the sizes asked for (None: the usual ones of a device).

    Raises:
        typer.BadParameter: naming the option, what it got and what it knows.
    """
    if suite not in SUITES:
        raise typer.BadParameter(f"--suite: got {suite!r}, want one of {', '.join(SUITES)}")
    found = SUITES[suite]
    for name, values, known in (("--stem", stem, found.stems), ("--shape", shape, found.shapes)):
        for unknown in set(values or []) - set(known):
            raise typer.BadParameter(f"{name}: got {unknown!r}, want one of {', '.join(known)}")
    usual = {type: [n for n in names if not (quick and n in NOT_QUICK)] for type, names in found.usual.items()}
    sizes = {device.type: shape or usual[device.type] for device in where}
    return found, [name for name in found.stems if not stem or name in stem], sizes


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


def verify(stems, where):
    """All devices, before anything is timed.

    Raises:
        typer.Exit: something is wrong.
    """
    rows = []
    for device in where:
        for name in track(stems, f"Verifying on {device.type}", console=console):
            rows += harness.verify([name], device)
    failed = [row for row in rows if not row["ok"]]
    console.print(f"Verified {len(rows)} quantities against the float64 reference: {len(failed)} wrong")
    if failed:
        console.print(failures_table(failed))
        raise typer.Exit(1)
    return rows


def with_kernels(stems, device):
    """The stems that have a kernel on the device: what runs as plain PyTorch is not what is to be timed."""
    found = []
    for stem in stems:
        why = backend_of(stem, device.type, torch.float32)[1]
        if why is None:
            found.append(stem)
        else:
            console.print(f"Not timed on {device.type}: {stem}: {why}")
    return found


def measure(suite, stems, sizes, where, threads, quick, data):
    """Rows of every device, dtype and case.

    Raises:
        typer.Exit: there is nothing to time.
    """
    rows = []
    for device in where:
        cases = suite.plan(with_kernels(stems, device), sizes[device.type], quick)
        plan = [(dtype, case) for case in cases for dtype in device.timed]
        compared = []
        for dtype, case in track(plan, f"Compiling for and timing on {device.type}", console=console):
            real = data is not None and case.stem == "mann_sequence" and case.shape.I == 405
            x = omniglot(data, case.shape.T, case.shape.B) if real else None
            compared.append(harness.Comparison(suite, case, device, dtype, threads, quick, x))
            compared[-1].sit()
            if device.sittings == 1:  # nothing more to come: its memory is free for the next
                rows += compared.pop().rows()
        for number in range(1, device.sittings):
            for comparison in track(compared, f"Timing again, {number + 1} of {device.sittings}", console=console):
                comparison.sit()
        rows += [row for comparison in compared for row in comparison.rows()]
    if not rows:
        console.print("Nothing was timed")
        raise typer.Exit(1)
    return rows


app = typer.Typer(add_completion=False)

DeviceOption = Annotated[Device | None, typer.Option(help="Default: the CPU, and a CUDA device if there is one.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Threads for every contestant on the CPU.")]
JsonOption = Annotated[Path | None, typer.Option("--json", callback=store.writable, help="Write the results here.")]


def facts_of(where, threads, timing) -> dict:
    """The machine's, with what it can do at most where something is to be timed."""
    facts = harness.machine(threads, where)
    if timing:
        facts["limits"] = {place.type: limits.facts(place, place.timed, threads) for place in where}
    console.print(f"python -m bench {shlex.join(sys.argv[1:])}")
    console.print_json(data=facts)
    return facts


def note_the_end(facts, where) -> None:
    """Whether the machine was the same all the while."""
    facts["load_average_after"] = os.getloadavg()[0]
    facts["devices_after"] = {place.type: place.state() for place in where}


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    suite: Annotated[str, typer.Option(help=f"Which operators: {', '.join(SUITES)}.")] = "mann",
    stem: Annotated[list[str] | None, typer.Option(help="One operator of the suite; may be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="One size of the suite; may be repeated.")] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = 1,
    verify_only: Annotated[bool, typer.Option("--verify-only", help="Verify, time nothing.")] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Training steps alone, fewer sizes and rounds; MetaNet's update not compiled, the compiled loop and MANN's other "
            "structures at the paper's size alone.",
        ),
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Packed Omniglot (20 x 20) for the paper's input.")] = None,
    json_file: JsonOption = None,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the results in bench/results, by machine and day.")
    ] = False,
):
    """Verify every kernel against its reference; only then time it, and what one would use otherwise, in one run."""
    if context.invoked_subcommand is not None:
        return
    where = usable(None if device is None else device.value)
    found, stems, sizes = chosen(where, suite, stem, shape, quick)
    torch.set_num_threads(threads)
    timings = []
    try:
        facts = facts_of(where, threads, not verify_only)
        verification = verify(stems, where)
        if not verify_only:
            for notice in found.notices(stems):
                console.print(notice, markup=False)
            timings = measure(found, stems, sizes, where, threads, quick, data)
            note_the_end(facts, where)
            console.print(timings_table(timings))
    except DeviceLost as error:
        console.print(f"Stopped, nothing was written: the device does not answer any more. {error}")
        raise typer.Exit(1) from None
    for path in [json_file] * (json_file is not None) + [store.history_file(facts, suite)] * save:
        store.write(path, facts, verification=verification, timings=timings)
        console.print(f"Wrote {path}")
    failed = [row for row in timings if is_ours(row) and row["note"]]
    if failed:
        console.print(f"{len(failed)} of our own could not be timed: see the notes")
        raise typer.Exit(1)


@app.command("sweep")
def sweep_command(
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
    """Time and memory of a training step of mann_sequence against T, N, B, H and R, verified first, with fitted exponents."""
    from bench import sweep

    for unknown in set(variable or []) - set(sweep.AXES):
        raise typer.BadParameter(f"--variable: got {unknown!r}, want one of {', '.join(sweep.AXES)}")
    where = usable(None if device is None else device.value)
    torch.set_num_threads(threads)
    bounds, rows = sweep.Bounds(seconds, memory), []
    try:
        facts = facts_of(where, threads, timing=True)
        verification = verify([sweep.STEM], where)
        plan = [
            (place, name) for place in where if with_kernels([sweep.STEM], place) for name in variable or sweep.AXES
        ]
        for place, name in track(plan, "Sweeping", console=console):
            rows += sweep.run(name, place, place.timed[0], threads, bounds, compiled=compiled)
        note_the_end(facts, where)
    except DeviceLost as error:
        console.print(f"Stopped, nothing was written: the device does not answer any more. {error}")
        raise typer.Exit(1) from None
    console.print(sweep_table(rows))
    console.print(fits_table(sweep.fits(rows)))
    if json_file is not None:
        store.write(json_file, facts, verification=verification, sweep=rows)
        console.print(f"Wrote {json_file}")
    if any(is_ours(row) and row["note"] not in (None, sweep.OUT_OF_TIME, sweep.OUT_OF_MEMORY) for row in rows):
        console.print("One of our own failed: see the notes")
        raise typer.Exit(1)


@app.command("report")
def report_command(
    result: Annotated[
        list[Path],
        typer.Argument(
            help="What --json wrote; several files of one machine are taken together. Those of cost are shown beside."
        ),
    ],
    compare: Annotated[
        Path | None, typer.Option(help="Earlier results: what got slower beyond the spread is marked.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for report.html and the pictures.")] = Path("build/bench"),
):
    """One HTML page that needs nothing beside it, and its pictures as PNG files, from the results of earlier runs."""
    from bench import report

    try:
        predicted = store.predictions(result)
        measured = [path for path in result if path not in predicted]
        if not measured:
            raise ValueError("got predictions alone, want results of a machine too")
        new = store.read_together(measured)
        old = None if compare is None else store.read(compare)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    compared = None if compare is None else compare.name
    for path in report.write(new, out, old, compared, list(predicted.values())):
        console.print(f"Wrote {path}")


@app.command("cost", context_settings={"ignore_unknown_options": True}, add_help_option=False)
def cost(arguments: Annotated[list[str] | None, typer.Argument()] = None):
    """What the GPU kernels would cost, predicted: launches, bytes, FLOPs, occupancy and roofline times."""
    from bench.cost import main

    command = typer.Typer(add_completion=False)
    command.command()(main)
    command(arguments or [], prog_name="python -m bench cost")


if __name__ == "__main__":
    try:
        app(prog_name="python -m bench")
    except KeyboardInterrupt:
        raise SystemExit("stopped; nothing was written") from None
