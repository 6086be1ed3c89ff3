"""A training step of generate_fast_weights at the paper's shape, verified, then timed by pytest-benchmark."""

from bench.harness import pytest_benchmark_of

test_training_step = pytest_benchmark_of("generate_fast_weights")
