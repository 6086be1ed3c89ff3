"""Runs the bench: verifies and times in order of importance, keeps partial results, and ends within its minutes."""

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from rich.progress import track

from bench import harness, limits, store
from bench.devices import DeviceLost
from bench.groups import grouped
from bench.operators import Bench, Case, backend_of
from bench.tables import failures_table

#: The parts that a comparison is taken in where time is short, by whether there are graphs.
PARTS = {True: ("graphs", "plain", "compiled"), False: ("plain", "compiled")}


#: Seconds after which the end is called again: what the interpreter raises while it cleans up is lost.
RING_AGAIN = 5.0


@contextlib.contextmanager
def of_precision(name: str | None):
    """Within the block float32 work on a GPU may use TF32 ("tf32"), or runs under torch.autocast in bfloat16 ("autocast")."""
    if name == "autocast":
        with torch.autocast("cuda", torch.bfloat16):
            yield
        return
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn) if name == "tf32" else ()
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = True
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


class TimeUp(BaseException):
    """The minutes are over: raised wherever the run happens to be, and taken for the failure of no contestant."""


@dataclass(frozen=True)
class Selection:
    """The operators and sizes that are to be timed, and how."""

    benches: list[Bench]
    shapes: Collection[str] | None
    quick: bool
    data: Path | None
    precision: str | None = None  # as of_precision takes it


@dataclass(frozen=True)
class Job:
    """Names a comparison that is to be made: the operator, its size, the place and what is timed there."""

    bench: Bench
    case: Case
    device: object
    dtype: str
    part: str = "all"

    def is_in(self, rows) -> bool:
        """Say whether these rows have the comparison already."""
        key = {"op": self.bench.op, "shape": self.case.name, "device": self.device.type, "dtype": self.dtype}
        mine = (row["contestant"] for row in rows if all(row[name] == value for name, value in key.items()))
        return any(harness.belongs(name, self.part) for name in mine)


def with_kernels(benches, device, console) -> list[Bench]:
    """The operators that have a kernel on the device: what runs as plain PyTorch is not what is to be timed."""
    found = []
    for bench in benches:
        why = backend_of(bench, device.type, torch.float32)[1]
        if why is None:
            found.append(bench)
        else:
            console.print(f"Not timed on {device.type}: {bench.op}: {why}")
    return found


