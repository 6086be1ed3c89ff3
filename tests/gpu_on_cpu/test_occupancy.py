"""Occupancy and the least time of a kernel, against values worked out by hand."""

import pytest
from occupancy import clusters, occupancy
from roofline import GPUS, least_time


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "programs", "limit"),
    [
        ("sm_90", 256, 32, 0, 8, "warps"),  # 2048 threads
        ("sm_120", 256, 32, 0, 6, "warps"),  # 1536 threads
        ("sm_90", 256, 64, 0, 4, "registers"),  # 64 * 256 = 16,384 of 65,536
        ("sm_90", 256, 65, 0, 3, "registers"),  # in portions of 8 to a thread
        ("sm_90", 256, 255, 0, 1, "registers"),
        ("sm_90", 128, 255, 0, 2, "registers"),
        ("sm_80", 256, 32, 48 * 1024, 3, "shared memory"),  # 49 KB of 164, with the one that the driver keeps
        ("sm_90", 256, 32, 100 * 1024, 2, "shared memory"),  # 101 KB of 228
        ("sm_90", 256, 32, 232_448, 1, "shared memory"),
        ("sm_86", 32, 32, 0, 16, "blocks"),
        ("sm_90", 32, 32, 0, 32, "blocks"),
    ],
)
def test_occupancy(target, threads, registers, shared, programs, limit):
    found = occupancy(target, threads, registers, shared)
    assert found.programs == programs
    assert found.warps == programs * threads // 32
    assert limit in found.limited_by


@pytest.mark.compiles
def test_what_does_not_fit():
    assert occupancy("sm_120", 256, 32, 120_000).programs == 0
    assert occupancy("sm_80", 1024, 128, 0).programs == 0


@pytest.mark.parametrize(("blocks", "programs", "want"), [(8, 1, 16), (4, 1, 32), (8, 2, 32), (1, 1, 132), (8, 0, 0)])
def test_clusters(blocks, programs, want):
    assert clusters("sm_90", blocks, programs) == want


def test_a_cluster_that_no_gpu_promises():
    with pytest.raises(ValueError, match="blocks: got 16, want 1 to 8"):
        clusters("sm_90", 16, 1)


def test_least_time():
    """A byte bound, an operation bound, and an eighth of the chip."""
    assert least_time("H100", 3.35e9, {"f32": 67e9}) == (pytest.approx(1e-3), "memory")
    assert least_time("A100", 2.039e9, {"f32": 39e9}) == (pytest.approx(2e-3), "arithmetic")
    assert least_time("H200", 0, {"f32": 67e9}, programs=33) == (pytest.approx(4e-3), "arithmetic")
    assert least_time("B200", 0, {"f32": 75e9, "tf32": 1100e9}, programs=1000) == (pytest.approx(2e-3), "arithmetic")
    assert all(gpu.flops["f64"] < gpu.flops["f32"] < gpu.flops["tf32"] < gpu.flops["bf16"] for gpu in GPUS.values())
