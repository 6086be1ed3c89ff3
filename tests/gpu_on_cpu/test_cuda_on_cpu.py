"""CUDA on the CPU, tried on small kernels: what they compute, under many schedules; what it says of each fault."""

import ctypes
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
import samples
import torch

HERE = Path(__file__).parent
SEEDS = range(20)

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing())),
]


@functools.cache
def library_of(kind):
    return cuda_on_cpu.build(kind, sources=[HERE / "sample_kernels.cu"], folder=cuda_on_cpu.BUILD / "samples")


@pytest.fixture
def run():
    return functools.partial(samples.run, ctypes.CDLL(str(library_of("plain"))))


def sums_of(x):
    return x.reshape(3, 512).astype(np.float64).sum(1)


def exchanged(x, steps=5, size=4):
    for _ in range(steps):
        x = np.repeat(x.reshape(-1, size).mean(1), size) + 1
    return x


# What right kernels compute


@pytest.mark.parametrize("seed", SEEDS)
def test_sums(run, seed):
    np.testing.assert_allclose(run("sums", seed), sums_of(samples.given("sums")), rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_clusters(run, seed, cluster):
    x = samples.given("exchange")
    np.testing.assert_allclose(run("exchange", seed, cluster=cluster), exchanged(x, 5, cluster), rtol=1e-5)
    halves = run("exchange in halves", seed, cluster=cluster)
    np.testing.assert_allclose(halves, 5 + np.roll(x.reshape(-1, cluster), -1, 1).ravel(), rtol=1e-6)


def product_of(x):
    """Of a [16, 16] and b [16, 8], rounded to bfloat16."""
    rounded = torch.from_numpy(x).bfloat16().double().numpy()
    return rounded[:256].reshape(16, 16) @ rounded[256:].reshape(16, 8)


def test_matrix_products(run):
    """Exactly the sums of the rounded numbers, in every place of the tile."""
    out = np.random.default_rng(1).standard_normal(128).astype(np.float32)
    want = out.reshape(16, 8) + product_of(samples.given("product"))
    np.testing.assert_allclose(run("product", out=out.copy()).reshape(16, 8), want, rtol=3e-7)


def test_numbers(run):
    """Indices in three dimensions; bfloat16 as torch rounds it."""
    x = samples.given("numbers")
    x[:6] = [0.0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8]
    at, same, narrow = run("numbers", x=x).reshape(3, -1)
    assert np.array_equal(at, np.arange(480))
    assert np.array_equal(same, np.resize(x, 480))
    assert np.array_equal(narrow, torch.from_numpy(same).bfloat16().float().numpy())


@pytest.mark.parametrize("seed", SEEDS)
def test_collectives(run, seed):
    x = samples.given("collectives")
    out = run("collectives", seed, x=x).reshape(8, 2, 32)
    warps, lane = x.reshape(2, 32), np.arange(32)
    at = [np.full(32, 5), lane // 8 * 8 + (lane + 1) % 8, np.where(lane >= 2, lane - 2, lane)]
    at += [np.where(lane % 16 < 14, lane + 2, lane), lane ^ 3]
    for got, where in zip(out, at, strict=False):
        assert np.array_equal(got, warps[:, where])
    assert np.array_equal(out[5], np.repeat((warps > 0).sum(1), 32).reshape(2, 32))
    assert np.array_equal(out[6], np.repeat((warps > 2).any(1) + 2, 32).reshape(2, 32))
    assert (out[7] == (x > 0).sum() + 1000 * (x > 2).any()).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_and_warp_barriers(run, seed):
    assert np.array_equal(run("copy", seed), samples.given("copy"))
    x = samples.given("hand on").reshape(2, 32)
    assert np.array_equal(run("hand on", seed), np.roll(x, -7, 1).ravel())


# What is said of faults


def said_of(run, name, **changes):
    """Of every schedule: what was said of it, or None."""
    found = []
    for seed in SEEDS:
        try:
            run(name, seed, **changes)
            found.append(None)
        except RuntimeError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sums, divergent barrier", r"divergent barrier: reaches .*\.cu:\d+ while others wait at .*\.cu:\d+"),
        ("sums, ends before barrier", "divergent barrier: (threads of the block have ended before|ends while others)"),
        ("sums, exited lane", "exited lane: (the mask names a lane that has ended|ends while others of its warp)"),
        ("sums, misaligned", "misaligned: load of a vector at an address that is 4 past a multiple of 16"),
    ],
)
def test_a_fault_is_named(run, name, message):
    """Whatever the schedule, with the kernel, the thread and the block."""
    for said in said_of(run, name):
        assert re.search(r"kernel: thread \(\d+,0,0\) of block \(\d,0,0\): " + message, said), said


@pytest.mark.parametrize(
    ("name", "fewest"),
    [
        ("sums, missing barrier", 10),
        ("exchange, missing cluster barrier", 10),
        ("exchange, single buffer", 5),
        ("copy, no wait", 20),
    ],
)
def test_a_fault_is_seen_in_the_numbers(run, name, fewest):
    """Of 20 schedules: NaN, or other numbers, in so many at least (or a pointer into a block that has ended)."""
    right = run(name.split(",")[0])

    def wrong(seed):
        try:
            return not np.allclose(run(name, seed), right, rtol=1e-5)
        except RuntimeError:
            return True

    assert sum(map(wrong, SEEDS)) >= fewest


def test_a_block_that_has_ended(run):
    said = said_of(run, "exchange, no last barrier")
    assert any(re.search(r"of_rank: the block of rank \d has ended", each or "") for each in said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": (1025, 1, 1)}, "got blocks of 1025 threads"),
        ({"grid": (0, 1, 1)}, "got a grid without blocks"),
        ({"cluster": 3}, "got clusters of 3 blocks in a grid of 8"),
        ({"cluster": 32, "grid": (32, 1, 1)}, "got clusters of 32 blocks"),
        ({"shared": 232_449}, "got 232449 bytes of shared memory"),
    ],
)
def test_launches_that_a_gpu_refuses(run, changes, message):
    with pytest.raises(RuntimeError, match=f"launch: {message}"):
        run("exchange", **changes)


def test_a_seed_repeats_and_another_differs(run):
    def order(seed):
        return run("order", seed).tolist()

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in SEEDS}) == len(SEEDS)
    assert sorted(order(1)) == list(range(3 * 64))


# Sanitizers, each in a process of its own

FOUND = {
    "address": {
        "sums, one past shared": "use-after-poison",
        "sums, one past global": "heap-buffer-overflow",
        "sums, misaligned": "misaligned",
        "exchange, one past of other": "use-after-poison",
    },
    "thread": {
        "order": "data race",  # of a counter
        "sums, missing barrier": "data race",
        "sums, across blocks": "data race",
        "exchange, missing cluster barrier": "data race",
        "exchange, single buffer": "data race",
        "hand on, shuffle for barrier": "data race",
    },
}


def sanitized_run(kind, name):
    command = [sys.executable, HERE / "samples.py", library_of(kind), name, "1"]
    return subprocess.run(command, env=os.environ | cuda_on_cpu.sanitized(kind), capture_output=True, text=True)


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("name", sorted(set(samples.CASES) - {"order"}))
def test_sanitizers_report_nothing(kind, name):
    ran = sanitized_run(kind, name)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, found in FOUND.items() for name in found])
def test_sanitizers_name_a_fault(kind, name):
    """And the line of the kernel."""
    ran = sanitized_run(kind, name)
    assert ran.returncode != 0
    assert FOUND[kind][name] in ran.stderr, ran.stderr
    assert "sample_kernels.cu:" in ran.stderr, ran.stderr
