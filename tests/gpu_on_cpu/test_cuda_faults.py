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
    "mann_sequence": ("3,7,5,2", "T=2", "lengths=True", "write='add'", "key_strength=True"),
}


def run_in_process(kind, library, stem, seeds):
    command = [sys.executable, RUN, library, stem, str(seeds), *CALLS[stem]]
    return subprocess.run(command, env=os.environ | cuda_on_cpu.sanitized(kind), capture_output=True, text=True)


@pytest.mark.parametrize("stem", CALLS)
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_report_nothing(kind, stem):
    ran = run_in_process(kind, cuda_on_cpu.build(kind), stem, 2)
    assert ran.returncode == 0, ran.stderr
    assert "Sanitizer" not in ran.stderr, ran.stderr


class Fault(NamedTuple):
    stem: str
    file: str
    right: str
    wrong: str
    #: By what sees it, what it says: a kind of build, "plain" for the numbers and the checks of the fibers.
    said: dict[str, str]


FAULTS = {
    "missing cluster barrier": Fault(
        "mann_sequence",
        "mann_sequence_forward.h",
        "            head_parts();\n            cluster_barrier();\n",
        "            head_parts();\n            __syncthreads();\n",
        {"plain": "(output|gradient) .*error", "thread": "data race"},
    ),
    "single buffer": Fault(
        "mann_sequence",
        "mann_sequence_forward.h",
        "at<S>(l.h) + t % 2 * (tile * l.leading_h)",
        "at<S>(l.h) + t * 0",
        {"plain": "(output|gradient) .*error", "thread": "data race"},
    ),
    "one past the end": Fault(
        "content_address",
        "content_address.cu",
        "a.dmemory[b * s.N * s.W + i] = ",
        "a.dmemory[b * s.N * s.W + i + 1] = ",
        {"address": "heap-buffer-overflow"},
    ),
    "sum across blocks": Fault(
        "content_address",
        "content_address.cu",
        "a.dbeta[b * s.R + h] = to_storage<S>(grad.dbeta);",
        "a.dbeta[h] = to_storage<S>(to_arith(a.dbeta[h]) + grad.dbeta);",
        {"thread": "data race"},
    ),
    "divergent barrier": Fault(
        "content_address",
        "content_address.cu",
        "    __syncthreads();\n    for_heads(s.R, [&](int h) { softmax_of_cosine(",
        "    if (threadIdx.x < 32) __syncthreads();\n    __syncthreads();\n    for_heads(s.R, [&](int h) { softmax_of_cosine(",
        {"plain": r"divergent barrier: (reaches .*content_address\.cu|threads of the block)"},
    ),
    "misaligned vector": Fault(
        "content_address",
        "content_address.cu",
        "load_heads(dweights, g * s.N + n)",
        "load_heads(dweights + 1, g * s.N + n)",
        {"address": "misaligned address"},
    ),
}


@pytest.mark.parametrize(("fault", "by"), [(name, by) for name, fault in FAULTS.items() for by in fault.said])
def test_a_planted_fault_is_named(fault, by, tmp_path):
    stem, file, right, wrong, said = FAULTS[fault]
    csrc = cuda_mutant(tmp_path, file, right, wrong)
    sources = [csrc / "cuda" / f"{stem}.cu"]
    library = cuda_on_cpu.build("float32" if by == "plain" else by, sources=sources, csrc=csrc, folder=tmp_path)
    ran = run_in_process(by, library, stem, 20)
    assert ran.returncode != 0
    assert re.search(said[by], ran.stderr), ran.stderr
