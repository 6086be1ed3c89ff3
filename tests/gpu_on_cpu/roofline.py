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


# From the transcripts that others made of NVIDIA's datasheets, named here; the sheets themselves were not at hand. Where a sheet
# gives tensor cores with sparsity, half of it.
GPUS = {
    # A100 Tensor Core GPU datasheet 2188504, May 2022: 80 GB SXM
    "A100": Gpu(
        "sm_80", 108, 2.039 * TERA, {"f64": 9.7 * TERA, "f32": 19.5 * TERA, "tf32": 156 * TERA, "bf16": 312 * TERA}
    ),
    # SXM, of a reseller's table: of the H100 Tensor Core GPU datasheet 3440270, September 2024, no transcript was found. The
    # arithmetic is that of the H200's sheet
    "H100": Gpu(
        "sm_90", 132, 3.35 * TERA, {"f64": 34 * TERA, "f32": 67 * TERA, "tf32": 494.5 * TERA, "bf16": 989.5 * TERA}
    ),
    # H200 Tensor Core GPU datasheet 3367400, July 2024: SXM
    "H200": Gpu(
        "sm_90", 132, 4.8 * TERA, {"f64": 34 * TERA, "f32": 67 * TERA, "tf32": 494.5 * TERA, "bf16": 989.5 * TERA}
    ),
    # Blackwell datasheet 3384703, October 2025: HGX B200, of one GPU, 1000 W. The technical brief of 2024 has 40 and 80 Tflop/s and
    # 8 TB/s, which the sheet gives the GB200. Multiprocessors are in neither: with 148, 75 Tflop/s are 1.98 GHz
    "B200": Gpu(
        "sm_100", 148, 7.7 * TERA, {"f64": 37 * TERA, "f32": 75 * TERA, "tf32": 1100 * TERA, "bf16": 2250 * TERA}
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
