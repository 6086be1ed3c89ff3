"""The time that counted work should take on a GPU: peaks that NVIDIA publishes, and what is assumed beside them. A model.

Everything assumed stands here, in one place, and in ASSUMPTIONS in words.
"""

import math
from collections import Counter
from typing import NamedTuple

import torch

from bench.cost_count import Operation
from bench.cost_kernels import Kernel
from bench.stems import Shape

# after cost_kernels, which says where they are found
from occupancy import GROUPS, clusters  # isort: skip
from roofline import GPUS, least_time  # isort: skip

#: Which product each name of GPUS stands for, and where its peaks are published.
PRODUCTS = {
    "A100": ("A100 SXM4 80 GB", "NVIDIA A100 datasheet 2188504, May 2022, as transcribed"),
    "H100": ("H100 SXM5 80 GB", "a reseller's table; NVIDIA H100 datasheet 3440270, September 2024, not found"),
    "H200": ("H200 SXM 141 GB", "NVIDIA H200 datasheet 3367400, July 2024, as transcribed"),
    "B200": ("B200 SXM, HGX, 1000 W", "NVIDIA Blackwell datasheet 3384703, October 2025, as transcribed"),
}
#: Multiply-adds in float32 of a multiprocessor and clock (CUDA C++ Programming Guide, arithmetic instructions).
LANES = {"sm_80": 64, "sm_90": 128, "sm_100": 128}

# Assumed, for a step of a persistent kernel: docs/pages/mann_sequence_on_hopper.md derives each.
CLUSTER_BARRIER = 300  # clocks, with the writes before it
BARRIERS = {"fwd": 2, "bwd": 2}  # of the cluster in a step: a test of the compiled code counts them
CELL = 600  # clocks: three dependent exponentials, two passes over partial sums
SHARED_BYTES = 128  # of shared memory, a clock
MEMORY_ACCESSES = 2_500  # of 128 bytes, for 128 slots of 40 and 4 heads; in proportion elsewhere
MEMORY_WAITS = 500  # clocks: eight __syncthreads, the softmax's chain
MEMORY_BACKWARD = 2.5  # the work of the memory's step again and back
# Assumed for Triton's: a program reads the recurrent weights at every step, from the second-level cache.
L2_BYTES = 64  # a clock and multiprocessor

ASSUMPTIONS = (
    "a prediction: nothing was run for it; counts leave out the parts in which cuBLAS may do a product; times are a model",
    "host and GPU work side by side: a step takes the longer of the two; each launch takes the host --launch-us",
    "a kernel takes the GPU at least --kernel-us, in a CUDA graph too, for kernels that wait for each other",
    "a CUDA graph is one launch with the same kernels inside; eager and compiled code launch each kernel",
    "operators of PyTorch run at the roofline, each tensor once through device memory: real ones do not reach it, and the"
    " second-level cache saves some of the way",
    "a training step is forward, a weighted sum of the first output as the loss (four kernels, for everyone), and backward",
    "float32 products without tensor cores (TF32 off); bfloat16 products at the dense tensor peak",
    "bytes of our kernels: each argument once; scratch stays in the second-level cache; of a CUDA kernel those of its operator,"
    " which may be more than it needs",
    "FLOPs of our kernels: those of the eager contestant but for what operators around ours do, in equal parts to the kernels of a"
    " pass; what a kernel computes again is in the latency, not here",
    f"a step of an episode: cluster barrier {CLUSTER_BARRIER} clocks, {BARRIERS['fwd']} a step; cell {CELL}; memory's step"
    f" {MEMORY_ACCESSES} shared accesses at the paper's size and {MEMORY_WAITS}, backward {MEMORY_BACKWARD} times",
    f"Triton reads the recurrent weights at every step at {L2_BYTES} bytes a clock and multiprocessor",
    "compiled: the step under torch.compile, the kernels that inductor schedules after fusion with its Triton rules on CPU tensors",
)


class Times(NamedTuple):
    """Microseconds."""

    host: float
    device: float

    @property
    def step(self) -> float:
        return max(self.host, self.device)


def clock(gpu: str) -> float:
    """Clocks a second that the published float32 peak says."""
    chip = GPUS[gpu]
    return chip.flops["f32"] / (2 * LANES[chip.target] * chip.multiprocessors)


