"""What is known without a GPU of every Triton and CUDA kernel at the paper's sizes: python tests/gpu_on_cpu/report.py [sm_90 ...]

For one example and two time steps, float32: what ptxas makes of the kernel, how many of its programs fit on a multiprocessor, what
the PTX machine counted, and the least time that its traffic and arithmetic could take. A model and counts, no measurement.
"""

import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import emulated_cuda  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from compiled import plain_name, resources_of_cuda, used_by_cuda  # noqa: E402
from emulated import emulated  # noqa: E402
from occupancy import occupancy  # noqa: E402
from ptx import PTXError  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from roofline import GPUS, least_time  # noqa: E402
from stem import Inputs, run  # noqa: E402
from test_properties import class_of  # noqa: E402

import mann_kernels  # noqa: E402
from bench.stems import SHAPES, inputs  # noqa: E402
from mann_kernels import _backend, _library  # noqa: E402

OF_MANN = ("content_address", "lrua_write_weights", "memory_update", "lrua_step", "lrua_sequence", "mann_sequence")
COLUMNS = (
    "kernel", "threads", "registers", "spilled", "shared", "programs per SM", "loaded KB (once)", "stored KB (once)",
    "barriers", "bank conflicts", "warp instructions", "least us",
)  # fmt: skip


def call_of(stem, batch=1, steps=2):
    """A few examples at the paper's sizes; of an operator that is not MANN's, a case of its tests."""
    if stem in OF_MANN:
        shape = dataclasses.replace(SHAPES["paper"], B=batch, T=steps)
        return Inputs(inputs(stem, shape)).to(torch.float32)
    return class_of(stem).inputs(0, 2, 128, 20, 1, **class_of(stem).options[0]).to(torch.float32)


def resources(text, target):
    """(registers, spilled bytes) of a thread, by the ptxas that comes with Triton."""
    name = "ptxas-blackwell" if int(target.removeprefix("sm_")) >= 100 else "ptxas"
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(text)
        arch = re.search(r"\.target (\w+)", text)[1]
        command = [tool, "-v", f"--gpu-name={arch}", source, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups())
    return int(re.search(r"Used (\d+) registers", said)[1]), stores + loads


def row_of(stats, target, used=None):
    registers, spilled = (used["registers"], used["spilled"]) if used else resources(stats.kernel.text, target)
    fits = occupancy(target, stats.threads, registers, stats.shared_bytes)
    loaded, stored = stats.loaded.total(), stats.stored.total()
    once = stats.distinct_loaded.total(), stats.distinct_stored.total()
    gpu = next(name for name, each in GPUS.items() if each.target == target)
    bound = least_time(gpu, sum(once), stats.flops, stats.programs)
    return (
        plain_name(stats.kernel.name), stats.threads, registers, spilled, stats.shared_bytes,
        f"{fits.programs} ({fits.fraction:.0%} of warps)", f"{loaded / 1024:.1f} ({once[0] / 1024:.1f})",
        f"{stored / 1024:.1f} ({once[1] / 1024:.1f})", barriers_of(stats),
        f"{stats.bank_conflicts} of {stats.shared_wavefronts}", stats.warp_instructions.total(),
        f"{bound.seconds * 1e6:.2f} {gpu}, {bound.limited_by}",
    )  # fmt: skip


def barriers_of(stats):
    """Of a program, and with those of its cluster."""
    of_cluster = stats.cluster_barriers // max(1, stats.programs // stats.cluster)
    return f"{stats.barriers // stats.programs}" + (f" + {of_cluster} of the cluster" if of_cluster else "")


def report_cuda(target):
    """The same of the CUDA kernels, by nvcc."""
    from test_cuda_ptx import CASES

    by_nvcc = "sm_90a" if target == "sm_90" else target
    known = resources_of_cuda()[by_nvcc]
    table = Table(*COLUMNS, title=f"CUDA kernels compiled for {by_nvcc} by nvcc, run on the CPU, never on a GPU")
    for stem in [stem for stem, each in CASES if each == by_nvcc]:
        with emulated_cuda.emulated_cuda(by_nvcc) as launches:
            run(getattr(mann_kernels, stem), call_of(stem))
        for stats in launches:
            table.add_row(*map(str, row_of(stats, target, used_by_cuda(stats.kernel.name, known))))
    Console(width=240).print(table)


def report(target):
    table = Table(
        *COLUMNS, title=f"Compiled for {target} by Triton {triton.__version__}, run on the CPU, never on a GPU"
    )
    for stem in _backend.STEMS:
        try:
            with emulated(target) as launches, mann_kernels.backend("triton"):
                run(getattr(mann_kernels, stem), call_of(stem))
            for stats in launches:
                table.add_row(*map(str, row_of(stats, target)))
        except PTXError as error:
            table.add_row(stem, *[""] * 10, f"refused: {error}")
    Console(width=240).print(table)


if __name__ == "__main__":
    for target in sys.argv[1:] or ("sm_90",):
        report(target)
        if _library.cuda_missing is None and emulated_cuda.missing() is None:
            report_cuda(target)
