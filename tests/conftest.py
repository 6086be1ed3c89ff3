"""Every element that a kernel leaves unwritten is NaN here, so that a comparison sees it."""

import os
import sys
from pathlib import Path

import pytest
import torch

# What cuBLAS asks for to give the same bits from run to run; read when its first handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--all-targets", action="store_true", help="compile the Triton kernels for every GPU, not for two")
    parser.addoption(
        "--write-budgets", action="store_true", help="with it: note their registers and shared memory anew"
    )


@pytest.fixture(autouse=True)
def _fill_uninitialized():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _gpu_marker(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _asked_backend(request):
    """Where a parameter of the test is an Asked device, its implementation is what runs."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    asked = next((value.backend for value in parameters.values() if hasattr(value, "backend")), None)
    if asked is None:
        yield
        return
    import mann_kernels

    stem = parameters.get("stem") or getattr(request.cls, "stem", None)
    if stem is not None and stem not in mann_kernels._library.cuda_kernels:
        pytest.skip(f"{asked} is the default there")
    with mann_kernels.backend(asked):
        yield
