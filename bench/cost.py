"""`python -m bench cost`: what the GPU kernels cost, counted, and a prediction of the time; it runs nothing on a GPU."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from bench import cost_count, cost_kernels, cost_time
from bench.cost_tables import TABLES, peaks_table
from bench.suites import DTYPES, SUITES, suite_of
from mann_kernels import _backend

PREDICTION = (
    "A prediction from counts and published peaks: nothing was run for it. One device has been measured, an NVIDIA H200:"
    " the counts are right there, the kernels of an episode took 2.5 to 6.4 times as long as predicted, and most of MetaNet's"
    " about thirty times, so that they lose to eager in a CUDA graph, over which a gain is predicted (docs/pages/cost_model.md)."
)
PASSES = ("fwd", "bwd")


def shape_of(stem: str, name: str | None):
    """(name, shape) of the size asked for, by default the paper's; None where the stem has no such size."""
    suite = suite_of(stem)
    if suite is SUITES["mann"]:
        name = name or next(iter(suite.shapes))
        return (name, suite.shapes[name]) if name in suite.shapes else None
    cases = list(suite.plan([stem], [name] if name else suite.shapes, True))
    return (cases[0].name, cases[0].shape) if cases else None


def flops_of(step: cost_kernels.Step, eager: dict[str, Counter]) -> dict[str, tuple[float, float]]:
    """(of products, of others) of one of our kernels, by pass: the eager contestant's, but for what is done around ours."""
    found = {}
    for which in PASSES:
        sums = [
            sum(getattr(op, kind) * count for op, count in eager[which].items())
            - sum(getattr(op, kind) * count for op, count in step.around[which].items())
            for kind in ("products", "others")
        ]
        count = sum(kernel.which == which for kernel in step.kernels)
        found[which] = tuple(max(0, each) / max(count, 1) for each in sums)
    return found


def contestant_rows(head: dict, contestants: dict, steps: dict) -> list[dict]:
    """Launches, kernels, bytes and FLOPs of a training step, by contestant; those that are not known with a note."""
    rows = []
    for name, step in steps.items():
        if isinstance(step, str):
            rows.append(head | {"contestant": name, "note": step})
            continue
        around = cost_count.total(step.around)
        launches = around.launches + len(step.kernels)
        moved = around.moved + sum(kernel.moved for kernel in step.kernels)
        sizes = {"launches": launches, "kernels": launches, "bytes": moved, "flops": None, "note": None}
        rows.append(head | {"contestant": name, "ours": len(step.kernels)} | sizes)
    for name, found in contestants.items():
        if isinstance(found, str):
            rows.append(head | {"contestant": name, "note": found})
            continue
        total = cost_count.total(found)
        sizes = {"kernels": total.launches, "bytes": total.moved, "flops": total.flops, "note": None}
        rows.append(head | {"contestant": name, "launches": total.launches} | sizes)
        if name == "eager":
            rows.append(head | {"contestant": "eager graph", "launches": 1} | sizes)
    return [{"table": "launches"} | row for row in rows]


def kernel_rows(head: dict, kernel: cost_kernels.Kernel, flops, shape, dtype) -> list[dict]:
    """Of one kernel: a row for each target, and one for each GPU."""
    head = head | {"backend": kernel.backend, "kernel": kernel.name, "pass": kernel.which}
    launch = {"programs": kernel.programs, "threads": kernel.threads, "cluster": kernel.cluster}
    work = {"bytes": kernel.moved, "scratch_bytes": kernel.scratch, "flops": sum(flops)}
    rows = []
    for target, used in kernel.resources.items():
        found = {"note": used} if isinstance(used, str) else _occupied(target, kernel.threads, used) | {"note": None}
        rows.append({"table": "kernels"} | head | {"target": target} | launch | work | found)
    for gpu, chip in cost_time.GPUS.items():
        if isinstance(kernel.resources.get(chip.target), str):
            continue
        bound = cost_time.of_kernel(kernel, gpu, shape, dtype, cost_time.flops_by_kind(*flops, dtype))
        times = {"roofline_us": bound.roofline, "limited_by": bound.limited_by, "latency_us": bound.latency}
        rows.append({"table": "roofline"} | head | {"gpu": gpu} | times)
    return rows


