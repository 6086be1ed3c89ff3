"""Tools to check kernels, and cells of your own, against the reference."""

from mann_kernels.testing.accuracy import Accuracy, accuracy, assert_accurate

__all__ = ["Accuracy", "accuracy", "assert_accurate"]
