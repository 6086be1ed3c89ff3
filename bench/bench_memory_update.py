"""`pytest bench/bench_memory_update.py`: a training step of memory_update at the paper's shape, verified before it is timed."""

from bench.harness import pytest_benchmark_of

test_training_step = pytest_benchmark_of("memory_update")
