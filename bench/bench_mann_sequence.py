"""A training step of mann_sequence at the paper's shape, verified, then timed by pytest-benchmark."""

from bench.harness import pytest_benchmark_of

test_training_step = pytest_benchmark_of("mann_sequence")
