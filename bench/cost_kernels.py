"""How our GPU kernels are launched and what compilers made of them, on a machine without a GPU.

The launchers run as on a GPU, up to the launch itself: so the grid, the threads, the shared memory and the buffers are those of the
shape in question. Registers and spills come out of the compiled code.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from bench.cost_count import Tally
from bench.harness import Work

sys.path.append(str(Path(__file__).parents[1] / "tests/gpu_on_cpu"))

TARGETS = ("sm_80", "sm_90", "sm_100")
BACKENDS = ("triton", "cuda")
#: How nvcc is asked for them.
BY_NVCC = {"sm_90": "sm_90a"}
#: Bytes of shared memory of each block.
DRIVER_KEEPS = 1024
#: What a launcher calls memory that is read and written again while a kernel runs.
SCRATCH = ("work", "records", "restarts", "scratch")
#: And by operator: similarities and weights that do not fit a tile.
SCRATCH_OF = {"content_address": ("x_ptr",), "lrua_step": ("x_ptr",)}


class Kernel(NamedTuple):
    """One launch."""

    stem: str
    backend: str
    name: str
    which: str  # pass, "fwd" or "bwd"
    programs: int
    threads: int
    cluster: int
    buffers: dict[str, int]  # bytes by argument, each memory once
    resources: dict[str, dict | str]  # by target; a note where it has none

    @property
    def moved(self) -> int:
        """Bytes to and from global memory if each number of an argument comes or goes once."""
        return sum(self.buffers.values()) - self.scratch

    @property
    def scratch(self) -> int:
        """Bytes that a kernel writes and reads again, and that a second-level cache can keep."""
        names = SCRATCH + SCRATCH_OF.get(self.stem, ())
        return sum(size for name, size in self.buffers.items() if name.startswith(names))


class Step(NamedTuple):
    """A training step: our kernels, and the operators of PyTorch around them by pass."""

    kernels: list[Kernel]
    around: dict[str, Counter]


def missing(backend: str, stem: str, target: str = "sm_90") -> str | None:
    """Why nothing is known of a stem's kernels; None if they can be looked at."""
    from mann_kernels import _backend, _library

    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed (pip install triton): its compiler and cuobjdump are needed"
    if backend == "triton":
        return None
    if stem not in _backend.STEMS or (_library.cuda_missing is None and stem not in _library.cuda_kernels):
        return f"there is no CUDA kernel for {stem}"
    if _library.cuda_missing is not None:
        return _library.cuda_missing
    import cuda_on_cpu

    if stem == "mann_sequence" and target == "sm_80":
        return "needs clusters of thread blocks, which sm_80 has not: Triton runs"
    return cuda_on_cpu.missing()


def step(suite, stem: str, shape, dtype, backend: str, targets=TARGETS) -> Step:
    """A training step on one implementation.

    Raises:
        RuntimeError: it cannot run there.
    """
    work = Work(stem, suite.inputs(stem, shape), dtype)
    return (_triton if backend == "triton" else _cuda)(suite, stem, work, targets)


def _counted(suite, stem, work, launches):
    """Operators of a training step by pass, and the launches of the last pass forward and backward."""
    tally, marks = Tally(), []
    tally.training_step(work, suite.ours(stem), lambda: marks.append(len(launches)))
    # a step was taken before, to warm up, with as many launches
    half = len(launches) // 2
    passes = ["fwd"] * (marks[0] - half) + ["bwd"] * (2 * half - marks[0])
    return tally.found, list(zip(passes, launches[half:], strict=True))


def _once(buffers) -> dict[str, int]:
    """Bytes by name, of memories that do not begin at the same place."""
    distinct: dict[int, tuple[str, int]] = {}
    for name, tensor in buffers.items():
        distinct.setdefault(tensor.data_ptr(), (name, tensor.numel() * tensor.element_size()))
    return dict(distinct.values())


def _triton(suite, stem, work, targets) -> Step:
    from compiled import compiled_for, resources_of

    found = []
    for target in targets:
        with compiled_for(target) as launches:
            around, passes = _counted(suite, stem, work, launches)
        resources = []
        for _, each in passes:
            try:
                resources.append({target: resources_of(each.compiled, target)})
            except RuntimeError as error:  # of the occupancy calculator
                resources.append({target: str(error)})
        found.append(resources)
    kernels = []
    for number, (which, each) in enumerate(passes):
        by_target = {target: used for resources in found for target, used in resources[number].items()}
        name, threads = each.compiled.metadata.name.removesuffix("_kernel"), 32 * each.compiled.metadata.num_warps
        kernels.append(Kernel(stem, "triton", name, which, each.programs, threads, 1, _once(each.buffers), by_target))
    return Step(kernels, around)


def _cuda(suite, stem, work, targets) -> Step:
    import math

    import emulated_cuda
    from compiled import plain_name, resources_of_cuda, used_by_cuda
    from occupancy import occupancy

    def note(name, launch):
        sizes = (math.prod(launch.grid), launch.block[0], launch.cluster, launch.shared)
        return name, *sizes, _once(emulated_cuda.buffers_of(launch))

    with emulated_cuda.diverted(note) as launches:
        around, passes = _counted(suite, stem, work, launches)
    known, kernels = resources_of_cuda(), []
    for which, (name, programs, threads, cluster, shared, buffers) in passes:
        resources: dict[str, dict | str] = {}
        for target in targets:
            why = missing("cuda", stem, target)
            if why is not None:
                resources[target] = why
                continue
            used = used_by_cuda(name, known[BY_NVCC.get(target, target)])
            # from sm_90 on cuobjdump counts what the driver keeps, which the calculator adds too
            total = used["shared"] + shared - (DRIVER_KEEPS if target != "sm_80" else 0)
            try:
                fits = occupancy(target, threads, used["registers"], total).programs
                resources[target] = used | {"shared": total, "programs": fits}
            except RuntimeError as error:
                resources[target] = str(error)
        kernels.append(Kernel(stem, "cuda", plain_name(name), which, programs, threads, cluster, buffers, resources))
    return Step(kernels, around)