class Run:
    """A run of the bench and its results so far. Every comparison that is through is written to `path`, whatever
    happens to the others."""

    def __init__(self, console, where, threads: int, timing: bool, path: Path | None):
        self.began = time.perf_counter()
        self.console, self.where, self.threads, self.path = console, where, threads, path
        self.verification: list[dict] = []
        self.timings: list[dict] = []
        self.sweep: list[dict] = []
        self.code = 0
        self.verified: set[tuple] = set()
        self.earlier: list[dict] = []  # verification of the run that this one goes on from
        self.facts = harness.machine(threads, where)
        if timing:
            self.facts["limits"] = {place.type: limits.facts(place, place.timed, threads) for place in where}
        console.print(f"python -m bench {shlex.join(sys.argv[1:])}")
        console.print_json(data=self.facts)

    def track(self, things, what):
        """The things one after the other, with a bar that shows how far it is."""
        return track(things, what, console=self.console)

    def go_on(self) -> None:
        """Take over what the file has, of the same machine.

        Raises:
            typer.BadParameter: it is no file of results, or of another machine.
        """
        try:
            found = store.read(self.path)
            store.same_machine(self.path, found["machine"], "this machine", self.facts)
        except ValueError as error:
            raise typer.BadParameter(f"--resume: {error}") from None
        self.timings, self.sweep, self.earlier = found["timings"], found["sweep"], found["verification"]

    @contextlib.contextmanager
    def until(self, minutes: float | None):
        """Within the block the run may be ended by the time, by the user or by a lost device; what there is stays."""

        def ring(number, frame):
            raise TimeUp

        before = signal.signal(signal.SIGALRM, ring)
        left = 0.0 if minutes is None else max(0.1, 60 * minutes - (time.perf_counter() - self.began))
        signal.setitimer(signal.ITIMER_REAL, left, RING_AGAIN)
        try:
            yield
            self.facts["load_average_after"] = os.getloadavg()[0]
            self.facts["devices_after"] = {place.type: place.state() for place in self.where}
        except TimeUp:
            self.end(f"ended after {minutes:g} minutes", 0)
        except KeyboardInterrupt:
            self.end("interrupted", 130)
        except DeviceLost as error:
            self.end(f"the device does not answer any more. {error}", 1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def end(self, why: str, code: int) -> None:
        """The run is over before everything was done."""
        self.facts["stopped"], self.code = why, code
        self.console.print(f"Stopped: {why}")

    def verify(self, benches, device=None, dtype: str | None = None) -> None:
        """Verify the operators, on one device and in one dtype or on all and in all, as far as that was not done.

        Raises:
            typer.Exit: something is wrong.
        """
        rows = []
        for place in self.where if device is None else [device]:
            todo = [bench for bench in benches if (bench.op, place.type, dtype) not in self.verified]
            for bench in self.track(todo, f"Verifying on {place.type}") if device is None else todo:
                rows += harness.verify([bench], place, None if dtype is None else [dtype])
                self.verified.add((bench.op, place.type, dtype))
        failed = [row for row in rows if not row["ok"]]
        if rows:
            done = f"Verified {len(rows)} quantities against the float64 reference: {len(failed)} wrong"
            self.console.print(done if device is None else f"{done}: {benches[0].op} on {device.type} in {dtype}")
        if failed:
            self.console.print(failures_table(failed))
            raise typer.Exit(1)
        self.verification += rows

    def jobs(self, selection: Selection, in_parts: bool) -> list[Job]:
        """List the comparisons that are to be made, in order."""
        found = []
        for place in self.where:
            able = with_kernels(selection.benches, place, self.console)
            for part in PARTS[place.has_graphs] if in_parts else ("all",):
                found += [
                    Job(bench, case, place, dtype, part)
                    for bench in able
                    for case in bench.planned(place.type, selection.quick, selection.shapes)
                    for dtype in place.timed
                    if part != "compiled" or not (case.heavy or case.uncompiled)
                ]
        if in_parts:  # the sort is stable: devices with graphs first, then part by part
            order = [part for graphs in (True, False) for part in PARTS[graphs]]
            found.sort(
                key=lambda job: (
                    not job.device.has_graphs,
                    order.index(job.part),
                    job.case.rank,
                    job.dtype != "float32",
                )
            )
        return [job for job in found if not job.is_in(self.timings)]

    def time(self, selection: Selection, in_parts: bool) -> None:
        """Time all comparisons; in parts, in order of importance, each verified just before."""
        jobs = self.jobs(selection, in_parts)
        for place in sorted(self.where, key=lambda place: in_parts and not place.has_graphs):
            mine, sitting = [job for job in jobs if job.device is place], []
            try:
                for job in self.track(mine, f"Compiling for and timing on {place.type}"):
                    if in_parts:
                        self.verify([job.bench], place, job.dtype if job.dtype in job.bench.dtypes else None)
                    with of_precision(selection.precision):
                        comparison = harness.Comparison(
                            job.bench,
                            job.case,
                            place,
                            job.dtype,
                            self.threads,
                            selection.quick,
                            selection.data,
                            job.part,
                        )
                    with of_precision(selection.precision):
                        comparison.sit()
                    sitting.append(comparison)
                    if place.sittings == 1:  # nothing more to come: its memory is free for the next
                        self.add(sitting.pop())
                for number in range(1, place.sittings):
                    for comparison in self.track(list(sitting), f"Timing again, {number + 1} of {place.sittings}"):
                        with of_precision(selection.precision):
                            comparison.sit()
            finally:
                if sys.exc_info()[0] is not None:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                for comparison in sitting:
                    self.add(comparison, write=False)
                self.write()

    def add(self, comparison, write=True) -> None:
        """Keep the rows of a comparison, and say what came out."""
        columns = ("op", "shape", "pass", "device", "dtype", "contestant")
        known = {tuple(row[name] for name in columns) for row in self.timings}
        new = comparison.rows()
        self.timings += [row for row in new if tuple(row[name] for name in columns) not in known]
        for group in grouped(new):
            head = " ".join(str(group.head[name]) for name in ("op", "shape", "pass", "device", "dtype"))
            if group.gain is not None:
                self.console.print(
                    f"{head}: {group.gain:.2f} times as fast as {group.rival['contestant']}", markup=False
                )
        if write:
            self.write()

    def write(self) -> None:
        """Write the results so far to the file that was asked for."""
        if self.path is not None:
            store.write(self.path, self.facts, self.verification, self.timings, self.sweep, self.earlier)

    def keep(self, history: Path | None = None) -> None:
        """The end: write to all files."""
        for path in (self.path, history):
            if path is not None:
                store.write(path, self.facts, self.verification, self.timings, self.sweep, self.earlier)
                self.console.print(f"Wrote {path}")
