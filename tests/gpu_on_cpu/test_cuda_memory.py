"""The memory operators in CUDA, the slots of an example split over blocks, on the CPU: every option, size and schedule.

mann_sequence is asked for in its step-by-step form, which no small size takes of itself.
"""

import collections
import importlib
from typing import NamedTuple

import cuda_on_cpu
import pytest
import torch
from against_reference import class_of, compare, matches, quantities, run, tie, zero_rows
from mutant import cuda_mutant

import mann_kernels

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing())),
]

OPS = ("content_address", "lrua_step", "lrua_sequence", "mann_sequence")
#: (B, N, W, R): odd; the least there is; a row for every thread, several tiles; the paper's W and R; many heads.
SIZES = ((3, 7, 5, 2), (1, 1, 1, 1), (2, 700, 7, 1), (1, 200, 40, 4), (2, 40, 12, 8))


@pytest.fixture(autouse=True)
def cuda():
    with cuda_on_cpu.cuda_on_cpu() as library:
        library.mann_cuda_plan(-1, 0, 0, 0, 0)
        yield library
        library.mann_cuda_plan(0, 0, 0, 0, 0)


def inputs_of(op, seed, size, **options):
    if op.endswith("sequence"):
        options.setdefault("T", 3)
    return class_of(op).inputs(seed, *size, **options)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_matches_reference(op, size):
    every = class_of(op).options
    for options in every if size == SIZES[0] else (every[0], every[-1]):  # a build takes seconds
        matches(op, inputs_of(op, 1, size, **options), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_other_types(op, dtype):
    for options in class_of(op).options:
        matches(op, inputs_of(op, 1, SIZES[0], **options), dtype)


@pytest.mark.parametrize("op", OPS)
def test_more_columns_than_registers(op):
    """R * W = 1,600: every warp hands on sums of its own, and loops stay loops."""
    matches(op, inputs_of(op, 1, (1, 70, 200, 8), **class_of(op).options[-1]), torch.float32)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("op", OPS)
def test_any_schedule(op, seed, cuda):
    """Whichever thread comes first: the same bits."""
    call = inputs_of(op, 1, (2, 300, 5, 2), **class_of(op).options[-1]).to(torch.float32)
    first = quantities(getattr(mann_kernels, op), call)
    cuda.mann_cuda_on_cpu_seed(seed)
    again = quantities(getattr(mann_kernels, op), call)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("op", OPS)
def test_launches_that_start_early(op, cuda):
    """Before the launch ahead has written anything: nothing is read that it makes."""
    for options in class_of(op).options[:: len(class_of(op).options) - 1]:
        call = inputs_of(op, 1, SIZES[0], **options).to(torch.float32)
        assert cuda_on_cpu.same_when_early(cuda, lambda call=call: quantities(getattr(mann_kernels, op), call))


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    few = inputs_of(op, 0, (1, 3, 2, 1), T=2, write="add", key_strength=True) if op == "mann_sequence" else None
    assert torch.autograd.gradcheck(*class_of(op)._scalar("cpu", few), atol=1e-6)


@pytest.mark.parametrize("change", [tie, zero_rows])
@pytest.mark.parametrize("op", OPS)
def test_ties_and_zero_rows(op, change):
    """Also of slots in different tiles: the lowest index first."""
    for size in ((2, 9, 4, 3), (1, 700, 4, 3)):
        call = inputs_of(op, 2, size, **({"T": 1} if op.endswith("sequence") else {}))
        change(call)
        matches(op, call, torch.float64)


def test_the_least_used_are_in_the_last_blocks():
    """So many blocks that a lane has several of the slots that they propose."""
    call = inputs_of("lrua_step", 4, (1, 14_000, 1, 8))
    call["usage"] = torch.linspace(1, 0, 14_000, dtype=torch.float64)[None]
    matches("lrua_step", call, torch.float32)


@pytest.mark.parametrize("op", OPS[:2])
def test_more_parts_than_are_loaded_at_once(op, cuda):
    """Sums over parts that have a largest logit each, of the softmax and of the reads, are right beyond one load of parts."""
    call = inputs_of(op, 5, (1, 5600, 128, 1), beta=True).to(torch.float32)
    with cuda_on_cpu.recorded(cuda) as launches:
        run(getattr(mann_kernels, op), call)
    assert max(int(launch.blocks.split("x")[0]) for launch in launches if launch.kernel == "memory_write") > 160
    compare(op, call.to(torch.float64), torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_empty_batch(op):
    compare(op, inputs_of(op, 0, (0, 5, 3, 2)), torch.float32)


@pytest.mark.parametrize("every", [1, 3, 10, 256])
@pytest.mark.parametrize("op", OPS[2:])
def test_segments_and_restarts(op, every, monkeypatch):
    monkeypatch.setattr(importlib.import_module(f"mann_kernels.ops.{op}"), "CHECKPOINT_EVERY", every)
    for dtype in (torch.float32, torch.bfloat16):
        matches(op, inputs_of(op, 2, (3, 20, 6, 2), T=23, lengths=True), dtype)
    compare(op, inputs_of(op, 2, (2, 12, 6, 2), T=0), torch.float32)


def test_from_an_almost_empty_memory():
    """Rows of 1e-6: what undoing the writes leaves of them must be right too."""
    inputs = inputs_of("mann_sequence", 1, (1, 60, 40, 4), T=30)
    inputs["memory"] = torch.full_like(inputs["memory"], 1e-6)
    matches("mann_sequence", inputs, torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_rows_on_no_vector(op):
    """A memory that begins in the middle of a vector is read number by number."""
    call = inputs_of(op, 3, (2, 9, 8, 2)).to(torch.float32)
    whole = torch.zeros(call["memory"].numel() + 1)
    call["memory"] = whole[1:].view_as(call["memory"]).copy_(call["memory"])
    matches(op, call, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_usage_that_is_no_number(value):
    """NaN last, as a sort has it."""
    call = inputs_of("lrua_step", 3, (2, 9, 4, 3))
    call["usage"][:, ::2] = value
    matches("lrua_step", call, torch.float64)


def launches_of(cuda, op, size, T=10, H=20):
    """Forward and backward in float32, written down instead of run."""
    sizes = {"T": T} if op.endswith("sequence") else {}
    call = inputs_of(op, 1, size, **(sizes | {"H": H} if op == "mann_sequence" else sizes))
    with cuda_on_cpu.recorded(cuda) as launches:
        quantities(getattr(mann_kernels, op), call.to(torch.float32))
    return launches


#: A step of the memory is two launches forward, two backward; the controller adds two and three.
MOST = {"content_address": 5, "lrua_step": 7, "lrua_sequence": 4 * 10 + 4, "mann_sequence": 9 * 10 + 7}


@pytest.mark.parametrize("op", OPS)
def test_launches(cuda, op):
    counts = collections.Counter(launch.kernel for launch in launches_of(cuda, op, (1, 2000, 8, 2)))
    assert sum(counts.values()) <= MOST[op], counts


def test_the_whole_device_is_used(cuda):
    """One example of many slots: every launch that goes over the memory has a block for each multiprocessor, or more."""
    for launch in launches_of(cuda, "mann_sequence", (1, 32768, 32, 4), T=2):
        if launch.kernel in ("memory_write", "memory_backward"):
            assert int(launch.blocks.split("x")[0]) >= 132, launch


class Fault(NamedTuple):
    op: str
    #: Of its own, so that nothing compiled before is taken for it.
    width: int
    file: str
    right: str
    wrong: str


CHOSEN = "#pragma unroll\n        for (int h = 0; h < kHeads; ++h) chosen"
ONE_PART_EACH = "    if constexpr (kParts > 1) return;\n"
FAULTS = {
    "ties to the highest index": Fault("lrua_step", 11, "memory_rows.h", "(a == b && i < j)", "(a == b && i > j)"),
    "slots before they are chosen": Fault(
        "lrua_step", 13, "memory_write.cu", f"        __syncthreads();\n{CHOSEN}", CHOSEN
    ),
    "a part of the reads is missing": Fault(
        "lrua_step",
        14,
        "memory_use.cu",
        "column < kWords ? s.parts : 0",
        "column < kWords ? s.parts - 1 : 0",
    ),
    "means of the wrong step": Fault(
        "lrua_sequence", 17, "memory_backward.cu", "a.means + ((s.step + 1) % 2 * s.B", "a.means + (s.step % 2 * s.B"
    ),
    "overwritten rows not restored": Fault(
        "lrua_sequence", 18, "memory_backward.cu", "if (chosen && place >= 0)", "if (false)"
    ),
    "no gradient through the norm": Fault(
        "content_address", 19, "memory_backward.cu", "dm[u][i] -= shrink * m[u][i];", ";"
    ),
    "sums taken before they are there": Fault(
        "content_address",
        21,
        "memory_rows.h",
        f"{ONE_PART_EACH}    __syncthreads();\n    for (int at =",
        f"{ONE_PART_EACH}    for (int at =",
    ),
    "one buffer of read weights": Fault(
        "lrua_sequence", 22, "memory_write.cu", "step % s.ring * s.B + b; }", "step * 0 * s.B + b; }"
    ),
    "h of the wrong step": Fault(
        "mann_sequence", 23, "grid_controller.cu", "((s.step - 1) * s.B + b0)", "(s.step * s.B + b0)"
    ),
    "a part of the carried gradient is missing": Fault(
        "mann_sequence", 25, "grid_controller.cu", "sum_of<12>(0, a.parts", "sum_of<12>(1, a.parts"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, cuda, tmp_path):
    op, width, file, right, wrong = FAULTS[fault]
    call = inputs_of(op, 1, (2, 300, width, 2))
    if "usage" in call and "ties" in fault:
        call["usage"] = torch.zeros_like(call["usage"])
    with (
        cuda_on_cpu.kernels_from(cuda_mutant(tmp_path, file, right, wrong), cuda, tmp_path),
        pytest.raises(AssertionError),
    ):
        matches(op, call, torch.float32)
