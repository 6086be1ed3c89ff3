"""The CUDA kernels as nvcc compiled them, run by the PTX machine on CPU tensors, against the reference; and what they move.

`--all-targets` runs every target, and the paper's sizes.
"""

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("has nothing to do with Triton", allow_module_level=True)

pytest.importorskip("triton")

import cuda_on_cpu
import emulated_cuda
from report import call_of
from stem import matches, run
from test_cuda_kernels import SIZES, STEMS, inputs_of
from test_properties import class_of

import mann_kernels

WHY = cuda_on_cpu.missing() or emulated_cuda.missing()
pytestmark = [pytest.mark.compiles, pytest.mark.skipif(WHY is not None, reason=str(WHY))]

#: Clusters are of sm_90 and later: elsewhere mann_sequence runs another way.
CASES = [
    (stem, target) for stem in STEMS for target in emulated_cuda.TARGETS if (stem, target) != ("mann_sequence", "sm_80")
]
#: At the paper's sizes: examples and steps. A cluster has eight examples.
PAPER = {"content_address": (16, 1), "lrua_step": (2, 1), "mann_sequence": (8, 2)}
#: N, W, R and H of mann_sequence where a step is counted.
STEP = (16, 8, 4, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("stem", "target"), CASES)
def test_matches_reference(stem, target, dtype, request):
    everything = request.config.getoption("--all-targets")
    if not everything and (target != "sm_90a" or (stem, dtype) == ("mann_sequence", torch.bfloat16)):
        pytest.skip("with --all-targets")
    options = class_of(stem).options
    cases = [(SIZES[0], options[-1]), (SIZES[2], options[0])]
    if everything and target == "sm_90a":
        cases += (
            [(SIZES[3], options[1]), (SIZES[1], options[-1])] if stem != "mann_sequence" else [(SIZES[3], options[1])]
        )
    steps = {"T": 2} if stem.endswith("sequence") else {}
    with emulated_cuda.emulated_cuda(target) as launches:
        for seed, (size, each) in enumerate(cases):
            matches(stem, inputs_of(stem, seed, size, **each, **steps), dtype)
    assert len(launches) >= 2 * len(cases)


@pytest.fixture(scope="module")
def a_step():
    """Of mann_sequence, forward and backward: barriers of the cluster and bytes that a step of one example adds to a launch."""
    N, W, R, H = STEP
    found = []
    for steps in (2, 4):
        with emulated_cuda.emulated_cuda("sm_90a") as launches:
            inputs = class_of("mann_sequence").inputs(0, 1, N, W, R, T=steps, H=H)
            run(mann_kernels.mann_sequence, inputs.to(torch.float32))
        found.append([(stats.cluster_barriers, stats.global_bytes.total()) for stats in launches])
    assert all(barriers > 0 for barriers, _ in found[0])
    return [(np.array(many) - few) / 2 for few, many in zip(*found, strict=True)]


def test_barriers_of_a_step(a_step):
    """At most three of the cluster."""
    assert all(0 < barriers <= 3 for barriers, _ in a_step)


def test_global_bytes_of_a_step(a_step):
    """At most 1.2 times the ideal: nothing of the weights, the memory and the state, which come and go once an episode.

    Ideal is that the inputs and outputs of a step pass once: forward the gates of x, the output, and what is kept for backward;
    backward the gradient of the output, the gates and least-used slots that were kept, the head, and the gradients of gates and
    head, of which matrix products after the kernel make those of the weights. Undoing a step takes what was there before it: c,
    read weights and overwritten rows, which no shared memory has room for over a segment of steps; each is written once and read
    once. (Every eighth step the memory too; there are not so many here.) What comes on top is the second reading of three gates
    and the head: the steps of a segment are taken before they are undone.
    """
    N, W, R, H = STEP
    words, gates = R * W, 4 * H
    head, output = words + R, H + words
    kept = gates + R
    records = H + R * N + words
    ideal = [gates + output + kept, output + kept + head + gates + head + 2 * records]
    for (_, moved), numbers in zip(a_step, ideal, strict=True):
        assert 4 * numbers <= moved <= 1.2 * 4 * numbers


def test_global_bytes_of_augmented_linear():
    """More than the ideal, at the paper's layer: 64 x 64, 50 examples, a memory of 5 rows; 0.15 MB forward and 0.26 MB backward.

    Products go by tiles of 32 x 64, and each asks for all of both operands. The two tiles of examples ask for every weight; the
    products with the rows of the memory ask for x (forward), for the gradient and its slopes (dx), and for these and x (dfast). One
    tile for all examples would leave one multiprocessor at work; the sums for all rows of the memory in one block would be five
    times the registers. The kernels of dx and of the weights' gradients both need x and the gradient. All of it is far
    smaller than the second-level cache of any of these GPUs.
    """
    with emulated_cuda.emulated_cuda("sm_90a") as launches:
        run(mann_kernels.augmented_linear, class_of("augmented_linear").inputs(0, 50, 64, 64, 5).to(torch.float32))
    for stats, most in ((launches[:1], 2.2), (launches[1:], 3.3)):
        once = {}
        for each in stats:
            once |= each.distinct_loaded | each.distinct_stored
        ideal = sum(count for name, count in once.items() if not name.startswith("scratch"))
        moved = sum(each.global_bytes.total() for each in stats)
        assert ideal <= moved <= most * ideal, (ideal, moved)


@pytest.mark.parametrize("stem", PAPER)
def test_global_bytes(stem, request):
    """At most 1.2 times what the kernel's arguments have: weights and memory stay in shared memory, whatever the steps."""
    batch, steps = PAPER[stem]
    if stem == "mann_sequence" and not request.config.getoption("--all-targets"):
        pytest.skip("with --all-targets")
    with emulated_cuda.emulated_cuda("sm_90a") as launches:
        run(getattr(mann_kernels, stem), call_of(stem, batch, steps))
    assert len(launches) == 2
    for stats in launches:
        once = stats.distinct_loaded + stats.distinct_stored
        ideal = sum(count for name, count in once.items() if not name.startswith("scratch"))
        assert stats.global_bytes.total() <= 1.2 * ideal, (stats.kernel.name, ideal, stats.global_bytes)
