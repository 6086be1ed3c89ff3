"""`pytest bench/bench_content_address.py`: a training step of content_address at the paper's shape, verified before it is timed."""

from bench.harness import pytest_benchmark_of

test_training_step = pytest_benchmark_of("content_address")
