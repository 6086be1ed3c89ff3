"""A training step of augmented_conv2d at the paper's shape, verified, then timed by pytest-benchmark."""

from bench.harness import pytest_benchmark_of

test_training_step = pytest_benchmark_of("augmented_conv2d")
