"""The CUDA kernels under sanitizers, which report nothing; and the same kernels with a fault planted, which is named.

A part of `make test-long`: every fault is a build of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cuda_on_cpu
import pytest
from mutant import cuda_mutant

pytestmark = [
    pytest.mark.long,
    pytest.mark.compiles,
    pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing())),
]

RUN = Path(__file__).with_name("run_cuda_on_cpu.py")
#: What is enough for a sanitizer, which is slow: more examples than blocks of a cluster would be 8,192 threads.
CALLS = {
    "content_address": ("3,7,5,2", "beta=True"),
    "lrua_step": ("3,7,5,2", "add=True", "beta=True", "lru='shared'"),
    "augmented_linear": ("3,7,5,2",),
    "augmented_conv2d": ("2,9,5,3", "pool=True"),
    "generate_fast_weights": ("3,7,5,2",),
    "summarize_gradients": ("3,7,5,2",),
    "mann_sequence": ("3,7,5,2", "T=2", "lengths=True", "write='add'", "key_strength=True"),
}


def run_in_process(kind, library, op, seeds):
    command = [sys.executable, RUN, library, op, str(seeds), *CALLS[op]]
    return subprocess.run(command, env=os.environ | cuda_on_cpu.sanitized(kind), capture_output=True, text=True)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_report_nothing(kind, op):
    ran = run_in_process(kind, cuda_on_cpu.build(kind), op, 2)
    assert ran.returncode == 0, ran.stderr
    assert "Sanitizer" not in ran.stderr, ran.stderr


class Fault(NamedTuple):
    op: str
    file: str
    right: str
    wrong: str
    #: By what sees it, what it says: a kind of build, "plain" for the numbers and the checks of the fibers.
    said: dict[str, str]


ARRIVED = "        copy_async_wait<0>();\n        __syncthreads();\n"
FAULTS = {
    "missing barrier": Fault(
        "augmented_conv2d",
        "augmented_conv2d_tile.h",
        ARRIVED,
        "        copy_async_wait<0>();\n",
        {"plain": "(output|gradient) .*error", "thread": "data race"},
    ),
    "divergent barrier": Fault(
        "augmented_conv2d",
        "augmented_conv2d_tile.h",
        ARRIVED,
        "        copy_async_wait<0>();\n        if (threadIdx.x < 32) __syncthreads();\n",
        {"plain": "divergent barrier"},
    ),
    "no wait": Fault(
        "augmented_conv2d",
        "augmented_conv2d_tile.h",
        ARRIVED,
        "        __syncthreads();\n",
        {"plain": "asynchronous copies that nobody waited for"},
    ),
    "one past the end": Fault(
        "augmented_conv2d",
        "augmented_conv2d_backward.cu",
        "* kShape.W + x] =\n",
        "* kShape.W + x + 1] =\n",
        {"address": "heap-buffer-overflow"},
    ),
    "sum across blocks": Fault(
        "augmented_conv2d",
        "augmented_conv2d_backward.cu",
        "a.dots[part * a.dots_stride + ",
        "a.dots[0 * a.dots_stride + ",
        {"plain": "gradient of mix.*error", "thread": "data race"},
    ),
    "misaligned vector": Fault(
        "augmented_conv2d",
        "augmented_conv2d_tile.h",
        "weights + c * D::kWeights + 4 * group)",
        "weights + c * D::kWeights + 4 * group + 1)",
        {"address": "misaligned address"},
    ),
    "weights before they are there": Fault(
        "generate_fast_weights",
        "generate_fast_weights.cu",
        "    GradientSums sums(args.sums, lane);\n    __syncthreads();\n",
        "    GradientSums sums(args.sums, lane);\n",
        {"plain": "(output|gradient) .*error", "thread": "data race"},
    ),
    "a coordinate too many": Fault(
        "summarize_gradients",
        "coordinates.h",
        "there[r] = at[r] < count",
        "there[r] = at[r] <= count",
        {"address": "heap-buffer-overflow"},
    ),
    "warps that do not wait": Fault(
        "summarize_gradients",
        "coordinates.h",
        "        for (int w = 0; w < warps; ++w) {\n            __syncthreads();\n",
        "        for (int w = 0; w < warps; ++w) {\n",
        {"thread": "data race"},
    ),
    "a slice too few": Fault(
        "augmented_linear",
        "augmented_linear_tile.h",
        "for (int slice = 0; slice < Tile::kSlices",
        "for (int slice = 1; slice < Tile::kSlices",
        {"plain": "(output|gradient) .*error"},
    ),
}


@pytest.mark.parametrize(("fault", "by"), [(name, by) for name, fault in FAULTS.items() for by in fault.said])
def test_a_planted_fault_is_named(fault, by, tmp_path):
    op, file, right, wrong, said = FAULTS[fault]
    csrc = cuda_mutant(tmp_path, file, right, wrong)
    library = cuda_on_cpu.build(by, sources=[csrc / "cuda" / f"{op}.cpp"], csrc=csrc, folder=tmp_path)
    ran = run_in_process(by, library, op, 20)
    assert ran.returncode != 0
    assert re.search(said[by], ran.stderr), ran.stderr
