"""The bench: verify every kernel against its reference, then time it against what one would use otherwise."""

import json
import os
import shlex
import sys
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from bench import harness
from bench.devices import DeviceLost, devices, why_no_gpu
from bench.episodes import omniglot
from bench.suites import SUITES, backend_of
from bench.tables import failures_table, timings_table


class Device(Enum):
    cpu = "cpu"
    cuda = "cuda"


# wide enough for the table where no terminal says how wide it is
console = Console(width=None if sys.stdout.isatty() else 160)


def write_json(path: Path, content: dict) -> None:
    """All or nothing: a run cut short leaves the old file."""
    with tempfile.NamedTemporaryFile("w", dir=path.resolve().parent, delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)


def chosen(where, suite, stem, shape):
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
    sizes = {device.type: shape or found.usual[device.type] for device in where}
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
        for dtype, case in track(plan, f"Timing on {device.type}", console=console):
            real = data is not None and case.stem == "mann_sequence" and case.shape.I == 405
            x = omniglot(data, case.shape.T, case.shape.B) if real else None
            rows += harness.time_case(suite, case, device, dtype, threads, quick, x)
    if not rows:
        console.print("Nothing was timed")
        raise typer.Exit(1)
    return rows


app = typer.Typer(add_completion=False)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    suite: Annotated[str, typer.Option(help=f"Which operators: {', '.join(SUITES)}.")] = "mann",
    stem: Annotated[list[str] | None, typer.Option(help="One operator of the suite; may be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="One size of the suite; may be repeated.")] = None,
    device: Annotated[Device | None, typer.Option(help="Default: the CPU, and a CUDA device if there is one.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for every contestant on the CPU.")] = 1,
    verify_only: Annotated[bool, typer.Option("--verify-only", help="Verify, time nothing.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, and no compiled loop.")] = False,
    data: Annotated[Path | None, typer.Option(help="Packed Omniglot (20 x 20) for the paper's input.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
):
    """Verify every kernel against its reference; only then time it, and what one would use otherwise, in one run."""
    if context.invoked_subcommand is not None:
        return
    where = usable(None if device is None else device.value)
    found, stems, sizes = chosen(where, suite, stem, shape)
    torch.set_num_threads(threads)
    result = {"machine": harness.machine(threads, where), "verification": [], "timings": []}
    console.print(f"python -m bench {shlex.join(sys.argv[1:])}")
    console.print_json(data=result["machine"])
    try:
        result["verification"] = verify(stems, where)
        if not verify_only:
            result["timings"] = measure(found, stems, sizes, where, threads, quick, data)
            result["machine"]["load_average_after"] = os.getloadavg()[0]
            result["machine"]["devices_after"] = {place.type: place.state() for place in where}
            console.print(timings_table(result["timings"]))
    except DeviceLost as error:
        console.print(f"Stopped, nothing was written: the device does not answer any more. {error}")
        raise typer.Exit(1) from None
    if json_file is not None:
        write_json(json_file, result)
    failed = [row for row in result["timings"] if row["contestant"].startswith("mann_kernels") and row["note"]]
    if failed:
        console.print(f"{len(failed)} of our own could not be timed: see the notes")
        raise typer.Exit(1)


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
