"""Every element that a kernel leaves unwritten is NaN here, so that a comparison sees it."""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # the other workers have the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# What cuBLAS asks for to give the same bits from run to run; read when its first handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parent))


from expected_skips import is_expected, must_run


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="with the tests that are too long for `make test`")


def pytest_collection_modifyitems(config, items):
    """Leave out what needs a GPU where there is none, and what is too long."""
    left_out = {"gpu": not torch.cuda.is_available(), "long": not config.getoption("--long")}
    out = [item for item in items if any(left_out.get(mark.name) for mark in item.iter_markers())]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in set(out)]


#: Reasons of skips that nobody expects, with a test that was skipped for it.
unexpected: dict[str, str] = {}


def pytest_runtest_logreport(report):
    """Note a skip that is not expected."""
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not is_expected(reason):
            unexpected[reason] = report.nodeid


pytest_collectreport = pytest_runtest_logreport


def pytest_terminal_summary(terminalreporter):
    if unexpected:
        terminalreporter.section("skips that tests/expected_skips.py does not have", red=True)
        for reason, test in unexpected.items():
            terminalreporter.line(f"{test}: {reason}")


def pytest_sessionfinish(session):
    if unexpected:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _fill_uninitialized():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


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

    op = request.node.callspec.params.get("op") or getattr(request.cls, "op", "mann_sequence")
    if mann_kernels._backend.default(op, "cuda", torch.float32)[0] == asked:
        pytest.skip(f"{asked} is the default there")
    with mann_kernels.backend(asked):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except RuntimeError as error:  # not every implementation takes every type, size or operator
        asked = asked_backend(item)
        if asked is None or "was asked for, but cannot run" not in str(error) or must_run(asked, str(error)):
            raise
        pytest.skip(str(error))
