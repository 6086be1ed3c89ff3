"""`pytest bench/bench_lrua_sequence.py`: a training step of lrua_sequence at the paper's shape, verified before it is timed."""

from bench.harness import pytest_benchmark_of

test_training_step = pytest_benchmark_of("lrua_sequence")
