"""Tools to check kernels, and cells of your own, against the reference."""

from mann_kernels.testing.accuracy import Accuracy, accuracy, assert_accurate
from mann_kernels.testing.audit import Audit, Finding, audit

__all__ = ["Accuracy", "Audit", "Finding", "accuracy", "assert_accurate", "audit"]