def _occupied(target: str, threads: int, used: dict) -> dict:
    from occupancy import DEVICES

    sizes = {"registers": used["registers"], "spilled": used["spilled"], "shared": used["shared"]}
    warps = used["programs"] * -(-threads // 32)
    return sizes | {"programs_per_sm": used["programs"], "occupancy": warps * 32 / DEVICES[target][0]}


def times_of(name, step, flops, contestants, gpu, shape, dtype, launch_us, kernel_us) -> dict:
    """Microseconds of a training step of ours, of the others, and their ratios."""
    around = sum(step.around.values(), Counter())
    device = cost_time.of_operations(gpu, around, dtype, kernel_us)
    for kernel in step.kernels:
        kinds = cost_time.flops_by_kind(*flops[kernel.which], dtype)
        bound = cost_time.of_kernel(kernel, gpu, shape, dtype, kinds)
        device += max(kernel_us, bound.roofline, bound.latency)
    launches = cost_count.total(step.around).launches + len(step.kernels)
    ours = cost_time.Times(launches * launch_us, device)
    row = {"backend": name, "gpu": gpu, "ours_us": ours.step, "ours_host_us": ours.host, "ours_device_us": ours.device}
    for other, found in contestants.items():
        if isinstance(found, str):
            row |= {f"{other}_us": None, f"{other}_ratio": None}
            continue
        every = sum(found.values(), Counter())
        host = cost_count.total(found).launches * launch_us
        there = cost_time.Times(host, cost_time.of_operations(gpu, every, dtype, kernel_us))
        row |= {f"{other}_us": there.step, f"{other}_ratio": there.step / ours.step}
        if other == "eager":
            graph = cost_time.Times(launch_us, there.device).step
            row |= {"graph_us": graph, "graph_ratio": graph / ours.step}
    return {"table": "ratios"} | row


def rows_of(stem, shape_name, shape, dtype_name, launch_us, kernel_us, compiling: bool) -> list[dict]:
    """Everything about one operator."""
    suite, dtype = suite_of(stem), DTYPES[dtype_name]
    head = {"stem": stem, "shape": shape_name, "dtype": dtype_name}
    contestants: dict = {"eager": cost_count.eager(suite, stem, shape, dtype)}
    contestants["compiled"] = _or_note(cost_count.compiled, suite, stem, shape, dtype) if compiling else "not counted"
    steps = {}
    for backend in cost_kernels.BACKENDS:
        why = cost_kernels.missing(backend, stem)
        steps[backend] = why or _or_note(cost_kernels.step, suite, stem, shape, dtype, backend)
    rows = contestant_rows(head, contestants, steps)
    for backend, step in steps.items():
        if isinstance(step, str):
            continue
        flops = flops_of(step, contestants["eager"])
        for kernel in step.kernels:
            rows += kernel_rows(head, kernel, flops[kernel.which], shape, dtype)
        for gpu, chip in cost_time.GPUS.items():
            if not any(isinstance(kernel.resources.get(chip.target), str) for kernel in step.kernels):
                rows.append(head | times_of(backend, step, flops, contestants, gpu, shape, dtype, launch_us, kernel_us))
    return rows


def _or_note(function, *arguments):
    """What it returns, or in words why it does not: one kernel that cannot be had does not take the table away."""
    try:
        return function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"


def chosen(stems, shape: str | None, dtype: str):
    """[(stem, name of the size, size)].

    Raises:
        typer.BadParameter: naming the option, what it got and what it knows.
    """
    known = {"--stem": set(_backend.STEMS), "--shape": {name for suite in SUITES.values() for name in suite.shapes}}
    for option, values in (("--stem", stems or []), ("--shape", [shape] if shape else [])):
        for unknown in set(values) - known[option]:
            raise typer.BadParameter(f"{option}: got {unknown!r}, want one of {', '.join(sorted(known[option]))}")
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"--dtype: got {dtype!r}, want float32 or bfloat16")
    found = [(stem, shape_of(stem, shape)) for stem in _backend.STEMS if not stems or stem in stems]
    cases = [(stem, *case) for stem, case in found if case is not None]
    if not cases:
        raise typer.BadParameter(f"--shape: got {shape!r}, which is no size of {', '.join(stems)}")
    return cases


def main(
    stem: Annotated[list[str] | None, typer.Option(help="One operator; may be repeated. Default: all.")] = None,
    shape: Annotated[str | None, typer.Option(help="A size of the suites. Default: the paper's of each.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    launch_us: Annotated[float, typer.Option(min=0, help="Assumed: host time of a launch, us.")] = 5.0,
    kernel_us: Annotated[float, typer.Option(min=0, help="Assumed: least GPU time of a dependent kernel, us.")] = 2.5,
    compile_seconds: Annotated[float, typer.Option(help="Count what torch.compile makes only so long.")] = 300.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
):
    """A prediction: launches, bytes, FLOPs, registers, occupancy, roofline times and ratios of every GPU kernel."""
    console = Console(width=None if Console().is_terminal else 200)
    console.print(PREDICTION)
    rows, spent = [], 0.0
    for each, name, size in track(chosen(stem, shape, dtype), "Counting", console=console):
        began = time.perf_counter()
        rows += rows_of(each, name, size, dtype, launch_us, kernel_us, spent < compile_seconds)
        spent += time.perf_counter() - began
    assumptions = [*cost_time.ASSUMPTIONS, f"--launch-us {launch_us:g}, --kernel-us {kernel_us:g}"]
    for kind, table in TABLES.items():
        console.print(table([row for row in rows if row["table"] == kind]))
    console.print(peaks_table(cost_time.GPUS, cost_time.PRODUCTS))
    for line in assumptions:
        console.print(f"- {line}")
    if json_file is not None:
        json_file.write_text(
            json.dumps({"prediction": PREDICTION, "assumptions": assumptions, "rows": rows}, indent=1) + "\n"
        )
