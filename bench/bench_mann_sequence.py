"""`pytest bench/bench_mann_sequence.py`: a training step of mann_sequence at the paper's shape, verified before it is timed."""

from bench.harness import pytest_benchmark_of

test_training_step = pytest_benchmark_of("mann_sequence")
