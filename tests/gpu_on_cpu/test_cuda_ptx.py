"""The CUDA kernels as nvcc compiled them, run by the PTX machine on CPU tensors, against the reference; and what they move.

`--all-targets` runs every target, and the paper's sizes.
"""

import os

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
PAPER = {"content_address": (2, 1), "lrua_step": (2, 1), "mann_sequence": (8, 2)}


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


def test_barriers_of_a_step():
    """At most three of the cluster, forward and backward, after what is done once."""
    counts = []
    for steps in (2, 4):
        with emulated_cuda.emulated_cuda("sm_90a") as launches:
            run(mann_kernels.mann_sequence, inputs_of("mann_sequence", 0, (1, 3, 2, 1), T=steps).to(torch.float32))
        counts.append([stats.cluster_barriers for stats in launches])
    for few, many in zip(*counts, strict=True):
        assert few > 0
        assert (many - few) / 2 <= 3


@pytest.mark.parametrize("stem", PAPER)
def test_global_bytes(stem, request):
    """At most 1.2 times what the kernel's arguments have: weights and memory stay in shared memory, whatever the steps.

    Only what the backward pass of content_address reads again of an example, in the first-level cache by then, counts once.
    """
    batch, steps = PAPER[stem]
    if stem == "mann_sequence" and not request.config.getoption("--all-targets"):
        pytest.skip("with --all-targets")
    with emulated_cuda.emulated_cuda("sm_90a") as launches:
        run(getattr(mann_kernels, stem), call_of(stem, batch, steps))
    assert len(launches) == 2
    for stats in launches:
        once = stats.distinct_loaded + stats.distinct_stored
        ideal = sum(count for name, count in once.items() if not name.startswith("scratch"))
        moved = once if stem == "content_address" else stats.global_bytes
        assert sum(moved.values()) <= 1.2 * ideal, (stats.kernel.name, ideal, moved)
