"""A training step of memory_update at the paper's shape, verified, then timed by pytest-benchmark."""

from bench.harness import pytest_benchmark_of

test_training_step = pytest_benchmark_of("memory_update")
