"""The least time that work can take on a GPU, from what its maker publishes. A model, never a measurement.

Real kernels are slower: launches, latencies, barriers and everything that waits for something else are not in it.
"""

from typing import NamedTuple

TERA = 1e12


class Gpu(NamedTuple):
    target: str
    multiprocessors: int
    bandwidth: float  # bytes a second, of the device memory
    flops: dict[str, float]  # a second, dense: without and, by the name of the product, with tensor cores


GPUS = {
    # SXM, 80 GB: https://www.nvidia.com/en-us/data-center/a100/
    "A100": Gpu(
        "sm_80", 108, 2.039 * TERA, {"f64": 9.7 * TERA, "f32": 19.5 * TERA, "tf32": 156 * TERA, "bf16": 312 * TERA}
    ),
    # SXM; what tensor cores do without sparsity is half of what the page gives: https://www.nvidia.com/en-us/data-center/h100/
    "H100": Gpu(
        "sm_90", 132, 3.35 * TERA, {"f64": 34 * TERA, "f32": 67 * TERA, "tf32": 494.5 * TERA, "bf16": 989.5 * TERA}
    ),
    # https://www.nvidia.com/en-us/data-center/h200/
    "H200": Gpu(
        "sm_90", 132, 4.8 * TERA, {"f64": 34 * TERA, "f32": 67 * TERA, "tf32": 494.5 * TERA, "bf16": 989.5 * TERA}
    ),
    # HGX, 1000 W: https://resources.nvidia.com/en-us-blackwell-architecture (technical brief)
    "B200": Gpu(
        "sm_100", 148, 8 * TERA, {"f64": 40 * TERA, "f32": 80 * TERA, "tf32": 1100 * TERA, "bf16": 2250 * TERA}
    ),
}


class Bound(NamedTuple):
    seconds: float
    limited_by: str


def least_time(gpu: str, moved: float, flops: dict[str, float], programs: int | None = None) -> Bound:
    """For work that moves `moved` bytes to and from device memory and does `flops[kind]` operations of each kind.

    Fewer `programs` than multiprocessors leave the rest of the arithmetic idle.
    """
    chip = GPUS[gpu]
    busy = 1.0 if programs is None else min(1.0, programs / chip.multiprocessors)
    times = {"memory": moved / chip.bandwidth}
    times["arithmetic"] = sum(count / (chip.flops[kind] * busy) for kind, count in flops.items())
    limit = max(times, key=times.get)
    return Bound(times[limit], limit)
