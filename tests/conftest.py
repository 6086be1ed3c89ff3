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


def asked_backend(item):
    """The implementation that an Asked device among the parameters of a test asks for; None where there is none."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return next((value.backend for value in parameters.values() if hasattr(value, "backend")), None)


@pytest.fixture(autouse=True)
def _asked_backend(request):
    """What was asked for is what runs, where it is not the default anyway."""
    asked = asked_backend(request.node)
    if asked is None:
        yield
        return
    import mann_kernels

    stem = request.node.callspec.params.get("stem") or getattr(request.cls, "stem", "mann_sequence")
    if mann_kernels._backend.default(stem, "cuda", torch.float32)[0] == asked:
        pytest.skip(f"{asked} is the default there")
    with mann_kernels.backend(asked):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except RuntimeError as error:  # not every implementation takes every type, size or operator
        if asked_backend(item) is not None and "was asked for, but cannot run" in str(error):
            pytest.skip(str(error))
        raise