def flops_by_kind(products: float, others: float, dtype) -> dict[str, float]:
    narrow = dtype == torch.bfloat16
    return {"f32": others, "bf16": products} if narrow else {"f32": others + products}


def of_operations(gpu: str, every: Counter[Operation], dtype, kernel_us: float) -> float:
    """Microseconds of the GPU, operator by operator."""
    total = 0.0
    for op, count in every.items():
        bound = least_time(gpu, op.moved, flops_by_kind(op.products, op.others, dtype))
        total += count * max(kernel_us * op.kernels, bound.seconds * 1e6)
    return total


def memory_clocks(s: Shape, which: str) -> float:
    """Of the memory's step: addressing, the choice of slots, write, read."""
    scale = s.N * s.W * s.R / (128 * 40 * 4)
    return (MEMORY_ACCESSES * scale + MEMORY_WAITS) * (MEMORY_BACKWARD if which == "bwd" else 1)


def cluster_clocks(s: Shape, cluster: int, which: str, dtype) -> dict[str, float]:
    """Of a step of mann_sequence in a cluster, part by part: each block has its part of the weights, for all examples."""
    K, P = s.H + s.R * s.W, s.R * s.W + s.R
    heads = 2 if which == "bwd" else 1  # computed again, then transposed
    if dtype == torch.bfloat16:  # bound by the weights that come out of shared memory
        gates, head = (2 * rows * columns / cluster / SHARED_BYTES for rows, columns in ((4 * s.H, K), (P, s.H)))
    else:  # bound by the multiply-adds: gates in whole rounds, heads with half the warps idle
        gates, head = 4 * s.H * K / 128 * 5 / 4.5, 2 * P * s.H / 128
    parts = {"gates": gates, "head": heads * head, "cell": CELL, "memory": memory_clocks(s, which)}
    return parts | {"barriers": BARRIERS[which] * CLUSTER_BARRIER}


def program_clocks(s: Shape, gpu: str, which: str, dtype) -> dict[str, float]:
    """Of a step of mann_sequence in Triton, where a program has one example."""
    K, P = s.H + s.R * s.W, s.R * s.W + s.R
    numbers = 4 * s.H * K + (2 if which == "bwd" else 1) * P * s.H
    products = max(numbers * dtype.itemsize / L2_BYTES, numbers / LANES[GPUS[gpu].target])
    return {"products": products, "cell": CELL, "memory": memory_clocks(s, which)}


def latency_us(kernel: Kernel, gpu: str, s, dtype) -> float:
    """Microseconds of the chain of dependent steps; 0 for what is no episode."""
    if kernel.stem not in ("lrua_step", "lrua_sequence", "mann_sequence"):
        return 0.0
    steps = 1 if kernel.stem == "lrua_step" else s.T
    if kernel.stem != "mann_sequence":
        parts = {"memory": memory_clocks(s, kernel.which)}
    elif kernel.cluster > 1:
        parts = cluster_clocks(s, kernel.cluster, kernel.which, dtype)
    else:
        parts = program_clocks(s, gpu, kernel.which, dtype)
    return waves(kernel, gpu) * steps * sum(parts.values()) / clock(gpu) * 1e6


def waves(kernel: Kernel, gpu: str) -> int:
    """How often the chip is filled."""
    chip, used = GPUS[gpu], kernel.resources.get(GPUS[gpu].target)
    fits = used["programs"] if isinstance(used, dict) else 1
    if kernel.cluster == 1:
        return math.ceil(kernel.programs / (chip.multiprocessors * max(fits, 1)))
    at_once = clusters(chip.target, kernel.cluster, fits) if chip.target in GROUPS else 0
    # how the multiprocessors of a later chip are grouped is not published: as if it were an H100's
    at_once = at_once or clusters("sm_90", kernel.cluster, fits)
    return math.ceil(kernel.programs / kernel.cluster / max(at_once, 1))


class Bound(NamedTuple):
    """Microseconds of one launch of a kernel."""

    roofline: float
    limited_by: str
    latency: float


def of_kernel(kernel: Kernel, gpu: str, s, dtype, flops: dict[str, float]) -> Bound:
    bound = least_time(gpu, kernel.moved, flops, kernel.programs)
    return Bound(bound.seconds * 1e6, bound.limited_by, latency_us(kernel, gpu, s, dtype))
